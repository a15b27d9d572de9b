"""Whole models, each baseline in its own process: `pytest benchmarks/bench_model.py`.

Latency, throughput and memory of BEiT-base and BEiT-large with a relative position bias in each layer. All baselines
have the same weights.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from .baselines.exported import export
from .baselines.models import MODEL_BASELINES, ModelBaseline, call_of, logits_and_gradients
from .harness.cases import Reference, checked_errors, chosen_device
from .harness.model_cases import ModelCase, model_cases, model_reference, too_long_reason
from .harness.processes import Prepared, Worker, run_once
from .harness.session import ALL

BENCHES = {"cpu": "cpu models", "cuda": "models"}
ROUNDS, ROUND_SECONDS = 7, 0.25


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    options = metafunc.config.option
    drawn = model_cases(chosen_device(options.device), options.full, options.require_baselines)
    metafunc.parametrize("case", drawn, ids=str)


def test_model(case: ModelCase, time_workers: Callable[..., None], request: pytest.FixtureRequest) -> None:
    all_baselines = request.config.option.full or request.config.option.require_baselines
    run_model(case, time_workers, all_baselines, torch.get_num_threads())


def run_model(case: ModelCase, time_workers: Callable[..., None], all_baselines: bool, threads: int) -> None:
    """Time all available baselines of a case; the exported model and the reference are temporary files."""
    bench, facts = BENCHES[case.device], facts_of(case)
    rules = {"rounds": ROUNDS, "round_seconds": ROUND_SECONDS, "per_call": {"images_per_second": case.batch}}
    if (reason := too_long_reason(case)) is not None:
        time_workers(bench, str(case), threads, [], facts, {ALL: reason}, **rules)
        return
    missing = {
        baseline.name: why
        for baseline in MODEL_BASELINES
        if (why := baseline.missing_reason(case, all_baselines)) is not None
    }
    chosen = [baseline for baseline in MODEL_BASELINES if baseline.name not in missing]
    with tempfile.TemporaryDirectory() as folder:
        expected, exported = Path(folder) / "reference.pt", Path(folder) / "model.onnx"
        if any(baseline.exports for baseline in chosen):
            failure = run_once(export, {"path": str(exported), **asdict(case)}, threads).failure
            if failure is not None:
                missing |= {baseline.name: f"the export failed: {failure}" for baseline in chosen if baseline.exports}
                chosen = [baseline for baseline in chosen if not baseline.exports]
        torch.save(vars(model_reference(case)), expected)
        model_reference.cache_clear()
        if case.device == "cuda":
            torch.cuda.empty_cache()  # for the workers
        arguments = {"expected": str(expected), "exported": str(exported), "threads": threads, **asdict(case)}
        workers = [_worker(baseline, case, arguments) for baseline in chosen]
        time_workers(bench, str(case), threads, workers, facts, missing, device=case.device, **rules)


def facts_of(case: ModelCase) -> dict[str, Any]:
    return {**asdict(case), "tokens": case.tokens, "flops": case.flops}


def _worker(baseline: ModelBaseline, case: ModelCase, arguments: dict[str, Any]) -> Worker:
    return Worker(
        baseline.name, prepare, {"baseline": baseline.name, **arguments}, bytes_needed=baseline.bytes_needed(case)
    )


def prepare(baseline: str, expected: str, exported: str, threads: int, **fields: Any) -> Prepared:
    """Check a baseline against the reference and return its step.

    Args:
        baseline: Its name.
        expected: File with the reference.
        exported: File with the exported model.
        threads: Threads of the process.
        fields: Fields of the ModelCase.

    Raises:
        ValueError: If a result exceeds its error budget.
    """
    case = ModelCase(**fields)
    chosen = next(one for one in MODEL_BASELINES if one.name == baseline)
    network = chosen.build(case, threads, exported)
    results = logits_and_gradients(case, network)
    tolerance = chosen.tolerance if case.dtype == "fp32" else None
    errors = checked_errors(results, Reference(**torch.load(expected, mmap=True)), tolerance)
    return Prepared(call_of(case, network), {"kernel": network.kernel, "errors": errors}, case.device)
