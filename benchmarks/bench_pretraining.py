"""BEiT's pre-training step, each baseline in its own process: `pytest benchmarks/bench_pretraining.py`.

Forward, loss, backward, clipping of gradients and AdamW of BEiT-base, in fp32 and under bf16 autocast.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from .baselines.pretraining import BASELINES, prepare
from .harness.cases import chosen_device
from .harness.pretraining_cases import BENCHES, PretrainingCase, pretraining_cases, pretraining_reference
from .harness.processes import Worker

ROUNDS = 5


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    metafunc.parametrize("case", pretraining_cases(chosen_device(metafunc.config.option.device)), ids=str)


def test_pretraining(case: PretrainingCase, time_workers: Callable[..., None]) -> None:
    run_pretraining(case, time_workers, torch.get_num_threads())


def run_pretraining(case: PretrainingCase, time_workers: Callable[..., None], threads: int) -> None:
    """Time the implementations on one case. A round has one step; the reference is a temporary file."""
    missing = {baseline.name: why for baseline in BASELINES if (why := baseline.missing_reason()) is not None}
    with tempfile.TemporaryDirectory() as folder:
        expected = Path(folder) / "reference.pt"
        torch.save(vars(pretraining_reference(case)), expected)
        workers = [
            Worker(
                baseline.name,
                prepare,
                {"baseline": baseline.name, "expected": str(expected), **asdict(case)},
                bytes_needed=baseline.bytes_needed(case),
            )
            for baseline in BASELINES
            if baseline.name not in missing
        ]
        rules: dict[str, Any] = {"rounds": ROUNDS, "round_seconds": 0.0, "per_call": {"images_per_second": case.batch}}
        facts = {**asdict(case), "tokens": case.tokens, "flops": case.flops}
        time_workers(BENCHES[case.device], str(case), threads, workers, facts, missing, device=case.device, **rules)
