"""Timing in worker processes: order of the rounds, failures, memory groups, and the rows of a session."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import bench_hf_docs, bench_model, conftest
from benchmarks.baselines import hf_docs, models
from benchmarks.harness import processes, session
from benchmarks.harness.hf_docs_cases import HfDocsCase
from benchmarks.harness.model_cases import ModelCase
from benchmarks.harness.processes import Result, Server, Worker, memory_groups, run_workers
from benchmarks.harness.results import read_results
from benchmarks.harness.session import Session

from .probes import prepare

CONDITIONS = {"device": "cpu", "device_name": "a CPU", "threads": 1, "commit": None}


class LocalProcess:
    """Stands in for `subprocess.Popen`: the server runs in this process."""

    def __init__(self, name: str) -> None:
        self.name, self.server, self.line = name, Server(), ""
        self.stdin = self.stdout = self

    def write(self, line: str) -> None:
        self.line = json.dumps(self.server.answer(json.loads(line))) + "\n"

    def readline(self) -> str:
        return "" if self.name == "killed" else self.line

    def flush(self) -> None: ...

    def kill(self) -> None: ...

    def wait(self) -> int:
        return -9


@pytest.fixture
def local(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Runs workers in this process."""
    threads = torch.get_num_threads()

    @contextlib.contextmanager
    def start(worker: Worker, threads: int, round_seconds: float) -> Iterator[Any]:
        process = processes._Process(worker, LocalProcess(worker.name))  # type: ignore[arg-type]
        process.prepare(threads, round_seconds)
        yield process

    monkeypatch.setattr(processes, "_start", start)
    yield
    torch.set_num_threads(threads)


def test_worker_process_is_isolated_and_its_death_is_reported() -> None:
    """The one test that starts a process."""
    worker = Worker("real", prepare, {"name": "real"}, {"PROBE": "yes"})
    with processes._start(worker, threads=2, round_seconds=0.005) as process:
        process.run_round()
        process.measure_memory()
        result = process.result
        process.process.kill()
        process.run_round()
    assert result.failure is None
    assert result.facts["process"] not in (os.getpid(), None)
    assert (result.facts["threads"], result.facts["variable"]) == (2, "yes")
    assert len(result.times) == 1
    assert result.median >= 0.001
    assert result.peak_memory is None or 0 <= result.peak_memory < result.loaded_memory
    assert (process.result.failure, process.result.times) == ("its process ended with code -9", ())


@pytest.mark.usefixtures("local")
def test_run_workers_takes_turns_in_both_orders_after_all_are_prepared(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    workers = [
        Worker(name, prepare, {"name": name, "log": str(log), "seconds": seconds})
        for name, seconds in (("first", 0.0005), ("wrong", 0), ("killed", 0), ("full", 0), ("slow", 0.02))
    ]
    first, wrong, killed, full, slow = run_workers(workers, rounds=3, round_seconds=0.01, memory=True)
    names = [name for name in log.read_text().split() if name != "killed"]
    turns = [name for place, name in enumerate(names) if place == 0 or names[place - 1] != name]
    prepared, rounds, memory = ["first", "slow"], ["first", "slow", "first", "slow"], ["first", "slow"]
    assert turns == [*prepared, *rounds, *memory]
    assert len(first.times) == len(slow.times) == 3
    assert first.median < slow.median
    assert first.iqr >= 0
    assert first.iterations > slow.iterations == 1
    assert wrong.failure == "ValueError: wrong and not timed. out: relative error 2.00e+00"
    assert killed.failure == "its process ended with code -9"
    assert (full.failure, full.unavailable) == (None, "memory: CUDA out of memory.")
    assert wrong.times == killed.times == full.times == ()


def test_memory_groups_fit_and_contain_the_first_worker() -> None:
    sizes = (("ours", 2), ("a", 3), ("b", 4), ("huge", 9), ("c", 1))
    workers = [Worker(name, print, bytes_needed=size) for name, size in sizes]

    def names(room: int | None) -> tuple[list[list[str]], list[str]]:
        groups, too_large = memory_groups(workers, room)
        assert all(reason.startswith("memory: about ") for reason in too_large.values())
        return [[worker.name for worker in group] for group in groups], list(too_large)

    assert names(None) == names(19) == ([["ours", "a", "b", "huge", "c"]], [])
    assert names(11) == ([["ours", "a", "b"], ["ours", "huge"], ["ours", "c"]], [])
    assert names(7) == ([["ours", "a"], ["ours", "b", "c"]], ["huge"])
    assert names(1) == ([], ["ours", "a", "b", "huge", "c"])
    assert memory_groups([], 1) == ([], {})


@pytest.mark.usefixtures("local")
def test_session_keeps_rows_by_group_and_reasons_of_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "free_memory", lambda device: 10)
    sizes = {"ours": 2, "a": 5, "unavailable": 1, "wrong": 1, "b": 5, "huge": 50}
    workers = [Worker(name, prepare, {"name": name, "error": 0.25}, bytes_needed=size) for name, size in sizes.items()]
    run = Session(CONDITIONS, tmp_path / "rows.jsonl")
    outcome = run.time_workers(
        "probes", "case", 1, workers, {"dtype": "fp32", "batch": 3, "flops": 2000}, {"absent": "not installed"},
        per_call={"images_per_second": 3}, rounds=2, round_seconds=0.001,
    )  # fmt: skip
    assert list(outcome.wrong) == ["wrong"]
    assert list(outcome.missing) == ["absent", "huge", "unavailable"]
    results = read_results(tmp_path / "rows.jsonl")
    rows = results["rows"]
    assert [(row["group"], row["baseline"]) for row in rows] == [(1, "a"), (1, "ours"), (2, "b"), (2, "ours")]
    for row in rows:
        assert (row["bench"], row["threads"], row["kernel"], row["errors"]) == ("probes", 1, "probe", {"out": 0.25})
        assert row["tflops"] == pytest.approx(2000 / row["median"] / 1e12, rel=1e-2)
        assert row["images_per_second"] == pytest.approx(3 / row["median"], rel=1e-2)
        assert row["range"][0] <= row["median"] <= row["range"][1]
    reasons = {entry["baseline"]: entry["reason"] for entry in results["left_out"]}
    assert reasons == outcome.missing | outcome.wrong
    monkeypatch.setattr(session.time, "monotonic", lambda: float("inf"))
    spent = Session(CONDITIONS, tmp_path / "spent.jsonl", budget=0)
    assert list(spent.time_workers("probes", "case", 1, workers, {}).missing.values()) == [
        "the run's budget of 0 seconds is spent"
    ]


