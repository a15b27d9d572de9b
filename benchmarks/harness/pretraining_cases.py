"""Cases of BEiT's pre-training step: weights, masked images, fp64 reference and error budgets.

The model has one bias table for all layers, a mask token and drop path. Masks are those of the paper: blocks that
cover 75 of 196 patches. Labels are random visual tokens.
"""

from __future__ import annotations

import functools
import zlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from beit_fast import BeitConfig, BeitForMaskedImageModeling
from beit_fast.training import BlockMaskGenerator
from beit_fast.tuning.reference import error_budgets

from .cases import Reference
from .model_cases import DTYPES, LAYER_NORM_EPS, PATCH, SIZES, Size, by_kind, draw_parameters, trunk_flops

PRETRAINING = "pre-training step"
BENCHES = {"cpu": "cpu pre-training", "cuda": "pre-training"}
VOCABULARY = 8192
DROP_PATH = 0.1
_MASKED_SHARE = 75, 196  # patches
_SMALLEST_BLOCK = 16


@dataclass(frozen=True)
class PretrainingCase:
    """A training step of a model for masked image modeling.

    Attributes:
        model: Key of `SIZES`.
        image: Height and width in pixels.
        batch: Number of images.
        dtype: "fp32", or "bf16" for autocast. Parameters and pixels are fp32.
        device: "cpu" or "cuda".
        mode: Name of the timed function.
    """

    model: str
    image: int
    batch: int
    dtype: str
    device: str = "cpu"
    mode: str = PRETRAINING

    def __str__(self) -> str:
        return f"pretraining-{self.model}-{self.image}-{self.batch}-{self.dtype}"

    @property
    def size(self) -> Size:
        return SIZES[self.model]

    @property
    def window(self) -> int:
        return self.image // PATCH

    @property
    def tokens(self) -> int:
        return self.window**2 + 1

    @property
    def masked(self) -> int:
        """Masked patches of an image."""
        share, whole = _MASKED_SHARE
        return self.window**2 * share // whole

    @property
    def flops(self) -> int:
        """Floating-point operations that the loss needs: logits of masked patches only; backward twice the forward."""
        head = 2 * self.masked * self.size.width * VOCABULARY
        return 3 * self.batch * (trunk_flops(self.size, self.tokens) + head)

    @property
    def options(self) -> dict[str, Any]:
        """Keywords of both BeitConfig classes."""
        size = self.size
        return {
            **{"hidden_size": size.width, "num_hidden_layers": size.layers, "num_attention_heads": size.heads},
            **{"intermediate_size": size.mlp, "image_size": self.image, "patch_size": PATCH, "vocab_size": VOCABULARY},
            **{"use_shared_relative_position_bias": True, "use_mask_token": True, "drop_path_rate": DROP_PATH},
            **{"layer_scale_init_value": 0.1, "layer_norm_eps": LAYER_NORM_EPS},
        }

    @property
    def parameters(self) -> dict[str, Tensor]:
        """fp32 weights by hub name, from a fixed seed."""
        return draw_parameters(BeitForMaskedImageModeling, self.options, f"pretraining-{self.model}-{self.image}")


@dataclass(frozen=True)
class MaskedImages:
    """A batch: pixels `[B, 3, H, W]`, mask `[B, P]`, labels `[masked patches]`."""

    pixels: Tensor
    mask: Tensor
    labels: Tensor

    def split(self) -> list[MaskedImages]:
        """Return batches of one image each."""
        counts = self.mask.sum(1).tolist()
        parts = zip(self.pixels.split(1), self.mask.split(1), self.labels.split(counts), strict=True)
        return [MaskedImages(*part) for part in parts]


def masked_images(case: PretrainingCase) -> MaskedImages:
    """Draw the batch of a case, the same for each dtype. Pixels are N(0, 1)."""
    seed = zlib.crc32(f"{case.model}-{case.image}-{case.batch}".encode())
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(case.batch, 3, case.image, case.image, generator=generator)
    smallest = min(_SMALLEST_BLOCK, case.masked)
    mask = BlockMaskGenerator(case.window, case.masked, smallest, flat=True)(case.batch, generator)
    labels = torch.randint(VOCABULARY, (case.batch * case.masked,), generator=generator)
    return MaskedImages(pixels.to(case.device), mask.to(case.device), labels.to(case.device))


def our_masked_model(
    case: PretrainingCase, implementation: str, dtype: torch.dtype = torch.float32
) -> BeitForMaskedImageModeling:
    """Build our model with the weights and device of the case, for training."""
    with torch.device("meta"):
        model = BeitForMaskedImageModeling(BeitConfig(**case.options), attn_implementation=implementation)
    model.load_state_dict(case.parameters, assign=True)
    return model.to(case.device, dtype).train()


def set_drop_path(model: nn.Module, rates: list[float] | float) -> list[float]:
    """Set the rates of the drop path modules, of this package or of Transformers, and return those before."""
    modules = [module for module in model.modules() if type(module).__name__ == "BeitDropPath"]
    before: list[float] = [module.drop_prob for module in modules]
    chosen = [rates] * len(modules) if isinstance(rates, float) else rates
    for module, rate in zip(modules, chosen, strict=True):
        module.drop_prob = rate
    return before


def pretraining_reference(case: PretrainingCase) -> Reference:
    """Compute fp64 logits, loss and gradients without drop path, with error budgets.

    The budgets come from eager attention in fp32, under autocast if the case is in bf16, as those of `model_reference`.
    The loss has the budget of the logits: its own error may be zero by chance.
    """
    exact = _exact(case.model, case.image, case.batch, case.device)
    autocasts = case.dtype != "fp32"
    rounded = _eager_results(case, torch.float32, autocasts)
    budgets = error_budgets(exact, rounded, ("logits", "loss"), DTYPES[case.dtype])
    return Reference(exact, budgets | {"loss": budgets["logits"]})


@functools.lru_cache(maxsize=1)
def _exact(model: str, image: int, batch: int, device: str) -> dict[str, Tensor]:
    return _eager_results(PretrainingCase(model, image, batch, "fp32", device), torch.float64)


def _eager_results(case: PretrainingCase, dtype: torch.dtype, autocasts: bool = False) -> dict[str, Tensor]:
    """Run one image at a time; sum gradients in fp64."""
    model = our_masked_model(case, "eager", dtype)
    set_drop_path(model, 0.0)
    totals = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in model.named_parameters()}
    logits, losses = [], []
    for one in masked_images(case).split():
        with torch.autocast(case.device, torch.bfloat16, enabled=autocasts):
            output = model(one.pixels.to(dtype), bool_masked_pos=one.mask, labels=one.labels)
        assert output.loss is not None
        logits.append(output.logits.detach().float())
        losses.append(output.loss.detach().double())
        loss = output.loss / case.batch
        for total, part in zip(totals.values(), torch.autograd.grad(loss, list(model.parameters())), strict=True):
            total += part
    results = {"logits": torch.cat(logits).cpu(), "loss": torch.stack(losses).mean().cpu()}
    return {**results, **{kind: gradient.float().cpu() for kind, gradient in by_kind(totals).items()}}


def pretraining_cases(device: str) -> list[PretrainingCase]:
    """List the cases: two batch sizes in both dtypes on a CPU, one on CUDA."""
    batches, dtypes = ((4, 8), ("fp32", "bf16")) if device == "cpu" else ((64,), ("bf16",))
    return [PretrainingCase("base", 224, batch, dtype, device) for batch in batches for dtype in dtypes]
