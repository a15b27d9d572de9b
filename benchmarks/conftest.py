"""The house rules: the device is synchronised, the conditions are printed, nothing wrong is ever timed."""

from __future__ import annotations

import functools
import gc
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch

from beit_fast.cli.collect_env import environment, gpu_readings
from beit_fast.testing.memory import memory_unsupported_reason, peak_memory

from .baselines.attention import PACKAGES, Peer, not_installed
from .harness.cases import DTYPE_NAMES, Case, chosen_device, draw, errors_within, reference, results_of, step_of
from .harness.clocks import DeviceClock, HostClock, clock_of, single_call
from .harness.processes import Entrant, free_memory, heats
from .harness.processes import race as race_processes
from .harness.results import Row, RowLog, rounded, row_of, row_of_result

_conditions = pytest.StashKey[dict[str, Any]]()
_rows = pytest.StashKey[list[Row]]()
_log = pytest.StashKey[RowLog | None]()
_started = pytest.StashKey[float]()
_entry = pytest.StashKey[tuple[Case, Peer]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("beit_fast benchmarks")
    group.addoption("--full", action="store_true", help="every size and every peer; takes long, mostly on a CPU")
    group.addoption(
        "--device",
        choices=("cpu", "cuda"),
        default=None,
        help="where to measure (cuda where there is one, else cpu)",
    )
    group.addoption(
        "--require-peers",
        action="store_true",
        help="whole models with every peer, on all that targets ask for; fails where a peer is not installed",
    )
    group.addoption("--rows", type=Path, metavar="FILE.jsonl", help="write each measurement here as soon as it is done")
    group.addoption("--budget", type=float, metavar="SECONDS", help="after this time the remaining tests are skipped")
    group.addoption("--commit", help="what was measured, where this folder is no git checkout that would tell")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    if not config.pluginmanager.hasplugin("benchmark"):
        raise pytest.UsageError("benchmarks need pytest-benchmark: pip install 'beit-fast[bench]'")
    if chosen_device(config.option.device) == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: torch finds no CUDA device")
    if config.option.require_peers:
        _require_peers(chosen_device(config.option.device))
    config.option.benchmark_quiet = True  # the table below says more
    conditions = environment(chosen_device(config.option.device))
    conditions["commit"] = config.option.commit or conditions["commit"]
    config.stash[_conditions] = conditions
    config.stash[_rows] = []
    config.stash[_log] = RowLog(config.option.rows, conditions) if config.option.rows else None
    config.stash[_started] = time.monotonic()


def _require_peers(device: str) -> None:
    if absent := not_installed(PACKAGES[device]):
        raise pytest.UsageError(
            f"--require-peers: not installed: {', '.join(absent)}. "
            "pip install 'beit-fast[bench]' has all but timm, for which pip install --no-deps timm is enough"
        )


def pytest_report_header(config: pytest.Config) -> list[str]:
    conditions = config.stash[_conditions]
    lines = [f"measured on: {conditions['device_name']}, {conditions['threads']} threads, {conditions['system']}"]
    names = ("torch", "cuda", "triton", "transformers", "beit_fast", "commit", "python")
    lines.append("with: " + ", ".join(f"{name} {conditions[name] or 'none'}" for name in names))
    if conditions["gpu"]:
        lines.append("gpu: " + ", ".join(f"{name} {value or 'unknown'}" for name, value in conditions["gpu"].items()))
    reason = memory_unsupported_reason(chosen_device(config.option.device))
    return lines + ([f"peak memory is not measured: {reason}"] if reason else [])


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info["beit_fast"] = config.stash[_conditions]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        clock = clock_of(chosen_device(config.option.device))
        item.add_marker(pytest.mark.benchmark(timer=clock, disable_gc=True))
    items.sort(key=_long_compilation)


def _long_compilation(item: pytest.Item) -> str:
    """Sorts what compiles for long to the end, one peer after the other: it is what a budget should cut."""
    callspec = getattr(item, "callspec", None)  # only parametrised tests have one
    peer = callspec.params.get("peer") if callspec is not None else None
    return peer.name if peer is not None and peer.compiles else ""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    log = item.config.stash[_log]
    if log is not None and call.excinfo is not None and _entry in item.stash:
        case, peer = item.stash[_entry]
        reason = " ".join(str(call.excinfo.value).removeprefix(f"{peer.name}: ").split())
        log.left_out(str(case), peer.name, reason[:500] or call.excinfo.typename)
    return report


@pytest.fixture
def race(benchmark: Any, request: pytest.FixtureRequest) -> Iterator[Callable[[Case, Peer], None]]:
    """Check one peer on one case against fp64, then time it; what is wrong fails and gets no time."""
    stash = request.config.stash
    clock: HostClock | DeviceClock = request.node.get_closest_marker("benchmark").kwargs["timer"]

    def run(case: Case, peer: Peer) -> None:
        request.node.stash[_entry] = case, peer
        _skip_missing(case, peer, request.config)
        if peer.compiles:
            torch.compiler.reset()
        inputs = draw(case)
        attention = peer.build(case, inputs)
        errors = _checked_errors(case, peer, results_of(case, inputs, attention, peer.biased))
        step = step_of(case, inputs, attention, peer.biased)
        facts = benchmark.extra_info
        facts.update(_facts(case, peer), errors=errors, clock=clock.meaning)
        benchmark.group = str(case)
        iterations, rounds = clock.plan(step)
        benchmark.pedantic(step, rounds=rounds, iterations=iterations, warmup_rounds=1)
        if benchmark.stats is None:  # --benchmark-disable: the check alone was asked for
            return
        facts.update(
            queued_ahead=clock.queued_ahead,
            sm_clock_mhz=_sm_clock(case),
            single_call=single_call(step, case.device) if case.device == "cuda" else None,
            peak_memory=peak_memory(step, case.device),
            tflops=case.flops / benchmark.stats.stats.median / 1e12,
        )
        times = benchmark.stats.stats
        stats = {"median": times.median, "iqr": times.iqr, "rounds": times.rounds, "iterations": iterations}
        stash[_rows].append({**facts, **stats})
        if (log := stash[_log]) is not None:
            log.measured(row_of(facts, stats))

    yield run
    gc.collect()
    gc.freeze()  # or every collection goes through all that torch and Transformers hold, hundreds of times


def _skip_missing(case: Case, peer: Peer, config: pytest.Config) -> None:
    _skip_late(peer.name, config)
    reason = peer.why_missing(case)
    if reason is None and peer.compiles and case.device == "cpu" and not config.getoption("full"):
        reason = "compiles for long on a CPU: measured with --full"
    if reason is not None:
        pytest.skip(f"{peer.name}: {reason}")


def _skip_late(name: str, config: pytest.Config) -> None:
    budget = config.getoption("budget")
    if budget is not None and time.monotonic() - config.stash[_started] > budget:
        pytest.skip(f"{name}: the run's budget of {budget:g} seconds is spent")


@pytest.fixture
def race_apart(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Race entrants in processes of their own, in turns; who is wrong gets no time and fails the test at the end.

    Args: the bench, the case's name, threads, the entrants, the facts of every row, and who is missing and why. What an
    entrant's `prepare` tells is added to its row: its kernel and its errors at least. `flops` become `tflops`, and what
    `per_call` counts in a call becomes a rate under its name. Entrants that need more memory together than there is
    are raced in several heats, each with the first of them, and rows say which. `rules` are those of `race`.
    """
    stash = request.config.stash

    def run(
        bench: str,
        case: str,
        threads: int,
        entrants: Sequence[Entrant],
        facts: dict[str, Any],
        missing: Mapping[str, str] = MappingProxyType({}),
        *,
        device: str = "cpu",
        per_call: Mapping[str, float] = MappingProxyType({}),
        **rules: Any,
    ) -> None:
        _skip_late(case, request.config)
        log = stash[_log]
        wrong = {}
        groups, too_large = heats(entrants, free_memory(device))
        missing = {**missing, **too_large}
        for number, group in enumerate(groups, start=1):
            heat = {"heat": number} if len(groups) > 1 else {}
            for result in race_processes(group, threads=threads, memory=True, **rules):
                if result.failure is not None:
                    wrong[result.name] = result.failure
                elif result.absent is not None:
                    missing[result.name] = result.absent
                else:
                    row = {"bench": bench, "threads": threads, "case": case, **heat, **facts}
                    row |= row_of_result(result, per_call, row.get("flops"))
                    stash[_rows].append(row)
                    if log is not None:
                        log.measured(rounded(row))
        for name, reason in {**missing, **wrong}.items() if log is not None else ():
            log.left_out(case, name, reason[:500], bench)
        if wrong:
            pytest.fail("; ".join(f"{name}: {reason}" for name, reason in wrong.items()), pytrace=False)
        if missing:
            pytest.skip("; ".join(f"{name}: {reason}" for name, reason in missing.items()))

    return run


@functools.lru_cache(maxsize=1)
def _sm_clock(case: Case) -> int | None:
    """MHz, right after the first peer of a case was timed."""
    if case.device != "cuda":
        return None
    clock = gpu_readings(case.device, ("clocks.sm",))["clocks.sm"]
    return int(clock) if clock is not None else None


def _checked_errors(case: Case, peer: Peer, results: dict[str, torch.Tensor]) -> dict[str, float]:
    errors, wrong = errors_within(results, reference(case, peer.biased))
    if wrong:
        pytest.fail(f"{peer.name} is wrong on {case} and was not timed. " + "; ".join(wrong), pytrace=False)
    return errors


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
        "learnable": peer.learnable,
        "kernel": peer.kernel(case),
        "least_bytes": case.least_bytes(peer.biased),
        "flops": case.flops,
    }


_TABLE_HEAD = (
    f"{'peer':48}{'kernel':24}{'median ms':>12}{'iqr ms':>9}{'1 call ms':>11}{'TFLOP/s':>9}{'images/s':>10}"
    f"{'peak MiB':>10}{'worst error':>13}"
)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    rows = config.stash[_rows]
    for case in dict.fromkeys(row["case"] for row in rows):
        terminalreporter.section(case, sep="-")
        terminalreporter.write_line(_TABLE_HEAD)
        for row in sorted((row for row in rows if row["case"] == case), key=lambda row: row["median"]):
            terminalreporter.write_line(_table_line(row))
    if any(row.get("queued_ahead") is False for row in rows):
        terminalreporter.write_line("* the device had to wait for the host, so the median holds time of the host too")


def _table_line(row: dict[str, Any]) -> str:
    memory = "-" if row["peak_memory"] is None else f"{row['peak_memory'] / 2**20:.1f}"
    single = f"{row['single_call'] * 1e3:.3f}" if row.get("single_call") is not None else "-"
    name = row["peer"] if row.get("biased", True) else row["peer"] + " (another result)"
    waited = "*" if row.get("queued_ahead") is False else " "
    speed = f"{row['tflops']:.3f}" if "tflops" in row else "-"
    images = f"{row['images_per_second']:.1f}" if "images_per_second" in row else "-"
    return (
        f"{name:48}{row['kernel']:24}{row['median'] * 1e3:11.3f}{waited}{row['iqr'] * 1e3:9.3f}{single:>11}"
        f"{speed:>9}{images:>10}{memory:>10}{max(row['errors'].values()):13.1e}"
    )
