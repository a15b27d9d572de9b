"""Cases of whole models: sizes, weights, pixels, fp64 reference and error budgets."""

from __future__ import annotations

import functools
import re
import zlib
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from beit_fast import BeitConfig, BeitForImageClassification, BeitPreTrainedModel
from beit_fast.tuning.reference import error_budgets

from .cases import DTYPE_NAMES, Reference

INFERENCE, TRAINING = "inference", "training"
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
PATCH = 16


@dataclass(frozen=True)
class Size:
    """Width and depth of a model."""

    width: int
    layers: int
    heads: int
    mlp: int
    labels: int = 1000


SIZES = {
    "base": Size(768, 12, 12, 3072),
    "large": Size(1024, 24, 16, 4096),
    "tiny": Size(32, 2, 4, 64, labels=10),  # for the tests of the harness
}


@dataclass(frozen=True)
class ModelCase:
    """A model at its native image size. Each layer has a relative position bias.

    Attributes:
        mode: "inference" computes logits. "training" computes logits, cross-entropy and all gradients, without an
            optimizer step.
        model: Key of `SIZES`.
        image: Height and width in pixels.
        batch: Number of images.
        dtype: Of parameters and pixels.
        device: "cpu" or "cuda".
    """

    mode: str
    model: str
    image: int
    batch: int
    dtype: str
    device: str = "cpu"

    def __str__(self) -> str:
        return f"{self.mode}-{self.model}-{self.image}-{self.batch}-{self.dtype}"

    @property
    def size(self) -> Size:
        return SIZES[self.model]

    @property
    def trains(self) -> bool:
        return self.mode == TRAINING

    @property
    def tokens(self) -> int:
        return (self.image // PATCH) ** 2 + 1

    @property
    def flops(self) -> int:
        """Floating-point operations of the forward, and twice as many for the backward."""
        forward = trunk_flops(self.size, self.tokens) + 2 * self.size.width * self.size.labels
        return self.batch * forward * (3 if self.trains else 1)

    @property
    def options(self) -> dict[str, Any]:
        """Keywords of both BeitConfig classes; nothing in them is random."""
        size = self.size
        return {
            **{"hidden_size": size.width, "num_hidden_layers": size.layers, "num_attention_heads": size.heads},
            **{"intermediate_size": size.mlp, "num_labels": size.labels, "image_size": self.image},
            **{"patch_size": PATCH, "use_relative_position_bias": True, "use_mask_token": False},
            **{"drop_path_rate": 0.0, "layer_norm_eps": LAYER_NORM_EPS},
        }


LAYER_NORM_EPS = 1e-12


def trunk_flops(size: Size, tokens: int) -> int:
    """Floating-point operations of embeddings and blocks in the forward of one image."""
    linears = 2 * tokens * size.width * (4 * size.width + 2 * size.mlp)
    attention = 4 * tokens**2 * size.width
    patches = 2 * (tokens - 1) * size.width * 3 * PATCH**2
    return patches + size.layers * (linears + attention)


def parameters(case: ModelCase) -> dict[str, Tensor]:
    """Draw fp32 weights by hub name from a fixed seed."""
    return draw_parameters(BeitForImageClassification, case.options, f"{case.model}-{case.image}")


def draw_parameters(model_class: type[BeitPreTrainedModel], options: dict[str, Any], seed: str) -> dict[str, Tensor]:
    """Draw fp32 weights by hub name from the seed of a text.

    Tables are N(0, 1), layer scales 0.1, LayerNorm weights around 1, all others N(0, 0.02).
    """
    generator = torch.Generator().manual_seed(zlib.crc32(seed.encode()))
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in model_class(BeitConfig(**options)).named_parameters()}

    def draw(name: str, shape: torch.Size) -> Tensor:
        if "lambda" in name:
            return torch.full(shape, 0.1)
        values = torch.randn(shape, generator=generator)
        if name.endswith("bias_table"):
            return values
        return values.mul_(0.1).add_(1) if "norm" in name and name.endswith("weight") else values.mul_(0.02)

    return {name: draw(name, shape) for name, shape in shapes.items()}


@functools.lru_cache(maxsize=1)
def pixels_and_labels(case: ModelCase) -> tuple[Tensor, Tensor]:
    """Draw pixels `[B, 3, H, W]` and labels `[B]`. Pixels are N(0, 1) in the dtype of the case."""
    generator = torch.Generator().manual_seed(zlib.crc32(str(case).encode()))
    pixels = torch.randn(case.batch, 3, case.image, case.image, generator=generator).to(DTYPES[case.dtype])
    labels = torch.randint(case.size.labels, (case.batch,), generator=generator)
    return pixels.to(case.device), labels.to(case.device)


