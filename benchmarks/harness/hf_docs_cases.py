"""The lines of the two tables of Transformers' BEiT page: pixels, the fp64 reference, and the error that is allowed.

The page times `beit-base-patch16-224`, a classifier; in training on images of 1048x640 pixels, for which its tables are
resized. A training step is what the scripts behind such tables in Transformers run: forward, sum of the logits and
backward, without an optimizer. Here weights are random and there is no drop path, whose random numbers no two
implementations share.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .cases import Reference, relative_error
from .model_cases import DTYPES, INFERENCE, PATCH, TRAINING, ModelCase, by_kind, our_model, weight_bytes

NATIVE = 224
PAGE_IMAGE = (1048, 640)
PAGE_BATCHES = (1, 4, 16, 32)
PAGE_STEPS = 50
_PROCESS_BYTES = 600 << 20


@dataclass(frozen=True)
class PageCase:
    """A line of a table: `steps` calls are timed, on images of `height` x `width` pixels, of a model made for 224."""

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
        """The model at the size of its tables: it has the weights."""
        return ModelCase(self.mode, self.model, NATIVE, self.batch, self.dtype, self.device)

    @property
    def trains(self) -> bool:
        return self.mode == TRAINING

    @property
    def tokens(self) -> int:
        return (self.height // PATCH) * (self.width // PATCH) + 1

    def bytes_needed(self, scores: int) -> int:
        """About what a process needs that keeps `scores` matrices `[B, H, N, N]` a layer for the backward."""
        size, item = self.native.size, DTYPES[self.dtype].itemsize
        tokens = 16 * self.batch * self.tokens * size.width * item
        matrices = scores * self.batch * size.heads * self.tokens**2 * item
        layers = size.layers if self.trains else 1
        return _PROCESS_BYTES + (2 + self.trains) * weight_bytes(self.native) + layers * (tokens + matrices)


def page_cases(device: str, full: bool = False, every_peer: bool = False) -> list[PageCase]:
    """The lines of a run. On CUDA and with `full` training is the page's; on a CPU otherwise on half its sides."""
    inference = [(INFERENCE, batch, NATIVE, NATIVE) for batch in PAGE_BATCHES]
    if device == "cuda":
        cases = [PageCase(*line, "fp16", 10, device=device) for line in inference]
        return [PageCase(TRAINING, 2, *PAGE_IMAGE, "fp16", PAGE_STEPS, device=device), *cases]
    dtypes = ("fp32", "bf16") if full or every_peer else ("fp32",)
    chosen = inference if full or every_peer else inference[:2]
    cases = [PageCase(*line, dtype, 5 if line[1] < 16 else 3) for dtype in dtypes for line in chosen]
    height, width = PAGE_IMAGE if full else [side // 2 for side in PAGE_IMAGE]
    return [PageCase(TRAINING, 2, height, width, "fp32", PAGE_STEPS if full else 3), *cases]


def pixels_of(case: PageCase) -> Tensor:
    """`[B, 3, height, width]` from N(0, 1), the same values at each call."""
    shape = (case.batch, 3, case.height, case.width)
    pixels = torch.randn(shape, generator=torch.Generator().manual_seed(case.height))
    return pixels.to(case.device, DTYPES[case.dtype])


def page_reference(case: PageCase) -> Reference:
    """fp64 logits and, in training, gradients, with budgets as `model_reference` has them."""
    exact, rounded = (_eager_results(case, dtype) for dtype in (torch.float64, DTYPES[case.dtype]))
    floor = 4 * torch.finfo(DTYPES[case.dtype]).eps
    errors = {name: relative_error(rounded[name], exact[name]) for name in exact}
    return Reference(exact, {name: (2 if name == "logits" else 3) * error + floor for name, error in errors.items()})


def _eager_results(case: PageCase, dtype: torch.dtype) -> dict[str, Tensor]:
    """One image at a time, each block again in the backward, so that the scores of one layer are all that is held."""
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
