"""Subclasses of Transformers' BEiT attention and bias modules.

They read the bias from its table. `accelerate` sets them as the class of existing modules, which keep their parameters,
hooks and names. A bias module then returns its table (`TableBias`) in place of the dense bias. Attention passes the
table to `rel_pos_attention`.

Transformers has two layouts of these layers. Data2VecVision, and BEiT before 5.8, are "split": a `SelfAttention` inside
an `Attention`, each with its own bias, and an encoder with the shared bias. BEiT since 5.8 is "joined": one
`Attention`, with the bias in the layer or in the model, added to a padding mask.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from torch import Tensor, nn
from transformers.models.beit import modeling_beit
from transformers.models.data2vec import modeling_data2vec_vision

from ...layers import attention_backends
from ...layers.context import Kernels
from ...layers.linear import apply_linear
from ...layers.module_hooks import clone_if_hooked
from ...position_bias import Window, resize_table
from ..forward_scope import choose_in_forward, kernels_for
from .table_bias import TableBias, key_mask_of


def attend(
    hidden_states: Tensor,
    projections: Sequence[nn.Module],
    bias: TableBias | Tensor | None,
    dropout_p: float,
    kernels: Kernels,
    scale: float,
) -> Tensor:
    """Project and attend, `[B, N, E]` to `[B, N, H * D]`; `bias` may be only a mask, see `key_mask_of`."""
    q, k, v = (  # [B, N, H, D]
        apply_linear(linear, hidden_states, kernels.gemm).unflatten(-1, (-1, kernels.head_dim))
        for linear in projections
    )
    table, window, key_mask = None, None, None
    if isinstance(bias, TableBias):
        table, window, key_mask = bias.table, bias.window, bias.key_mask
    elif bias is not None:
        key_mask = key_mask_of(bias)
    if key_mask is not None:
        key_mask = key_mask.expand(q.shape[0], -1)
    if (q.device, q.dtype) != (kernels.device, kernels.dtype):  # a projection was replaced
        kernels = choose_in_forward(kernels.requested, q.device, q.dtype, kernels.head_dim)
    return attention_backends.run_attention(
        kernels.attention, q, k, v, table, window, key_mask, scale, dropout_p
    ).flatten(2)


def dense(bias: TableBias | Tensor | None) -> Tensor | None:
    """Return the bias as Transformers' own attention takes it."""
    return bias.dense() if isinstance(bias, TableBias) else bias


class TableMixin(nn.Module):
    """A relative position bias that returns its table.

    The table is resized to the window of the image.
    """

    window_size: Window
    relative_position_bias_table: nn.Parameter

    def forward(self, window_size: Window, interpolate_pos_encoding: bool = False, dim_size: Any = None) -> Any:
        # Transformers takes the native window as (width, height), which resamples the table of a rectangle.
        table = resize_table(self.relative_position_bias_table, self.window_size[::-1], window_size)
        return TableBias(clone_if_hooked(self, table), window_size)


class TableOrDenseMixin(TableMixin):
    """A bias inside a `SelfAttention`: its table, or the dense bias for Transformers' own forward."""

    def forward(
        self,
        window_size: Window,
        interpolate_pos_encoding: bool = False,
        dim_size: Any = None,
        as_table: bool = False,
    ) -> Any:
        bias = super().forward(window_size)
        return bias if as_table else bias.dense()


