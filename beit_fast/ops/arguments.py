"""Schemas of the operators, and their arguments as typed tuples: a leaf.

Each schema has one tuple with the same names in the same order. The dispatcher leaves out trailing arguments that equal
the schema's defaults; the tuple puts them back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..position_bias import Window

REL_POS_ATTENTION = (
    "rel_pos_attention(Tensor q, Tensor k, Tensor v, Tensor? table, Tensor? key_mask, SymInt[2] window, "
    "float scale, float dropout_p=0., SymInt seed=0) -> (Tensor out, Tensor lse)"
)


class AttentionArguments(NamedTuple):
    """Arguments of `rel_pos_attention`."""

    q: Tensor  # [B, N, H, D]
    k: Tensor
    v: Tensor
    table: Tensor | None  # [rows, H]
    key_mask: Tensor | None  # [B, N] bool
    window: Window
    scale: float
    dropout_p: float = 0.0
    seed: int = 0


REL_POS_ATTENTION_BACKWARD = (
    "rel_pos_attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor? table, Tensor? key_mask, "
    "Tensor out, Tensor lse, SymInt[2] window, float scale, float dropout_p, SymInt seed, bool[4] output_mask) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)


class AttentionBackwardArguments(NamedTuple):
    """Arguments of `rel_pos_attention_backward`."""

    grad_out: Tensor  # [B, N, H, D]
    q: Tensor
    k: Tensor
    v: Tensor
    table: Tensor | None
    key_mask: Tensor | None
    out: Tensor  # [B, N, H, D]
    lse: Tensor  # [B, H, N]
    window: Window
    scale: float
    dropout_p: float
    seed: int
    output_mask: tuple[bool, bool, bool, bool]  # of q, k, v and table

    @property
    def forward(self) -> AttentionArguments:
        """The arguments of the forward call."""
        return AttentionArguments(*(getattr(self, name) for name in AttentionArguments._fields))


PATCH_EMBED = (
    "patch_embed(Tensor pixels, Tensor weight, Tensor? bias, Tensor? cls, Tensor? mask, Tensor? mask_token, "
    "Tensor? pos, float[]? mean, float[]? std) -> Tensor"
)
PATCH_EMBED_CUDA = PATCH_EMBED.replace("patch_embed", "_patch_embed_cuda").replace(") ->", ", bool allow_tf32) ->")


class PatchEmbedArguments(NamedTuple):
    """Arguments of `patch_embed`."""

    pixels: Tensor  # [B, C, H, W]
    weight: Tensor  # [E, C, ph, pw]
    bias: Tensor | None  # E numbers
    cls: Tensor | None  # E numbers
    mask: Tensor | None  # [B, P] bool
    mask_token: Tensor | None  # E numbers
    pos: Tensor | None  # [1, tokens, E]
    mean: Sequence[float] | None
    std: Sequence[float] | None


LINEAR_GELU = "linear_gelu(Tensor x, Tensor weight, Tensor? bias) -> Tensor"


class LinearGeluArguments(NamedTuple):
    """Arguments of `linear_gelu`."""

    x: Tensor  # [..., inputs]
    weight: Tensor  # [outputs, inputs]
    bias: Tensor | None  # [outputs]


RESIDUAL_NORM = (
    "residual_norm(Tensor residual, Tensor? branch, Tensor? scale, Tensor? drop_path_scale, Tensor? weight, "
    "Tensor? bias, float eps, ScalarType? dtype=None) -> (Tensor sum, Tensor normalized, Tensor mean, Tensor rstd)"
)


class ResidualNormArguments(NamedTuple):
    """Arguments of `residual_norm`."""

    residual: Tensor  # [B, N, E]
    branch: Tensor | None  # [B, N, E]
    scale: Tensor | None  # [E]
    drop_path_scale: Tensor | None  # [B]
    weight: Tensor | None  # [E]
    bias: Tensor | None  # [E]
    eps: float
    dtype: torch.dtype | None = None


RESIDUAL_NORM_BACKWARD = (
    "residual_norm_backward(Tensor? grad_sum, Tensor? grad_normalized, Tensor sum, Tensor? branch, Tensor? scale, "
    "Tensor? drop_path_scale, Tensor? weight, Tensor? bias, Tensor mean, Tensor rstd, ScalarType branch_dtype, "
    "bool[5] output_mask) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


class ResidualNormBackwardArguments(NamedTuple):
    """Arguments of `residual_norm_backward`."""

    grad_sum: Tensor | None  # [B, N, E]
    grad_normalized: Tensor | None  # [B, N, E]
    sum: Tensor  # [B, N, E]
    branch: Tensor | None
    scale: Tensor | None
    drop_path_scale: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    mean: Tensor  # [B, N]
    rstd: Tensor  # [B, N]
    branch_dtype: torch.dtype
    output_mask: Sequence[bool]  # of residual, branch, scale, weight and bias


RESIDUAL_ADD = "residual_add(Tensor residual, Tensor branch, Tensor? scale, Tensor? drop_path_scale) -> Tensor"


class ResidualAddArguments(NamedTuple):
    """Arguments of `residual_add`."""

    residual: Tensor  # [B, N, E]
    branch: Tensor
    scale: Tensor | None  # [E]
    drop_path_scale: Tensor | None  # [B]


RESIDUAL_ADD_BACKWARD = (
    "residual_add_backward(Tensor grad, Tensor? branch, Tensor? scale, Tensor? drop_path_scale, "
    "ScalarType branch_dtype, bool[2] output_mask) -> (Tensor, Tensor)"
)


class ResidualAddBackwardArguments(NamedTuple):
    """Arguments of `residual_add_backward`."""

    grad: Tensor  # [B, N, E]
    branch: Tensor | None
    scale: Tensor | None
    drop_path_scale: Tensor | None
    branch_dtype: torch.dtype
    output_mask: Sequence[bool]  # of branch and scale
