"""Names of options that several subpackages accept, each listed once."""

from __future__ import annotations

from typing import Literal, get_args

AttentionImplementation = Literal["eager", "sdpa", "triton"]
ATTENTION_IMPLEMENTATIONS: tuple[AttentionImplementation, ...] = get_args(AttentionImplementation)

PatchEmbedImplementation = Literal["conv", "fused"]
PATCH_EMBED_IMPLEMENTATIONS: tuple[PatchEmbedImplementation, ...] = get_args(PatchEmbedImplementation)

PositionInterpolation = Literal["bilinear", "geometric"]
POSITION_INTERPOLATIONS: tuple[PositionInterpolation, ...] = get_args(PositionInterpolation)

DTYPE_ALIASES = {"fp32": "float32", "fp16": "float16", "half": "float16", "bf16": "bfloat16"}
"""Short names of dtypes that the commands and `optimize_for_inference` accept."""
