"""The baselines of the tables in Transformers' documentation of BEiT."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import beit_fast
from beit_fast.checkpoint.key_mapping import to_hub_names
from beit_fast.ops.dispatch import attention

from ..harness.cases import Reference, checked_errors
from ..harness.hf_docs_cases import BENCHES, OPTIMIZED, TRITON, HfDocsCase, hf_docs_reference, pixels_of
from ..harness.memory import loaded_memory
from ..harness.model_cases import DTYPES, by_kind, our_model
from ..harness.processes import Prepared, Worker
from .attention import not_installed
from .transformers_model import transformers_model


@dataclass(frozen=True)
class HfDocsBaseline:
    """One implementation.

    Attributes:
        name: Unique name.
        build: Builds the model of a case.
        kernel: Returns the name of the kernel that runs.
        packages: Packages that it needs.
        scores: Approximate matrices `[B, H, N, N]` that a layer keeps for its backward.
    """

    name: str
    build: Callable[[HfDocsCase], nn.Module]
    kernel: Callable[[HfDocsCase], str]
    packages: tuple[str, ...] = ()
    scores: int = 0

    def missing_reason(self, case: HfDocsCase) -> str | None:
        """Return why it cannot run a case, or None."""
        if absent := not_installed(self.packages):
            return f"not installed: {', '.join(absent)} (pip install 'beit-fast[bench]')"
        return "supports inference only" if self.name == OPTIMIZED and case.trains else None


def _triton_kernel(case: HfDocsCase) -> str:
    size = case.native.size
    return attention.kernel_name("triton", case.device, DTYPES[case.dtype], size.width // size.heads)


def _transformers(implementation: str, scores: int) -> HfDocsBaseline:
    return HfDocsBaseline(
        f"transformers {implementation}",
        lambda case: transformers_model(case.native, implementation, DTYPES[case.dtype]),
        lambda case: implementation,
        ("transformers",),
        scores,
    )


def _optimized(case: HfDocsCase) -> nn.Module:
    model = our_model(case.native, "triton", torch.float32)
    options = {"dtype": DTYPES[case.dtype], "example": pixels_of(case), "keep_original": False}
    return beit_fast.optimize_for_inference(model, **options)


BASELINES = (
    _transformers("eager", 4),
    _transformers("sdpa", 3),
    HfDocsBaseline(TRITON, lambda case: our_model(case.native, "triton", DTYPES[case.dtype]), _triton_kernel),
    HfDocsBaseline(OPTIMIZED, _optimized, lambda case: f"{_triton_kernel(case)}, optimized"),
)


def step_of(case: HfDocsCase, model: nn.Module) -> Callable[[], Tensor]:
    """Return the timed function: logits without a graph, or a training step that keeps its gradients."""
    pixels = pixels_of(case)

    def infer() -> Tensor:
        with torch.no_grad():
            return model(pixels).logits

    def train() -> Tensor:
        model.zero_grad()
        logits = model(pixels).logits
        logits.sum().backward()
        return logits.detach()

    return train if case.trains else infer


def results_of(case: HfDocsCase, model: nn.Module, step: Callable[[], Tensor]) -> dict[str, Tensor]:
    """Return logits and, in training, gradients by kind of parameter.

    Raises:
        ValueError: If a parameter does not get a gradient.
    """
    logits = step().float().cpu()
    if not case.trains:
        return {"logits": logits}
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    if without := [name for name, p in model.named_parameters() if p.grad is None]:
        raise ValueError(f"wrong and not timed. No gradient for {', '.join(without)}")
    kinds = by_kind(to_hub_names(gradients)[0])
    return {"logits": logits, **{kind: gradient.float().cpu() for kind, gradient in kinds.items()}}


def prepare(baseline: str, expected: str, **fields: Any) -> Prepared:
    """Check a baseline against the reference and return its step.

    A tiny model loads all libraries first. `memory_before` is the memory of the process at that point.

    Args:
        baseline: Its name.
        expected: File with the reference.
        fields: Fields of the HfDocsCase.

    Raises:
        ValueError: If a result exceeds its error budget.
    """
    case = HfDocsCase(**fields)
    chosen = next(one for one in BASELINES if one.name == baseline)
    tiny = HfDocsCase(**{**fields, "model": "tiny", "batch": 1, "height": 64, "width": 64})
    step_of(tiny, chosen.build(tiny))()
    memory_before = loaded_memory(case.device)
    model = chosen.build(case)
    step = step_of(case, model)
    errors = checked_errors(results_of(case, model, step), Reference(**torch.load(expected, mmap=True)))
    facts = {"kernel": chosen.kernel(case), "errors": errors, "memory_before": memory_before}
    return Prepared(step, facts, case.device)


def run_hf_docs(case: HfDocsCase, time_workers: Callable[..., None], threads: int) -> None:
    """Time the implementations on one line of a table. A round has one call."""
    missing = {baseline.name: why for baseline in BASELINES if (why := baseline.missing_reason(case)) is not None}
    with tempfile.TemporaryDirectory() as folder:
        expected = Path(folder) / "reference.pt"
        torch.save(vars(hf_docs_reference(case)), expected)
        arguments = {"expected": str(expected), **asdict(case)}
        workers = [
            Worker(
                baseline.name,
                prepare,
                {"baseline": baseline.name, **arguments},
                bytes_needed=case.bytes_needed(baseline.scores),
            )
            for baseline in reversed(BASELINES)  # ours first, to be in every group
            if baseline.name not in missing
        ]
        facts = {**asdict(case), "tokens": case.tokens}
        rules = {"device": case.device, "rounds": case.steps, "round_seconds": 0.0}
        time_workers(BENCHES[case.device], str(case), threads, workers, facts, missing, **rules)
