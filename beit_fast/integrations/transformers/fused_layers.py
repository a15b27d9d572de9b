"""Subclasses of Transformers' BEiT attention and bias modules.

They read the bias from its table. `accelerate` sets them as the class of existing modules, which keep their parameters,
hooks and names. A bias module then returns its table (`TableBias`) in place of the dense bias. Attention passes the
table to `rel_pos_attention`. Hooks that may read a bias get the dense one, and Transformers' own attention then runs.

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
from ...layers.module_hooks import clone_if_hooked, watches_keywords, watches_output
from ...position_bias import Window, resize_table
from ..bias_handle import dense, show_dense
from ..forward_scope import choose_in_forward, kernels_for
from ..library_code import changed_sdpa
from .library_reasons import FromLibrary, FromLibraryBias, attention_function_reason, attributes_of
from .table_bias import Bias, DenseBias, TableBias, is_dense_bias, key_mask_of


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


class TableMixin(FromLibraryBias):
    """A relative position bias that returns its table.

    The table is resized to the window of the image. If the module has hooks, they see Transformers' dense bias and may
    replace it. `library_forward_reason` says when Transformers' forward runs.
    """

    window_size: Window
    relative_position_bias_table: nn.Parameter

    def __call__(self, *args: Any, **kwargs: Any) -> Bias:
        return as_handle(super().__call__(*args, **kwargs))

    def forward(self, window_size: Window, interpolate_pos_encoding: bool = False, dim_size: Any = None) -> Any:
        if self.library_forward_reason():
            return super().forward(window_size, interpolate_pos_encoding, dim_size)
        return table_of(self, window_size)


def table_of(module: Any, window: Window) -> TableBias:
    """Return the table of a bias module, resized to a window."""
    # Transformers takes the native window as (width, height), which resamples the table of a rectangle.
    table = resize_table(module.relative_position_bias_table, module.window_size[::-1], window)
    return TableBias(clone_if_hooked(module, table), window)


def as_handle(bias: Any) -> Any:
    """Wrap a dense bias; a handle is returned unchanged."""
    return DenseBias(bias) if isinstance(bias, Tensor) else bias


class TableOrDenseMixin(FromLibraryBias):
    """A bias inside a `SelfAttention`: its table, or the dense bias for Transformers' own forward."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return nn.Module.__call__(self, *args, **kwargs)

    def forward(
        self,
        window_size: Window,
        interpolate_pos_encoding: bool = False,
        dim_size: Any = None,
        as_table: bool = False,
    ) -> Any:
        if as_table:
            return table_of(self, window_size)
        if self.library_forward_reason():
            return super().forward(window_size, interpolate_pos_encoding, dim_size)
        return table_of(self, window_size).dense()


