"""Attention alone, forward and training step, with every baseline: `pytest benchmarks/bench_attention.py`."""

from __future__ import annotations

import functools
import gc
from typing import Any

import pytest
import torch

from beit_fast.cli.collect_env import gpu_readings
from beit_fast.tuning.timer import DeviceClock, HostClock, single_call

from .baselines.attention import BASELINES, Baseline
from .harness.cases import DTYPE_NAMES, Case, cases, checked_errors, chosen_device, draw, reference, results_of, step_of
from .harness.memory import peak_memory
from .harness.results import row_of
from .harness.session import Session


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    options = metafunc.config.option
    metafunc.parametrize("case", cases(chosen_device(options.device), options.full), ids=str)
    metafunc.parametrize("baseline", BASELINES, ids=lambda baseline: baseline.name.replace(" ", "-"))


def test_attention(
    case: Case,
    baseline: Baseline,
    benchmark: Any,
    clock: HostClock | DeviceClock,
    session: Session,
    request: pytest.FixtureRequest,
) -> None:
    time_baseline(case, baseline, benchmark, clock, session, request.config.option.full)


def time_baseline(
    case: Case, baseline: Baseline, benchmark: Any, clock: HostClock | DeviceClock, session: Session, full: bool
) -> None:
    """Check a baseline against fp64 on one case, then time it.

    Args:
        case: Shape, dtype, device and mode.
        baseline: The implementation.
        benchmark: Fixture of pytest-benchmark, whose timer is `clock`.
        clock: Chooses the number of calls and rounds.
        session: Receives the row, or the reason why there is none.
        full: Whether to time baselines that compile for long on a CPU.
    """
    reason = session.over_budget() or baseline.missing_reason(case)
    if reason is None and baseline.compiles and case.device == "cpu" and not full:
        reason = "compiles for long on a CPU: measured with --full"
    if reason is not None:
        session.leave_out(str(case), baseline.name, reason)
        pytest.skip(f"{baseline.name}: {reason}")
    try:
        _check_and_time(case, baseline, benchmark, clock, session)
    except Exception as error:
        session.leave_out(str(case), baseline.name, " ".join(str(error).split()) or type(error).__name__)
        raise
    finally:
        gc.collect()
        gc.freeze()  # otherwise each collection visits all objects of torch and Transformers, hundreds of times


def _check_and_time(
    case: Case, baseline: Baseline, benchmark: Any, clock: HostClock | DeviceClock, session: Session
) -> None:
    if baseline.compiles:
        torch.compiler.reset()
    inputs = draw(case)
    attention = baseline.build(case, inputs)
    results = results_of(case, inputs, attention, baseline.biased)
    errors = checked_errors(results, reference(case, baseline.biased))
    step = step_of(case, inputs, attention, baseline.biased)
    facts = benchmark.extra_info
    facts.update(_facts(case, baseline), errors=errors, clock=clock.meaning)
    benchmark.group = str(case)
    iterations, rounds = clock.plan(step)
    benchmark.pedantic(step, rounds=rounds, iterations=iterations, warmup_rounds=1)
    if benchmark.stats is None:  # --benchmark-disable: only the check was requested
        return
    times = benchmark.stats.stats
    facts.update(
        queued_ahead=clock.queued_ahead,
        sm_clock_mhz=_sm_clock(case),
        single_call=single_call(step, case.device) if case.device == "cuda" else None,
        peak_memory=peak_memory(step, case.device),
        tflops=case.flops / times.median / 1e12,
    )
    stats = {"median": times.median, "iqr": times.iqr, "rounds": times.rounds, "iterations": iterations}
    session.add({**facts, **stats}, row_of(facts, stats))


@functools.lru_cache(maxsize=1)
def _sm_clock(case: Case) -> int | None:
    """MHz, read right after the first baseline of a case was timed."""
    if case.device != "cuda":
        return None
    clock = gpu_readings(case.device, ("clocks.sm",))["clocks.sm"]
    return int(clock) if clock is not None else None


def _facts(case: Case, baseline: Baseline) -> dict[str, Any]:
    return {
        "case": str(case),
        "mode": case.mode,
        "batch": case.batch,
        "tokens": case.tokens,
        "window": list(case.window),
        "heads": case.heads,
        "head_dim": case.head_dim,
        "dtype": DTYPE_NAMES[case.dtype],
        "baseline": baseline.name,
        "what": baseline.what,
        "biased": baseline.biased,
        "learnable": baseline.learnable,
        "kernel": baseline.kernel(case),
        "least_bytes": case.least_bytes(baseline.biased),
        "flops": case.flops,
    }
