"""Who fills the tables of Transformers' BEiT page: each implementation once, what is timed, and who is refused."""

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
from beit_fast.testing.memory import loaded_memory

from ..harness.cases import Reference, errors_within
from ..harness.hf_docs_cases import PageCase, page_reference, pixels_of
from ..harness.model_cases import DTYPES, by_kind, our_model
from ..harness.processes import Entrant, Prepared
from ..report.hf_docs_tables import BENCHES, EAGER, OPTIMIZED, SDPA, TRITON
from .attention import not_installed
from .models import transformers_model


@dataclass(frozen=True)
class PagePeer:
    """One implementation. scores: matrices `[B, H, N, N]` that a layer of it keeps for its backward, about."""

    name: str
    build: Callable[[PageCase], nn.Module]
    kernel: Callable[[PageCase], str]
    packages: tuple[str, ...] = ()
    scores: int = 0

    def why_missing(self, case: PageCase) -> str | None:
        """The reason why it takes no part in `case`, or None."""
        if absent := not_installed(self.packages):
            return f"not installed: {', '.join(absent)} (pip install 'beit-fast[bench]')"
        if self.name == OPTIMIZED:
            if case.trains:
                return "is for inference"
            if not hasattr(beit_fast, "optimize_for_inference"):
                return f"beit_fast {beit_fast.__version__} has no optimize_for_inference"
        return None


def _triton_kernel(case: PageCase) -> str:
    size = case.native.size
    return attention.kernel_name("triton", case.device, DTYPES[case.dtype], size.width // size.heads)


def _transformers(implementation: str, scores: int) -> PagePeer:
    return PagePeer(
        f"transformers {implementation}",
        lambda case: transformers_model(case.native, implementation, DTYPES[case.dtype]),
        lambda case: implementation,
        ("transformers",),
        scores,
    )


def _optimized(case: PageCase) -> nn.Module:
    model = our_model(case.native, "triton", torch.float32)
    options = {"dtype": DTYPES[case.dtype], "example": pixels_of(case), "keep_original": False}
    return beit_fast.optimize_for_inference(model, **options)


PEERS = (
    _transformers("eager", 4),
    _transformers("sdpa", 3),
    PagePeer(TRITON, lambda case: our_model(case.native, "triton", DTYPES[case.dtype]), _triton_kernel),
    PagePeer(OPTIMIZED, _optimized, lambda case: f"{_triton_kernel(case)}, optimized"),
)
assert [peer.name for peer in PEERS] == [EAGER, SDPA, TRITON, OPTIMIZED]


def step_of(case: PageCase, model: nn.Module) -> Callable[[], Tensor]:
    """One call to logits: without a graph, or a training step, which leaves its gradients in place."""
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


def results_of(case: PageCase, model: nn.Module, step: Callable[[], Tensor]) -> dict[str, Tensor]:
    """What is compared: logits and, in training, the gradients by kind of parameter."""
    logits = step().float().cpu()
    if not case.trains:
        return {"logits": logits}
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    if without := [name for name, p in model.named_parameters() if p.grad is None]:
        raise ValueError(f"wrong and not timed. No gradient for {', '.join(without)}")
    kinds = by_kind(to_hub_names(gradients)[0])
    return {"logits": logits, **{kind: gradient.float().cpu() for kind, gradient in kinds.items()}}


def prepare(peer: str, expected: str, **fields: Any) -> Prepared:
    """A peer's call on the case that `fields` are, its results compared with those in the file `expected`.

    `memory_before` is what the process held before it had this model, with all libraries loaded by a tiny one.

    Raises:
        ValueError: a result is not within its budget.
    """
    case = PageCase(**fields)
    chosen = next(one for one in PEERS if one.name == peer)
    tiny = PageCase(**{**fields, "model": "tiny", "batch": 1, "height": 64, "width": 64})
    step_of(tiny, chosen.build(tiny))()
    memory_before = loaded_memory(case.device)
    model = chosen.build(case)
    step = step_of(case, model)
    errors, wrong = errors_within(results_of(case, model, step), Reference(**torch.load(expected, mmap=True)))
    if wrong:
        raise ValueError(f"wrong and not timed. {'; '.join(wrong)}")
    facts = {"kernel": chosen.kernel(case), "errors": errors, "memory_before": memory_before}
    return Prepared(step, facts, case.device)


def race_page(case: PageCase, race_apart: Callable[..., None], threads: int) -> None:
    """Race the implementations on one line of a table; each of its rounds is one call."""
    missing = {peer.name: why for peer in PEERS if (why := peer.why_missing(case)) is not None}
    with tempfile.TemporaryDirectory() as folder:
        expected = Path(folder) / "reference.pt"
        torch.save(vars(page_reference(case)), expected)
        arguments = {"expected": str(expected), **asdict(case)}
        entrants = [
            Entrant(peer.name, prepare, {"peer": peer.name, **arguments}, bytes_needed=case.bytes_needed(peer.scores))
            for peer in reversed(PEERS)  # the first is in every heat
            if peer.name not in missing
        ]
        facts = {**asdict(case), "tokens": case.tokens}
        rules = {"device": case.device, "rounds": case.steps, "round_seconds": 0.0}
        race_apart(BENCHES[case.device], str(case), threads, entrants, facts, missing, **rules)
