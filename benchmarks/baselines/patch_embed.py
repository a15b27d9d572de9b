"""The baselines of patch embedding, for float and for uint8 pixels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

import beit_fast

from ..harness.patch_cases import BYTES, FLOAT, MEAN, STD, PatchInputs, convolution, normalized, with_cls_and_positions


def _ours(inputs: PatchInputs) -> Callable[[], Tensor]:
    mean, std = (MEAN, STD) if inputs.pixels.dtype == torch.uint8 else (None, None)
    return lambda: beit_fast.patch_embed(
        inputs.pixels, inputs.weight, inputs.bias, inputs.cls, pos=inputs.pos, mean=mean, std=std
    )


def _convolution(inputs: PatchInputs) -> Callable[[], Tensor]:
    return lambda: convolution(inputs.pixels, inputs)


def _channels_last(inputs: PatchInputs) -> Callable[[], Tensor]:
    """Convert pixels and weight before the clock starts."""
    layout = torch.channels_last
    moved = replace(
        inputs, pixels=inputs.pixels.to(memory_format=layout), weight=inputs.weight.to(memory_format=layout)
    )
    return lambda: convolution(moved.pixels, moved)


def _unfold(inputs: PatchInputs) -> Callable[[], Tensor]:
    matrix, side = inputs.weight.flatten(1), inputs.weight.shape[2]

    def run() -> Tensor:
        blocks = inputs.pixels.unflatten(3, (-1, side)).unflatten(2, (-1, side))  # [B, C, h, p, w, p]
        patches = blocks.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # [B, P, C * p * p]
        return with_cls_and_positions(F.linear(patches, matrix, inputs.bias), inputs)

    return run


def _normalize_and_convolve(inputs: PatchInputs) -> Callable[[], Tensor]:
    return lambda: convolution(normalized(inputs.pixels, inputs.weight.dtype), inputs)


OURS = "beit_fast fused"

BASELINES: dict[str, dict[str, Callable[[PatchInputs], Callable[[], Tensor]]]] = {
    FLOAT: {
        OURS: _ours,
        "conv": _convolution,
        "conv channels_last": _channels_last,
        "unfold + linear": _unfold,
    },
    BYTES: {OURS: _ours, "normalize + conv": _normalize_and_convolve},
}
