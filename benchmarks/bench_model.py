"""The whole model, every peer in a process of its own and in turns: `pytest benchmarks/bench_model.py`.

Latency, throughput and memory of BEiT-base and -large with a relative position bias in each layer; every peer has the
same weights.
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
from .baselines.models import MODEL_PEERS, ModelPeer, call_of, logits_and_gradients
from .harness.cases import Reference, chosen_device, errors_within
from .harness.model_cases import ModelCase, model_cases, model_reference, why_too_long
from .harness.processes import Entrant, Prepared, apart

BENCHES = {"cpu": "cpu models", "cuda": "models"}
ROUNDS, ROUND_SECONDS = 7, 0.25
ALL = "every peer"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    options = metafunc.config.option
    drawn = model_cases(chosen_device(options.device), options.full, options.require_peers)
    metafunc.parametrize("case", drawn, ids=str)


def test_model(case: ModelCase, race_apart: Callable[..., None], request: pytest.FixtureRequest) -> None:
    every_peer = request.config.option.full or request.config.option.require_peers
    race_model(case, race_apart, every_peer, torch.get_num_threads())


def race_model(case: ModelCase, race_apart: Callable[..., None], every_peer: bool, threads: int) -> None:
    """Race all peers of a case that are installed; what is written for it on the way is removed at the end."""
    bench, facts = BENCHES[case.device], facts_of(case)
    rules = {"rounds": ROUNDS, "round_seconds": ROUND_SECONDS, "per_call": {"images_per_second": case.batch}}
    if (reason := why_too_long(case)) is not None:
        race_apart(bench, str(case), threads, [], facts, {ALL: reason}, **rules)
        return
    missing = {peer.name: why for peer in MODEL_PEERS if (why := peer.why_missing(case, every_peer)) is not None}
    racing = [peer for peer in MODEL_PEERS if peer.name not in missing]
    with tempfile.TemporaryDirectory() as folder:
        expected, exported = Path(folder) / "reference.pt", Path(folder) / "model.onnx"
        if any(peer.exports for peer in racing):
            failure = apart(export, {"path": str(exported), **asdict(case)}, threads).failure
            if failure is not None:
                missing |= {peer.name: f"the export failed: {failure}" for peer in racing if peer.exports}
                racing = [peer for peer in racing if not peer.exports]
        torch.save(vars(model_reference(case)), expected)
        model_reference.cache_clear()
        if case.device == "cuda":
            torch.cuda.empty_cache()  # other processes need it
        arguments = {"expected": str(expected), "exported": str(exported), "threads": threads, **asdict(case)}
        entrants = [_entrant(peer, case, arguments) for peer in racing]
        race_apart(bench, str(case), threads, entrants, facts, missing, device=case.device, **rules)


def facts_of(case: ModelCase) -> dict[str, Any]:
    return {**asdict(case), "tokens": case.tokens, "flops": case.flops}


def _entrant(peer: ModelPeer, case: ModelCase, arguments: dict[str, Any]) -> Entrant:
    return Entrant(peer.name, prepare, {"peer": peer.name, **arguments}, bytes_needed=peer.bytes_needed(case))


def prepare(peer: str, expected: str, exported: str, threads: int, **fields: Any) -> Prepared:
    """A peer's call on the case that `fields` are, its results compared with those in the file `expected`.

    Raises:
        ValueError: a result is not within its budget.
    """
    case = ModelCase(**fields)
    chosen = next(one for one in MODEL_PEERS if one.name == peer)
    network = chosen.build(case, threads, exported)
    results = logits_and_gradients(case, network)
    errors, wrong = errors_within(results, Reference(**torch.load(expected, mmap=True)))
    if chosen.tolerance is not None and case.dtype == "fp32":
        limit = chosen.tolerance
        wrong = [f"{name}: error {error:.1e}, at most {limit:.0e}" for name, error in errors.items() if error > limit]
    if wrong:
        raise ValueError(f"wrong and not timed. {'; '.join(wrong)}")
    return Prepared(call_of(case, network), {"kernel": network.kernel, "errors": errors}, case.device)