class JoinedAttentionMixin(nn.Module):
    """`BeitAttention` since 5.8; with `output_attentions` Transformers' forward runs."""

    attn_implementation: str | None = None
    config: Any
    head_dim: int
    scaling: float
    attention_dropout: float
    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    o_proj: nn.Module

    def forward(
        self, hidden_states: Tensor, attention_mask: TableBias | Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        if kwargs.get("output_attentions", self.config.output_attentions):
            return super().forward(hidden_states, dense(attention_mask), **kwargs)
        kernels = kernels_for(hidden_states, self.attn_implementation, self.head_dim)
        out = attend(
            hidden_states,
            (self.q_proj, self.k_proj, self.v_proj),
            attention_mask,
            self.attention_dropout if self.training else 0.0,
            kernels,
            self.scaling,
        )
        return apply_linear(self.o_proj, out, kernels.gemm), None


class SplitAttentionBase(nn.Module):
    """Common base of the `SelfAttention` classes of split layers."""

    attn_implementation: str | None = None
    config: Any
    attention_head_size: int
    has_relative_position_bias: bool
    relative_position_bias: nn.Module
    query: nn.Module
    key: nn.Module
    value: nn.Module
    dropout: nn.Dropout
    returns_none_for_weights: bool

    def attend(
        self, hidden_states: Tensor, bias: TableBias | Tensor | None, resolution: Any
    ) -> tuple[Tensor | None, ...]:
        if self.has_relative_position_bias:
            height, width = (side // self.config.patch_size for side in resolution)
            own = self.relative_position_bias((height, width), as_table=True)
            bias = own if bias is None else own + bias
        out = attend(
            hidden_states,
            (self.query, self.key, self.value),
            bias,
            self.dropout.p if self.training else 0.0,
            kernels_for(hidden_states, self.attn_implementation, self.attention_head_size),
            self.attention_head_size**-0.5,
        )
        return (out, None) if self.returns_none_for_weights else (out,)


class SplitAttentionMixin(SplitAttentionBase):
    """Split layers of 5.x; with `output_attentions` Transformers' forward runs."""

    def forward(
        self,
        hidden_states: Tensor,
        output_attentions: bool = False,
        relative_position_bias: TableBias | Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        resolution: Any = None,
    ) -> tuple[Tensor | None, ...]:
        if not output_attentions:
            return self.attend(hidden_states, relative_position_bias, resolution)
        shared = dense(relative_position_bias)
        return super().forward(hidden_states, output_attentions, shared, interpolate_pos_encoding, resolution)


class HeadMaskAttentionMixin(SplitAttentionBase):
    """Split layers of 4.57; with `output_attentions` or a head mask Transformers' forward runs."""

    def forward(
        self,
        hidden_states: Tensor,
        head_mask: Tensor | None = None,
        output_attentions: bool = False,
        relative_position_bias: TableBias | Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        resolution: Any = None,
    ) -> tuple[Tensor | None, ...]:
        if not output_attentions and head_mask is None:
            return self.attend(hidden_states, relative_position_bias, resolution)
        shared = dense(relative_position_bias)
        return super().forward(
            hidden_states, head_mask, output_attentions, shared, interpolate_pos_encoding, resolution
        )


FUSED: dict[type[nn.Module], type[nn.Module]] = {}
"""Transformers' classes and their replacements."""

INNER_BIASES: dict[type[nn.Module], type[nn.Module]] = {}
"""The same for bias modules inside a `SelfAttention`."""

CARRIERS: list[type[nn.Module]] = []
"""Classes whose forwards add biases and pass them on."""

TRUNKS: list[type[nn.Module]] = []
"""Classes in which all bias and attention modules are accelerated, or none."""


def _subclass(mixin: type[nn.Module], original: type[nn.Module], prefix: str = "Fused", **attributes: Any) -> type:
    name = f"{prefix}{original.__name__}"
    made = type(name, (mixin, original), {"__module__": __name__, "__doc__": mixin.__doc__, **attributes})
    globals()[name] = made  # pickle looks it up here
    return made


def _register(modeling: ModuleType, family: str) -> None:
    def named(name: str) -> type[nn.Module]:
        return getattr(modeling, f"{family}{name}")

    bias = named("RelativePositionBias")
    FUSED[bias] = _subclass(TableMixin, bias)
    CARRIERS.append(named("Layer"))
    if not hasattr(modeling, f"{family}SelfAttention"):
        FUSED[named("Attention")] = _subclass(JoinedAttentionMixin, named("Attention"))
        TRUNKS.append(named("Model"))
        return
    eager, sdpa = named("SelfAttention"), named("SdpaSelfAttention")
    takes_head_mask = "head_mask" in inspect.signature(eager.forward).parameters
    mixin = HeadMaskAttentionMixin if takes_head_mask else SplitAttentionMixin
    FUSED[eager] = _subclass(mixin, eager, returns_none_for_weights=False)
    FUSED[sdpa] = _subclass(mixin, sdpa, returns_none_for_weights=True)
    INNER_BIASES[bias] = _subclass(TableOrDenseMixin, bias, "FusedInner")
    CARRIERS.append(named("Attention"))
    TRUNKS.append(named("Encoder"))


_register(modeling_beit, "Beit")
_register(modeling_data2vec_vision, "Data2VecVision")
CARRIERS.extend(TRUNKS)

ORIGINALS = {made: original for table in (FUSED, INNER_BIASES) for original, made in table.items()}
"""The Transformers class of each replacement."""
