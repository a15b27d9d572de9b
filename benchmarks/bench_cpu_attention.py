"""Attention on a CPU, every peer in a process of its own and in turns: `pytest benchmarks/bench_cpu_attention.py`."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from .baselines.attention import PEERS
from .harness.cases import (
    DTYPE_NAMES,
    FORWARD,
    TRAINING,
    Case,
    Reference,
    chosen_device,
    draw,
    errors_within,
    reference,
    results_of,
    step_of,
)
from .harness.processes import Entrant, Prepared

BENCH = "cpu attention"
OURS, READY, LIMIT = "beit_fast triton", "sdpa prebuilt bias", "sdpa without bias"
RACING = {
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


def races(full: bool) -> list[tuple[Case, int]]:
    """The cases of a run, each with its number of threads: a quick set of under a minute, or every size."""
    return [
        (Case(mode, batch, (side, side), DTYPES[dtype], "cpu"), threads)
        for mode, dtype, shapes, counts in (_FULL if full else _QUICK)
        for (batch, side), threads in itertools.product(shapes, counts)
    ]


def race_name(case: Case, threads: int) -> str:
    return f"{case}-{threads}-thread{'s' if threads > 1 else ''}"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    options = metafunc.config.option
    drawn = races(options.full) if chosen_device(options.device) == "cpu" else []
    metafunc.parametrize(("case", "threads"), drawn, ids=[race_name(*one) for one in drawn])


def test_cpu_attention(case: Case, threads: int, race_apart: Callable[..., None], tmp_path: Path) -> None:
    peers = [peer for peer in PEERS if peer.name in RACING[case.mode]]
    missing = {peer.name: reason for peer in peers if (reason := peer.why_missing(case)) is not None}
    taking_part = [peer for peer in peers if peer.name not in missing]
    files = {biased: str(_write_reference(case, biased, tmp_path)) for biased in {peer.biased for peer in taking_part}}
    entrants = [
        Entrant(peer.name, prepare, {**_plain(case), "peer": peer.name, "expected": files[peer.biased]})
        for peer in taking_part
    ]
    facts = {**_plain(case), "flops": case.flops}
    race_apart(BENCH, race_name(case, threads), threads, entrants, facts, missing)


def prepare(
    peer: str,
    expected: str,
    mode: str,
    batch: int,
    window: list[int],
    dtype: str,
    heads: int,
    head_dim: int,
    tokens: int,
) -> Prepared:
    """A peer's step on the case that the other arguments are, its results compared with those in the file `expected`.

    Raises:
        ValueError: a result is not within its budget.
    """
    case = Case(mode, batch, (window[0], window[1]), DTYPES[dtype], "cpu", heads, head_dim)
    chosen = next(one for one in PEERS if one.name == peer)
    inputs = draw(case)
    attention = chosen.build(case, inputs)
    errors, wrong = errors_within(
        results_of(case, inputs, attention, chosen.biased), Reference(**torch.load(expected, mmap=True))
    )
    if wrong:
        raise ValueError(f"wrong and not timed. {'; '.join(wrong)}")
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
