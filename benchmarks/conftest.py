"""Options, conditions and fixtures of `pytest benchmarks/`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from beit_fast.cli.collect_env import environment
from beit_fast.tuning.timer import DeviceClock, HostClock, clock_of

from .baselines.attention import PACKAGES, not_installed
from .harness.cases import chosen_device
from .harness.memory import memory_unsupported_reason
from .harness.session import Session
from .report.terminal import tables

_session = pytest.StashKey[Session]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("beit_fast benchmarks")
    group.addoption("--full", action="store_true", help="run every size and every baseline; slow, mostly on a CPU")
    group.addoption(
        "--device", choices=("cpu", "cuda"), default=None, help="default: cuda if there is a CUDA device, else cpu"
    )
    group.addoption(
        "--require-baselines",
        action="store_true",
        help="run whole models with every baseline and all sizes of the targets; fail if a baseline is not installed",
    )
    group.addoption("--rows", type=Path, metavar="FILE.jsonl", help="write each row here as soon as it is measured")
    group.addoption("--budget", type=float, metavar="SECONDS", help="skip the remaining benchmarks after this time")
    group.addoption("--commit", help="the measured commit, if this folder is not a git checkout")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    if not config.pluginmanager.hasplugin("benchmark"):
        raise pytest.UsageError("benchmarks need pytest-benchmark: pip install 'beit-fast[bench]'")
    device = chosen_device(config.option.device)
    if device == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: torch does not find a CUDA device")
    if config.option.require_baselines:
        require_baselines(device)
    config.option.benchmark_quiet = True  # the table of the terminal summary replaces it
    conditions = environment(device)
    conditions["commit"] = config.option.commit or conditions["commit"]
    config.stash[_session] = Session(conditions, config.option.rows, config.option.budget)


def require_baselines(device: str) -> None:
    """Check that the packages of all baselines are installed.

    Raises:
        pytest.UsageError: If a package is not installed.
    """
    if absent := not_installed(PACKAGES[device]):
        raise pytest.UsageError(
            f"--require-baselines: not installed: {', '.join(absent)}. "
            "pip install 'beit-fast[bench]' installs all but timm; install timm with pip install --no-deps timm"
        )


def pytest_report_header(config: pytest.Config) -> list[str]:
    conditions = config.stash[_session].conditions
    lines = [f"measured on: {conditions['device_name']}, {conditions['threads']} threads, {conditions['system']}"]
    names = ("torch", "cuda", "triton", "transformers", "beit_fast", "commit", "python")
    lines.append("with: " + ", ".join(f"{name} {conditions[name] or 'none'}" for name in names))
    if conditions["gpu"]:
        lines.append("gpu: " + ", ".join(f"{name} {value or 'unknown'}" for name, value in conditions["gpu"].items()))
    reason = memory_unsupported_reason(chosen_device(config.option.device))
    return lines + ([f"peak memory is not measured: {reason}"] if reason else [])


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info["beit_fast"] = config.stash[_session].conditions


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        clock = clock_of(chosen_device(config.option.device))
        item.add_marker(pytest.mark.benchmark(timer=clock, disable_gc=True))
    items.sort(key=_compiled_last)


def _compiled_last(item: pytest.Item) -> str:
    """Sort key that moves slow compilations to the end. A budget cuts the end first."""
    callspec = getattr(item, "callspec", None)  # only parametrized tests have one
    baseline = callspec.params.get("baseline") if callspec is not None else None
    return baseline.name if baseline is not None and baseline.compiles else ""


@pytest.fixture
def session(request: pytest.FixtureRequest) -> Session:
    """The rows, log and budget of this run."""
    return request.config.stash[_session]


@pytest.fixture
def clock(request: pytest.FixtureRequest) -> HostClock | DeviceClock:
    """The timer that pytest-benchmark uses in this test."""
    return request.node.get_closest_marker("benchmark").kwargs["timer"]


@pytest.fixture
def time_workers(session: Session) -> Callable[..., None]:
    """`Session.time_workers` for a test. Wrong baselines fail the test, and missing ones skip it."""

    def run(*arguments: Any, **options: Any) -> None:
        outcome = session.time_workers(*arguments, **options)
        if outcome.wrong:
            pytest.fail("; ".join(f"{name}: {reason}" for name, reason in outcome.wrong.items()), pytrace=False)
        if outcome.missing:
            pytest.skip("; ".join(f"{name}: {reason}" for name, reason in outcome.missing.items()))

    return run


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    rows = config.stash[_session].rows
    for case, lines in tables(rows).items():
        terminalreporter.section(case, sep="-")
        for line in lines:
            terminalreporter.write_line(line)
    if any(row.get("queued_ahead") is False for row in rows):
        terminalreporter.write_line("* the device waited for the host, so the median includes time of the host")