class JoinedAttentionMixin(FromLibrary):
    """`BeitAttention` since 5.8; `library_forward_reason` says when Transformers' forward runs."""

    attn_implementation: str | None = None
    config: Any
    num_attention_heads: int
    head_dim: int
    scaling: float
    attention_dropout: float
    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    o_proj: nn.Module

    def library_forward_reason(self) -> str:
        """Return why Transformers' own forward must run, or an empty string."""
        if watches_keywords(self):
            return "has hooks with keyword arguments"
        return self.changed_forward() or attention_function_reason(self.config._attn_implementation)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = show_dense(self, args, kwargs)
        return super().__call__(*args, **kwargs)

    def forward(
        self, hidden_states: Tensor, attention_mask: TableBias | DenseBias | Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        asks_for_weights = kwargs.get("output_attentions", self.config.output_attentions)
        given_bias = isinstance(attention_mask, Tensor) and is_dense_bias(attention_mask, self.num_attention_heads)
        if asks_for_weights or given_bias or isinstance(attention_mask, DenseBias) or self.library_forward_reason():
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


class SplitAttentionBase(FromLibrary):
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

    def library_forward_reason(self) -> str:
        """Return why Transformers' own forward must run, or an empty string."""
        if watches_keywords(self):
            return "has hooks with keyword arguments"
        if self.has_relative_position_bias and (reason := self._bias_reason(self.relative_position_bias)):
            return reason
        # the class for sdpa does not call its dropout
        if not self.returns_none_for_weights and (type(self.dropout) is not nn.Dropout or watches_output(self.dropout)):
            return "has a dropout of attention weights that was replaced or has hooks"
        return self.changed_forward() or (changed_sdpa() if self.returns_none_for_weights else "")

    def _bias_reason(self, bias: nn.Module) -> str:
        if not isinstance(bias, TableOrDenseMixin):
            return f"takes the dense bias of a {type(bias).__module__}.{type(bias).__qualname__}"
        reason = bias.library_forward_reason()
        return reason and f"has a bias that {reason}"

    def runs_library(self, bias: Bias | Tensor | None) -> bool:
        """Return whether Transformers' own forward must run, given the shared bias."""
        # the layer around passes the bias by position, which every hook reads
        shown = bias is not None and watches_output(self)
        return shown or isinstance(bias, (DenseBias, Tensor)) or bool(self.library_forward_reason())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = show_dense(self, args, kwargs)
        return super().__call__(*args, **kwargs)

    def attend(self, hidden_states: Tensor, bias: Any, resolution: Any) -> tuple[Tensor | None, ...]:
        if self.has_relative_position_bias:
            height, width = (side // self.config.patch_size for side in resolution)
            own = self.relative_position_bias((height, width), as_table=True)
            bias = own if bias is None else own + bias
        # as Transformers, whose class for sdpa reads the configuration
        dropout_p = self.config.attention_probs_dropout_prob if self.returns_none_for_weights else self.dropout.p
        out = attend(
            hidden_states,
            (self.query, self.key, self.value),
            bias,
            dropout_p if self.training else 0.0,
            kernels_for(hidden_states, self.attn_implementation, self.attention_head_size),
            self.attention_head_size**-0.5,
        )
        return (out, None) if self.returns_none_for_weights else (out,)


class SplitAttentionMixin(SplitAttentionBase):
    """Split layers of 5.x; with `output_attentions` or hooks Transformers' forward runs."""

    def forward(
        self,
        hidden_states: Tensor,
        output_attentions: bool = False,
        relative_position_bias: TableBias | DenseBias | Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        resolution: Any = None,
    ) -> tuple[Tensor | None, ...]:
        if not output_attentions and not self.runs_library(relative_position_bias):
            return self.attend(hidden_states, relative_position_bias, resolution)
        shared = dense(relative_position_bias)
        return super().forward(hidden_states, output_attentions, shared, interpolate_pos_encoding, resolution)


class HeadMaskAttentionMixin(SplitAttentionBase):
    """Split layers of 4.57; with `output_attentions`, a head mask or hooks Transformers' forward runs."""

    def forward(
        self,
        hidden_states: Tensor,
        head_mask: Tensor | None = None,
        output_attentions: bool = False,
        relative_position_bias: TableBias | DenseBias | Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        resolution: Any = None,
    ) -> tuple[Tensor | None, ...]:
        if not output_attentions and head_mask is None and not self.runs_library(relative_position_bias):
            return self.attend(hidden_states, relative_position_bias, resolution)
        shared = dense(relative_position_bias)
        return super().forward(
            hidden_states, head_mask, output_attentions, shared, interpolate_pos_encoding, resolution
        )


def hide_dense(module: nn.Module, name: str, value: Any) -> Any:
    """Replace a dense shared bias among the keyword arguments by a handle."""
    if not isinstance(value, Tensor) or name not in ("attention_mask", "relative_position_bias"):
        return value
    config: Any = next(part.config for part in module.modules() if hasattr(part, "config"))
    return DenseBias(value) if config.use_shared_relative_position_bias else value


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
    made = type(
        name,
        (mixin, original),
        {"__module__": __name__, "__doc__": mixin.__doc__} | attributes_of(original) | attributes,
    )
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
BLOCKS = tuple(CARRIERS)
"""The carriers that get the shared bias by keyword."""

CARRIERS.extend(TRUNKS)

ORIGINALS = {made: original for table in (FUSED, INNER_BIASES) for original, made in table.items()}
"""The Transformers class of each replacement."""
