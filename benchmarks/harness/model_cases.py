"""What the whole model is measured on: sizes, weights and pixels, the fp64 reference, and the error that is allowed."""

from __future__ import annotations

import functools
import re
import zlib
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from beit_fast import BeitConfig, BeitForImageClassification

from .cases import DTYPE_NAMES, Reference, relative_error

INFERENCE, TRAINING = "inference", "training"
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
PATCH = 16


@dataclass(frozen=True)
class Size:
    """Widths and depth of a model."""

    width: int
    layers: int
    heads: int
    mlp: int
    labels: int = 1000


SIZES = {
    "base": Size(768, 12, 12, 3072),
    "large": Size(1024, 24, 16, 4096),
    "tiny": Size(32, 2, 4, 64, labels=10),  # for tests of the house
}


@dataclass(frozen=True)
class ModelCase:
    """A model with a relative position bias in each layer, at its native image size; `mode` says what one call is.

    inference: pixels to logits. training: logits, cross-entropy and the gradient of every parameter, without an
    optimizer. `dtype` is that of parameters and pixels.
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
        """Products of the forward, and twice as many for the backward."""
        size, tokens = self.size, self.tokens
        linears = 2 * tokens * size.width * (4 * size.width + 2 * size.mlp)
        attention = 4 * tokens**2 * size.width
        patches = 2 * (tokens - 1) * size.width * 3 * PATCH**2
        forward = patches + size.layers * (linears + attention) + 2 * size.width * size.labels
        return self.batch * forward * (3 if self.trains else 1)

    @property
    def options(self) -> dict[str, Any]:
        """The keywords of `BeitConfig`, ours and Transformers'; nothing in them is random."""
        size = self.size
        return {
            **{"hidden_size": size.width, "num_hidden_layers": size.layers, "num_attention_heads": size.heads},
            **{"intermediate_size": size.mlp, "num_labels": size.labels, "image_size": self.image},
            **{"patch_size": PATCH, "use_relative_position_bias": True, "use_mask_token": False},
            **{"drop_path_rate": 0.0, "layer_norm_eps": LAYER_NORM_EPS},
        }


LAYER_NORM_EPS = 1e-12


def parameters(case: ModelCase) -> dict[str, Tensor]:
    """fp32 weights by their names on the hub, the same values at each call.

    Tables N(0, 1), layer scales 0.1, LayerNorm weights around 1, all else N(0, 0.02).
    """
    generator = torch.Generator().manual_seed(zlib.crc32(f"{case.model}-{case.image}".encode()))
    with torch.device("meta"):
        shapes = {
            name: p.shape for name, p in BeitForImageClassification(BeitConfig(**case.options)).named_parameters()
        }

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
    """pixels `[B, 3, H, W]` from N(0, 1) in the case's dtype, and labels `[B]`."""
    generator = torch.Generator().manual_seed(zlib.crc32(str(case).encode()))
    pixels = torch.randn(case.batch, 3, case.image, case.image, generator=generator).to(DTYPES[case.dtype])
    labels = torch.randint(case.size.labels, (case.batch,), generator=generator)
    return pixels.to(case.device), labels.to(case.device)


def our_model(case: ModelCase, implementation: str, dtype: torch.dtype) -> BeitForImageClassification:
    """Ours with the weights of the case, ready for its mode and on its device."""
    with torch.device("meta"):
        model = BeitForImageClassification(BeitConfig(**case.options), attn_implementation=implementation)
    model.load_state_dict(parameters(case), assign=True)
    return model.to(case.device, dtype).train(case.trains)


@functools.lru_cache(maxsize=1)
def model_reference(case: ModelCase) -> Reference:
    """Logits and, in training, gradients in fp64, with budgets from the error of eager mode in the case's own dtype.

    The budget is twice that error for the logits and three times for gradients, plus four eps of the dtype. Gradients
    are taken together over layers: "lambda_1" is the layer scale of all of them.
    """
    exact = _eager_results(case, torch.float64)
    rounded = _eager_results(case, DTYPES[case.dtype])
    floor = 4 * torch.finfo(DTYPES[case.dtype]).eps
    budgets = {
        name: (2 if name == "logits" else 3) * relative_error(rounded[name], exact[name]) + floor for name in exact
    }
    return Reference(exact, budgets)


def _eager_results(case: ModelCase, dtype: torch.dtype) -> dict[str, Tensor]:
    """One image at a time, so that the scores of one are all that is held; gradients add up in fp64, kept in fp32."""
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
    """Gradients by hub name as one flat tensor for each kind of parameter, over all layers."""
    kinds: dict[str, list[Tensor]] = {}
    for name in sorted(gradients):
        kind = re.sub(r"^beit\.(encoder\.layer\.\d+\.)?|attention\.attention\.|\.relative_position_bias(?=_)", "", name)
        kinds.setdefault(kind, []).append(gradients[name].flatten())
    return {kind: torch.cat(parts) for kind, parts in kinds.items()}


def model_cases(device: str, full: bool = False, every_peer: bool = False) -> list[ModelCase]:
    """The cases of a run: a quick set, with `every_peer` all that targets ask for, with `full` every size."""
    if full:
        sizes = [
            (mode, model, image, batch, dtype)
            for mode in (INFERENCE, TRAINING)
            for model in ("base", "large")
            for dtype in ("fp32", "bf16", "fp16")
            for image in (224, 384, 512, 640)
            for batch in (1, 8, 64)
        ]
        # the target of training on a CPU has a batch of its own
        return [ModelCase(*size, device) for size in dict.fromkeys([*sizes, *_WITH_TARGETS[device]])]
    return [ModelCase(*size, device) for size in (_WITH_TARGETS if every_peer else _QUICK)[device]]


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
_LONGEST_ON_CPU = 1.3e12  # floating-point operations of a call, about ten seconds of the slowest peer on two cores


def why_too_long(case: ModelCase) -> str | None:
    """The reason why a case is left out for the time that it takes, or None."""
    if case.device != "cpu" or case.flops <= _LONGEST_ON_CPU:
        return None
    return f"time: {case.flops / 1e12:.1f} TFLOP a call; on a CPU cases of up to {_LONGEST_ON_CPU / 1e12:.1f} are run"


@functools.lru_cache
def weight_bytes(case: ModelCase) -> int:
    """Bytes of the parameters in the case's dtype."""
    with torch.device("meta"):
        model = BeitForImageClassification(BeitConfig(**case.options))
    return sum(p.numel() for p in model.parameters()) * DTYPES[case.dtype].itemsize
