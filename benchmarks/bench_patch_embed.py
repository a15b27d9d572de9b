"""Pixels to tokens on a CPU, each baseline in its own process: `pytest benchmarks/bench_patch_embed.py`.

The timed function returns tokens `[B, 1 + P, E]`: the projection with CLS before it. For uint8 pixels it includes the
normalization and the position embeddings.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from beit_fast.ops.dispatch import availability

from .baselines.patch_embed import BASELINES, OURS
from .harness.cases import Reference, checked_errors, chosen_device
from .harness.patch_cases import PatchCase, draw, reference
from .harness.processes import Prepared, Worker

BENCH = "cpu patch embedding"


def runs(full: bool) -> list[tuple[PatchCase, int]]:
    """List the cases with their numbers of threads: a quick set of under a minute, or all."""
    dtypes, batches, counts = (("fp32", "bf16", "fp16"), (1, 8), (1, 2)) if full else (("fp32", "bf16"), (1,), (1,))
    return [
        (PatchCase(mode, batch, dtype), threads)
        for mode, dtype, batch, threads in itertools.product(BASELINES, dtypes, batches, counts)
    ]


def run_name(case: PatchCase, threads: int) -> str:
    return f"{case}-{threads}-thread{'s' if threads > 1 else ''}"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    options = metafunc.config.option
    drawn = runs(options.full) if chosen_device(options.device) == "cpu" else []
    metafunc.parametrize(("case", "threads"), drawn, ids=[run_name(*one) for one in drawn])


def test_patch_embed(case: PatchCase, threads: int, time_workers: Callable[..., None], tmp_path: Path) -> None:
    file = tmp_path / "reference.pt"
    torch.save(vars(reference(case)), file)
    workers = [
        Worker(baseline, prepare, {"baseline": baseline, "expected": str(file), **asdict(case)})
        for baseline in BASELINES[case.mode]
    ]
    facts = {**asdict(case), "tokens": 1 + case.patches, "flops": case.flops}
    time_workers(BENCH, run_name(case, threads), threads, workers, facts)


def prepare(baseline: str, expected: str, **fields: Any) -> Prepared:
    """Check a baseline against the reference and return its step.

    Args:
        baseline: Its name.
        expected: File with the reference.
        fields: Fields of the PatchCase.

    Raises:
        ValueError: If the tokens exceed their error budget.
    """
    case = PatchCase(**fields)
    inputs = draw(case)
    embed = BASELINES[case.mode][baseline](inputs)
    with torch.no_grad():
        tokens = embed()
    errors = checked_errors({"tokens": tokens}, Reference(**torch.load(expected, mmap=True)))
    kernel = (
        "torch" if baseline != OURS else availability.patch_embed_kernel(tokens.device, [tokens.dtype], case.channels)
    )

    def step() -> Tensor:
        with torch.no_grad():
            return embed()

    return Prepared(step, {"kernel": kernel, "errors": errors})
