"""Names of options that several subpackages accept, each listed once."""

from __future__ import annotations

from typing import Literal, get_args

AttentionImplementation = Literal["eager", "sdpa", "triton"]
ATTENTION_IMPLEMENTATIONS: tuple[AttentionImplementation, ...] = get_args(AttentionImplementation)

PatchEmbedImplementation = Literal["conv", "fused"]
PATCH_EMBED_IMPLEMENTATIONS: tuple[PatchEmbedImplementation, ...] = get_args(PatchEmbedImplementation)

PositionInterpolation = Literal["bilinear", "geometric"]
POSITION_INTERPOLATIONS: tuple[PositionInterpolation, ...] = get_args(PositionInterpolation)

DTYPE_ALIASES = {
    "fp32": "float32",
    "float": "float32",
    "fp16": "float16",
    "half": "float16",
    "bf16": "bfloat16",
    "fp64": "float64",
    "double": "float64",
}
"""Other names of dtypes that configurations, `from_pretrained`, `optimize_for_inference` and the commands accept."""


def dtype_name(name: str) -> str:
    """Return the full name of a dtype, such as "bfloat16" for "bf16".

    Any other string is returned as it is, without `torch.`.
    """
    name = name.removeprefix("torch.")
    return DTYPE_ALIASES.get(name, name)