def our_model(case: ModelCase, implementation: str, dtype: torch.dtype) -> BeitForImageClassification:
    """Build our model with the weights, device and mode of the case."""
    with torch.device("meta"):
        model = BeitForImageClassification(BeitConfig(**case.options), attn_implementation=implementation)
    model.load_state_dict(parameters(case), assign=True)
    return model.to(case.device, dtype).train(case.trains)


@functools.lru_cache(maxsize=1)
def model_reference(case: ModelCase) -> Reference:
    """Compute fp64 logits and, in training, gradients, with error budgets.

    The budgets come from the error of eager attention in the dtype of the case. They are twice that error for the
    logits and three times for gradients, plus four eps of the dtype. Gradients are concatenated over layers: "lambda_1"
    holds the layer scales of all layers.
    """
    exact = _eager_results(case, torch.float64)
    rounded = _eager_results(case, DTYPES[case.dtype])
    return Reference(exact, error_budgets(exact, rounded, ("logits",), DTYPES[case.dtype]))


def _eager_results(case: ModelCase, dtype: torch.dtype) -> dict[str, Tensor]:
    """Run one image at a time to hold the scores of one; sum gradients in fp64."""
    model = our_model(case, "eager", dtype)
    pixels, labels = pixels_and_labels(case)
    logits, gradients = [], {name: torch.zeros_like(p, dtype=torch.float64) for name, p in model.named_parameters()}
    for image, label in zip(pixels.to(dtype).split(1), labels.split(1), strict=True):
        with torch.set_grad_enabled(case.trains):
            one = model(image).logits
        logits.append(one.detach())
        if case.trains:
            loss = F.cross_entropy(one if dtype == torch.float64 else one.float(), label) / case.batch
            for total, part in zip(
                gradients.values(), torch.autograd.grad(loss, list(model.parameters())), strict=True
            ):
                total += part
    grouped = by_kind(gradients) if case.trains else {}
    return {"logits": torch.cat(logits).cpu(), **{name: x.float().cpu() for name, x in grouped.items()}}


def by_kind(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """Concatenate gradients over layers into one flat tensor per parameter kind. `gradients` has hub names."""
    kinds: dict[str, list[Tensor]] = {}
    for name in sorted(gradients):
        kind = re.sub(r"^beit\.(encoder\.layer\.\d+\.)?|attention\.attention\.|\.relative_position_bias(?=_)", "", name)
        kinds.setdefault(kind, []).append(gradients[name].flatten())
    return {kind: torch.cat(parts) for kind, parts in kinds.items()}


def model_cases(device: str, full: bool = False, all_baselines: bool = False) -> list[ModelCase]:
    """List the cases: a quick set, all cases of the targets if `all_baselines`, every size if `full`."""
    if full:
        sizes = [
            (mode, model, image, batch, dtype)
            for mode in (INFERENCE, TRAINING)
            for model in ("base", "large")
            for dtype in ("fp32", "bf16", "fp16")
            for image in (224, 384, 512, 640)
            for batch in (1, 8, 64)
        ]
        # the target for training on a CPU uses another batch size
        return [ModelCase(*size, device) for size in dict.fromkeys([*sizes, *_WITH_TARGETS[device]])]
    return [ModelCase(*size, device) for size in (_WITH_TARGETS if all_baselines else _QUICK)[device]]


_QUICK = {
    "cpu": (
        (INFERENCE, "base", 224, 1, "fp32"),
        (INFERENCE, "base", 224, 1, "bf16"),
        (INFERENCE, "base", 640, 1, "fp32"),
        (TRAINING, "base", 224, 4, "fp32"),
    ),
    "cuda": (
        (INFERENCE, "base", 224, 1, "bf16"),
        (INFERENCE, "base", 224, 64, "bf16"),
        (INFERENCE, "large", 640, 8, "bf16"),
        (TRAINING, "large", 640, 8, "bf16"),
    ),
}
_WITH_TARGETS = {
    "cpu": (*_QUICK["cpu"], (INFERENCE, "base", 224, 8, "fp32"), (INFERENCE, "base", 640, 1, "bf16")),
    "cuda": _QUICK["cuda"],
}
_LONGEST_ON_CPU = 1.3e12  # floating-point operations: about 10 s of the slowest baseline on two cores


def too_long_reason(case: ModelCase) -> str | None:
    """Return why a case takes too long to run, or None."""
    if case.device != "cpu" or case.flops <= _LONGEST_ON_CPU:
        return None
    return f"time: {case.flops / 1e12:.1f} TFLOP a call; on a CPU the limit is {_LONGEST_ON_CPU / 1e12:.1f}"


@functools.lru_cache
def weight_bytes(case: ModelCase) -> int:
    """Return the bytes of the parameters in the dtype of the case."""
    with torch.device("meta"):
        model = BeitForImageClassification(BeitConfig(**case.options))
    return sum(p.numel() for p in model.parameters()) * DTYPES[case.dtype].itemsize
