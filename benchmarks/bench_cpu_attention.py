"""Attention on a CPU, each baseline in its own process: `pytest benchmarks/bench_cpu_attention.py`."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from .baselines.attention import BASELINES
from .harness.cases import (
    DTYPE_NAMES,
    FORWARD,
    TRAINING,
    Case,
    Reference,
    checked_errors,
    chosen_device,
    draw,
    reference,
    results_of,
    step_of,
)
from .harness.processes import Prepared, Worker

BENCH = "cpu attention"
OURS, READY, LIMIT = "beit_fast triton", "sdpa prebuilt bias", "sdpa without bias"
COMPARED = {
    FORWARD: (OURS, READY, "transformers sdpa", LIMIT),
    TRAINING: (OURS, "beit_fast sdpa", "transformers sdpa", LIMIT),
}
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}

# mode, dtype, ((batch, side of the window), ...), threads
_QUICK = (
    (FORWARD, "fp32", ((1, 14), (1, 32)), (1,)),
    (FORWARD, "bf16", ((1, 24),), (1,)),
    (TRAINING, "fp32", ((1, 24),), (1,)),
)
_FULL = (
    *((FORWARD, dtype, ((1, 14), (8, 14), (1, 24), (1, 32), (1, 40)), (1, 2)) for dtype in ("fp32", "bf16", "fp16")),
    (TRAINING, "fp32", ((1, 24), (1, 32)), (1, 2)),
    (TRAINING, "bf16", ((1, 24), (1, 32)), (1, 2)),
    (TRAINING, "fp32", ((1, 40),), (1,)),
)


def runs(full: bool) -> list[tuple[Case, int]]:
    """List the cases with their numbers of threads: a quick set of under a minute, or every size."""
    return [
        (Case(mode, batch, (side, side), DTYPES[dtype], "cpu"), threads)
        for mode, dtype, shapes, counts in (_FULL if full else _QUICK)
        for (batch, side), threads in itertools.product(shapes, counts)
    ]


def run_name(case: Case, threads: int) -> str:
    return f"{case}-{threads}-thread{'s' if threads > 1 else ''}"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    options = metafunc.config.option
    drawn = runs(options.full) if chosen_device(options.device) == "cpu" else []
    metafunc.parametrize(("case", "threads"), drawn, ids=[run_name(*one) for one in drawn])


def test_cpu_attention(case: Case, threads: int, time_workers: Callable[..., None], tmp_path: Path) -> None:
    baselines = [baseline for baseline in BASELINES if baseline.name in COMPARED[case.mode]]
    missing = {baseline.name: reason for baseline in baselines if (reason := baseline.missing_reason(case)) is not None}
    taking_part = [baseline for baseline in baselines if baseline.name not in missing]
    files = {
        biased: str(_write_reference(case, biased, tmp_path))
        for biased in {baseline.biased for baseline in taking_part}
    }
    workers = [
        Worker(baseline.name, prepare, {**_plain(case), "baseline": baseline.name, "expected": files[baseline.biased]})
        for baseline in taking_part
    ]
    facts = {**_plain(case), "flops": case.flops}
    time_workers(BENCH, run_name(case, threads), threads, workers, facts, missing)


def prepare(
    baseline: str,
    expected: str,
    mode: str,
    batch: int,
    window: list[int],
    dtype: str,
    heads: int,
    head_dim: int,
    tokens: int,
) -> Prepared:
    """Check a baseline against the reference and return its step.

    Args:
        baseline: Its name.
        expected: File with the reference.
        mode: This and the others are fields of the Case.

    Raises:
        ValueError: If a result exceeds its error budget.
    """
    case = Case(mode, batch, (window[0], window[1]), DTYPES[dtype], "cpu", heads, head_dim)
    chosen = next(one for one in BASELINES if one.name == baseline)
    inputs = draw(case)
    attention = chosen.build(case, inputs)
    results = results_of(case, inputs, attention, chosen.biased)
    errors = checked_errors(results, Reference(**torch.load(expected, mmap=True)))
    facts = {"kernel": chosen.kernel(case), "biased": chosen.biased, "learnable": chosen.learnable, "errors": errors}
    return Prepared(step_of(case, inputs, attention, chosen.biased), facts)


def _plain(case: Case) -> dict[str, Any]:
    return {
        "mode": case.mode,
        "batch": case.batch,
        "tokens": case.tokens,
        "window": list(case.window),
        "heads": case.heads,
        "head_dim": case.head_dim,
        "dtype": DTYPE_NAMES[case.dtype],
    }


def _write_reference(case: Case, biased: bool, folder: Path) -> Path:
    path = folder / f"reference-{biased}.pt"
    torch.save(vars(reference(case, biased)), path)
    return path