@pytest.mark.parametrize(
    ("wrong", "missing", "outcome"),
    [({"a": "off"}, {"b": "absent"}, pytest.fail.Exception), ({}, {"b": "absent"}, pytest.skip.Exception)],
)
def test_fixture_fails_for_wrong_and_skips_for_missing(
    wrong: dict[str, str], missing: dict[str, str], outcome: type[BaseException]
) -> None:
    stub: Any = SimpleNamespace(time_workers=lambda *_, **__: session.Outcome(wrong, missing))
    with pytest.raises(outcome, match="; ".join(f"{k}: {v}" for k, v in (wrong or missing).items())):
        conftest.time_workers.__wrapped__(stub)()


@pytest.fixture
def recorded() -> tuple[Callable[..., None], dict[str, Any]]:
    """A `time_workers` that records its arguments."""
    seen: dict[str, Any] = {}

    def record(
        bench: str, case: str, threads: int, workers: list[Worker], facts: Any, missing: Any, **rules: Any
    ) -> None:
        seen.update(bench=bench, names=[worker.name for worker in workers], missing=missing, rules=rules, facts=facts)
        if workers:
            seen["expected"] = Path(workers[0].arguments["expected"])
            assert seen["expected"].exists()
            assert all(worker.bytes_needed > 0 for worker in workers)

    return record, seen


def test_run_model_times_ours_first_and_reports_a_failed_export(recorded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    record, seen = recorded
    monkeypatch.setattr(models, "not_installed", lambda packages: [])
    monkeypatch.setattr(bench_model, "run_once", lambda *_: Result("export", failure="no room"))
    bench_model.run_model(ModelCase("inference", "tiny", 48, 2, "fp32"), record, False, 1)
    assert seen["names"][:3] == ["beit_fast optimized", "beit_fast optimized high", "beit_fast triton"]
    assert seen["names"][3:] == ["transformers accelerated", "transformers sdpa", "timm"]
    assert seen["missing"]["openvino"] == seen["missing"]["onnxruntime"] == "the export failed: no room"
    assert seen["rules"]["per_call"] == {"images_per_second": 2}
    assert (seen["bench"], seen["facts"]["model"], seen["facts"]["tokens"]) == ("cpu models", "tiny", 10)
    assert not seen["expected"].parent.exists()
    bench_model.run_model(ModelCase("training", "large", 640, 64, "fp32"), record, True, 2)
    assert seen["names"] == []
    assert seen["missing"]["all baselines"].startswith("time: ")


def test_run_hf_docs_times_one_call_per_round(recorded: Any) -> None:
    record, seen = recorded
    case = HfDocsCase("training", 2, 64, 48, "fp32", 2, model="tiny")
    bench_hf_docs.run_hf_docs(case, record, 1)
    assert seen["names"] == ["beit_fast triton", "transformers sdpa", "transformers eager"]
    assert seen["missing"] == {hf_docs.OPTIMIZED: "supports inference only"}
    assert (seen["rules"]["rounds"], seen["rules"]["round_seconds"]) == (2, 0.0)
