"""The house rules: the device is synchronised, the conditions are printed, nothing wrong is ever timed."""

from __future__ import annotations

import functools
import gc
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from beit_fast.measure import environment, peak_memory, synchronize, why_no_peak_memory

from .cases import DTYPE_NAMES, Case, chosen_device, draw, reference, relative_error, results_of, step_of
from .peers import Peer

SECONDS_PER_TEST = 1.0  # spent in timed rounds, as far as the least number of rounds lets
ROUNDS = (5, 50)  # least, most
SHORTEST_ROUND = 1e-3  # seconds: shorter calls are repeated within a round
_rows = pytest.StashKey[list[dict[str, Any]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("beit_fast benchmarks")
    group.addoption("--full", action="store_true", help="every size and every peer; takes long, mostly on a CPU")
    group.addoption(
        "--device",
        choices=("cpu", "cuda"),
        default=None,
        help="where to measure (cuda where there is one, else cpu)",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    if not config.pluginmanager.hasplugin("benchmark"):
        raise pytest.UsageError("benchmarks need pytest-benchmark: pip install 'beit-fast[bench]'")
    if chosen_device(config.option.device) == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: torch finds no CUDA device")
    config.option.benchmark_quiet = True  # the table below says more
    config.stash[_rows] = []


def pytest_report_header(config: pytest.Config) -> list[str]:
    conditions = environment(chosen_device(config.option.device))
    lines = [f"measured on: {conditions['device_name']}, {conditions['threads']} threads, {conditions['system']}"]
    names = ("torch", "cuda", "triton", "transformers", "beit_fast", "commit", "python")
    lines.append("with: " + ", ".join(f"{name} {conditions[name] or 'none'}" for name in names))
    reason = why_no_peak_memory(chosen_device(config.option.device))
    return lines + ([f"peak memory is not measured: {reason}"] if reason else [])


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info["beit_fast"] = environment(chosen_device(config.option.device))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    clock = functools.partial(_idle_clock, chosen_device(config.option.device))
    clock.__name__ = "perf_counter_of_idle_device"  # type: ignore[attr-defined]
    clock.__module__ = __name__
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=clock, disable_gc=True))


def _idle_clock(device: str) -> float:
    """Seconds, read once the device has done its work: a round is timed from idle to idle."""
    synchronize(device)
    return time.perf_counter()


@pytest.fixture
def race(benchmark: Any, request: pytest.FixtureRequest) -> Iterator[Callable[[Case, Peer], None]]:
    """Check one peer on one case against fp64, then time it; what is wrong fails and gets no time."""

    def run(case: Case, peer: Peer) -> None:
        _skip_missing(case, peer, request.config)
        if peer.compiles:
            torch.compiler.reset()
        inputs = draw(case)
        attention = peer.build(case, inputs)
        errors = _checked_errors(case, peer, results_of(case, inputs, attention, peer.biased))
        step = step_of(case, inputs, attention, peer.biased)
        benchmark.group = str(case)
        benchmark.extra_info.update(_facts(case, peer), errors=errors)
        _time(benchmark, step, case.device)
        if benchmark.stats is None:  # --benchmark-disable: the check alone was asked for
            return
        benchmark.extra_info["peak_memory"] = peak_memory(step, case.device)
        benchmark.extra_info["tflops"] = case.flops / benchmark.stats.stats.median / 1e12
        request.config.stash[_rows].append(_row(benchmark))

    yield run
    gc.collect()


def _skip_missing(case: Case, peer: Peer, config: pytest.Config) -> None:
    reason = peer.why_missing(case)
    if reason is None and peer.compiles and case.device == "cpu" and not config.getoption("full"):
        reason = "compiles for long on a CPU: measured with --full"
    if reason is not None:
        pytest.skip(f"{peer.name}: {reason}")


def _checked_errors(case: Case, peer: Peer, results: dict[str, torch.Tensor]) -> dict[str, float]:
    expected = reference(case, peer.biased)
    errors = {name: relative_error(results[name], exact) for name, exact in expected.results.items()}
    wrong = [
        f"{name}: relative error {error:.2e}, accepted {expected.budgets[name]:.2e}"
        for name, error in errors.items()
        if not error <= expected.budgets[name]
    ]
    if wrong:
        pytest.fail(f"{peer.name} is wrong on {case} and was not timed. " + "; ".join(wrong), pytrace=False)
    return errors


def _time(benchmark: Any, step: Callable[[], object], device: str) -> None:
    start = _idle_clock(device)
    step()
    once = _idle_clock(device) - start
    iterations = max(1, min(1000, math.ceil(SHORTEST_ROUND / once)))
    rounds = int(min(max(SECONDS_PER_TEST / (once * iterations), ROUNDS[0]), ROUNDS[1]))
    benchmark.pedantic(step, rounds=rounds, iterations=iterations, warmup_rounds=1)


def _facts(case: Case, peer: Peer) -> dict[str, Any]:
    return {
        "case": str(case),
        "mode": case.mode,
        "batch": case.batch,
        "tokens": case.tokens,
        "window": list(case.window),
        "heads": case.heads,
        "head_dim": case.head_dim,
        "dtype": DTYPE_NAMES[case.dtype],
        "peer": peer.name,
        "what": peer.what,
        "biased": peer.biased,
        "kernel": peer.kernel(case),
        "least_bytes": case.least_bytes(peer.biased),
        "flops": case.flops,
    }


def _row(benchmark: Any) -> dict[str, Any]:
    stats = benchmark.stats.stats
    return {**benchmark.extra_info, "median": stats.median, "iqr": stats.iqr, "rounds": stats.rounds}


_TABLE_HEAD = f"{'peer':36}{'kernel':20}{'median ms':>11}{'iqr ms':>9}{'TFLOP/s':>9}{'peak MiB':>10}{'worst error':>13}"


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    rows = config.stash[_rows]
    for case in dict.fromkeys(row["case"] for row in rows):
        terminalreporter.section(case, sep="-")
        terminalreporter.write_line(_TABLE_HEAD)
        for row in sorted((row for row in rows if row["case"] == case), key=lambda row: row["median"]):
            terminalreporter.write_line(_table_line(row))


def _table_line(row: dict[str, Any]) -> str:
    memory = "-" if row["peak_memory"] is None else f"{row['peak_memory'] / 2**20:.1f}"
    name = row["peer"] if row["biased"] else row["peer"] + " (another result)"
    return (
        f"{name:36}{row['kernel']:20}{row['median'] * 1e3:11.3f}{row['iqr'] * 1e3:9.3f}{row['tflops']:9.3f}"
        f"{memory:>10}{max(row['errors'].values()):13.1e}"
    )
