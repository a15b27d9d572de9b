"""Settings of the test suite: offline, one thread for each process, fixed seed.

Test processes run in parallel, and spinning threads slow each other down.
"""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[tuple[int, int], str], None]]:
    """Yield a function after which the dispatcher sees a GPU of a compute capability and a version of Triton."""
    from beit_fast.ops.dispatch import attention, availability

    triton = pytest.importorskip("triton", reason="needs Triton")
    decided = (attention._decide, availability._capability_reasons, availability._compiler_hazards)

    def see_gpu(capability: tuple[int, int], version: str) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: capability)
        monkeypatch.setattr(torch.version, "hip", None)
        monkeypatch.setattr(triton, "__version__", version)
        for function in decided:
            function.cache_clear()

    yield see_gpu
    for function in decided:
        function.cache_clear()


def pytest_addoption(parser):
    help_text = "write the outcome of each test here, a line of JSON as soon as it is known"
    parser.addoption("--outcomes", type=Path, metavar="FILE.jsonl", help=help_text)


def pytest_configure(config):
    if config.option.outcomes is not None:
        config.pluginmanager.register(OutcomeLog(config.option.outcomes))


class OutcomeLog:
    """A file with one line of JSON for each test, and for each setup or teardown that did not pass."""

    def __init__(self, path):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")

    def pytest_runtest_logreport(self, report):
        if report.when != "call" and report.passed:
            return
        entry = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 3)}
        if not report.passed:
            entry["reason"] = report.longreprtext[-2000:]
        with self.path.open("a") as file:
            file.write(json.dumps(entry) + "\n")
