"""The baselines of BEiT's pre-training step, all with the same weights, masks and labels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from beit_fast.checkpoint.key_mapping import to_hub_names
from beit_fast.ops.dispatch import attention

from ..harness.cases import Reference, checked_errors
from ..harness.model_cases import DTYPES, by_kind
from ..harness.pretraining_cases import MaskedImages, PretrainingCase, masked_images, our_masked_model, set_drop_path
from ..harness.processes import Prepared
from .attention import not_installed
from .transformers_model import fill

CLIP = 3.0
LEARNING_RATE, LEARNING_RATE_BATCH = 1.5e-3, 2048
OPTIMIZER = {"betas": (0.9, 0.98), "weight_decay": 0.05, "fused": True}
_PROCESS_BYTES = 450 << 20  # libraries


@dataclass(frozen=True)
class PretrainingBaseline:
    """One implementation.

    Attributes:
        name: Unique name.
        build: Builds the model of a case, for training.
        kernel: Returns the name of the attention kernel.
        packages: Packages that it needs.
        scores: Approximate matrices `[B, H, N, N]` that a layer keeps for its backward.
    """

    name: str
    build: Callable[[PretrainingCase], nn.Module]
    kernel: Callable[[PretrainingCase], str]
    packages: tuple[str, ...] = ()
    scores: int = 0

    def missing_reason(self) -> str | None:
        """Return why it cannot run, or None."""
        absent = not_installed(self.packages)
        return f"not installed: {', '.join(absent)} (pip install 'beit-fast[bench]')" if absent else None

    def bytes_needed(self, case: PretrainingCase) -> int:
        """Estimate the bytes of its process: weights, gradients, two moments, activations and logits."""
        size = case.size
        weights = 4 * sum(weight.numel() for weight in case.parameters.values())
        tokens = 24 * case.batch * case.tokens * size.width * 4
        matrices = self.scores * case.batch * size.heads * case.tokens**2 * 4
        return _PROCESS_BYTES + 5 * weights + size.layers * (tokens + matrices)


def _kernel(case: PretrainingCase) -> str:
    return attention.kernel_name("triton", case.device, DTYPES[case.dtype], case.size.width // case.size.heads)


def _transformers(implementation: str, scores: int) -> PretrainingBaseline:
    def build(case: PretrainingCase) -> nn.Module:
        from transformers import BeitConfig, BeitForMaskedImageModeling

        model = BeitForMaskedImageModeling(BeitConfig(**case.options, attn_implementation=implementation))
        fill(model, case.parameters)
        return model.to(case.device).train()

    return PretrainingBaseline(
        f"transformers {implementation}", build, lambda case: implementation, ("transformers",), scores
    )


BASELINES = (
    PretrainingBaseline("beit_fast triton", lambda case: our_masked_model(case, "triton"), _kernel),
    _transformers("sdpa", 3),
    _transformers("eager", 4),
)


def prepare(baseline: str, expected: str, **fields: Any) -> Prepared:
    """Check a baseline against the reference and return its step. Drop path is off in the check only.

    Args:
        baseline: Its name.
        expected: File with the reference.
        fields: Fields of the PretrainingCase.

    Raises:
        ValueError: If a result exceeds its error budget.
    """
    case = PretrainingCase(**fields)
    chosen = next(one for one in BASELINES if one.name == baseline)
    model, batch = chosen.build(case), masked_images(case)
    rates = set_drop_path(model, 0.0)
    results = results_of(case, model, batch)
    errors = checked_errors(results, Reference(**torch.load(expected, mmap=True)))
    set_drop_path(model, rates)
    facts = {"kernel": chosen.kernel(case), "errors": errors, "loss": results["loss"].item()}
    return Prepared(step_of(case, model, batch), facts, case.device)


def results_of(case: PretrainingCase, model: nn.Module, batch: MaskedImages) -> dict[str, Tensor]:
    """Return logits, loss, and gradients by kind of parameter.

    Raises:
        ValueError: If a parameter does not get a gradient.
    """
    output = _output(case, model, batch)
    output.loss.backward()
    if without := [name for name, p in model.named_parameters() if p.grad is None]:
        raise ValueError(f"wrong and not timed. No gradient for {', '.join(without)}")
    kinds = by_kind(to_hub_names({name: p.grad for name, p in model.named_parameters()})[0])
    model.zero_grad(set_to_none=True)
    outputs = {"logits": output.logits, "loss": output.loss}
    return {name: result.detach().float().cpu() for name, result in {**outputs, **kinds}.items()}


def step_of(case: PretrainingCase, model: nn.Module, batch: MaskedImages) -> Callable[[], Tensor]:
    """Return the timed function: forward, loss, backward, clipping of gradients and AdamW."""
    rate = LEARNING_RATE * case.batch / LEARNING_RATE_BATCH
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, **OPTIMIZER)

    def step() -> Tensor:
        loss = _output(case, model, batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def _output(case: PretrainingCase, model: nn.Module, batch: MaskedImages) -> Any:
    with torch.autocast(case.device, torch.bfloat16, enabled=case.dtype != "fp32"):
        return model(batch.pixels, bool_masked_pos=batch.mask, labels=batch.labels)
