"""Cases of the two benchmark tables in Transformers' documentation of BEiT.

The documentation times the classifier `beit-base-patch16-224`. It trains on images of 1048x640 pixels, for which the
bias tables are resized. A training step is forward, sum of the logits and backward, without an optimizer, as in the
scripts behind such tables in Transformers. Here the weights are random. Drop path is off, because implementations draw
different random numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from beit_fast.tuning.reference import error_budgets

from .cases import Reference
from .model_cases import DTYPES, INFERENCE, PATCH, TRAINING, ModelCase, by_kind, our_model, weight_bytes

BENCHES = {"cpu": "cpu hf docs", "cuda": "hf docs"}
EAGER, SDPA, TRITON, OPTIMIZED = "transformers eager", "transformers sdpa", "beit_fast triton", "beit_fast optimized"
NATIVE = 224
HF_DOCS_IMAGE = (1048, 640)
HF_DOCS_BATCHES = (1, 4, 16, 32)
HF_DOCS_STEPS = 50
_PROCESS_BYTES = 600 << 20


@dataclass(frozen=True)
class HfDocsCase:
    """A line of a table: `steps` timed calls of a model for 224 pixels on images `height` x `width`."""

    mode: str
    batch: int
    height: int
    width: int
    dtype: str
    steps: int
    model: str = "base"
    device: str = "cpu"

    def __str__(self) -> str:
        return f"{self.mode}-{self.model}-{self.height}x{self.width}-{self.batch}-{self.dtype}"

    @property
    def native(self) -> ModelCase:
        """The model at its native image size, which has the weights."""
        return ModelCase(self.mode, self.model, NATIVE, self.batch, self.dtype, self.device)

    @property
    def trains(self) -> bool:
        return self.mode == TRAINING

    @property
    def tokens(self) -> int:
        return (self.height // PATCH) * (self.width // PATCH) + 1

    def bytes_needed(self, scores: int) -> int:
        """Estimate the bytes of a process. It keeps `scores` matrices `[B, H, N, N]` per layer."""
        size, item = self.native.size, DTYPES[self.dtype].itemsize
        tokens = 16 * self.batch * self.tokens * size.width * item
        matrices = scores * self.batch * size.heads * self.tokens**2 * item
        layers = size.layers if self.trains else 1
        return _PROCESS_BYTES + (2 + self.trains) * weight_bytes(self.native) + layers * (tokens + matrices)


def hf_docs_cases(device: str, full: bool = False, all_baselines: bool = False) -> list[HfDocsCase]:
    """List the lines; a quick run on a CPU trains on images with half the sides."""
    inference = [(INFERENCE, batch, NATIVE, NATIVE) for batch in HF_DOCS_BATCHES]
    if device == "cuda":
        cases = [HfDocsCase(*line, "fp16", 10, device=device) for line in inference]
        return [HfDocsCase(TRAINING, 2, *HF_DOCS_IMAGE, "fp16", HF_DOCS_STEPS, device=device), *cases]
    dtypes = ("fp32", "bf16") if full or all_baselines else ("fp32",)
    chosen = inference if full or all_baselines else inference[:2]
    cases = [HfDocsCase(*line, dtype, 5 if line[1] < 16 else 3) for dtype in dtypes for line in chosen]
    height, width = HF_DOCS_IMAGE if full else [side // 2 for side in HF_DOCS_IMAGE]
    return [HfDocsCase(TRAINING, 2, height, width, "fp32", HF_DOCS_STEPS if full else 3), *cases]


def pixels_of(case: HfDocsCase) -> Tensor:
    """Draw pixels `[B, 3, height, width]`, N(0, 1), from a fixed seed."""
    shape = (case.batch, 3, case.height, case.width)
    pixels = torch.randn(shape, generator=torch.Generator().manual_seed(case.height))
    return pixels.to(case.device, DTYPES[case.dtype])


def hf_docs_reference(case: HfDocsCase) -> Reference:
    """Compute fp64 logits and, in training, gradients, with the budgets of `model_reference`."""
    exact, rounded = (_eager_results(case, dtype) for dtype in (torch.float64, DTYPES[case.dtype]))
    return Reference(exact, error_budgets(exact, rounded, ("logits",), DTYPES[case.dtype]))


def _eager_results(case: HfDocsCase, dtype: torch.dtype) -> dict[str, Tensor]:
    """Run one image at a time with activation checkpointing. Memory holds the scores of one layer."""
    model = our_model(case.native, "eager", dtype)
    model.gradient_checkpointing_enable()
    totals = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in model.named_parameters()}
    logits = []
    for image in pixels_of(case).to(dtype).split(1):
        with torch.set_grad_enabled(case.trains):
            one = model(image).logits
        logits.append(one.detach())
        if case.trains:
            for total, part in zip(
                totals.values(), torch.autograd.grad(one.sum(), list(model.parameters())), strict=True
            ):
                total += part
    kinds = by_kind(totals) if case.trains else {}
    return {"logits": torch.cat(logits).cpu(), **{kind: x.float().cpu() for kind, x in kinds.items()}}
