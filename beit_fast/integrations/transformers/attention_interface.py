"""`attn_implementation="triton"` for Transformers' own BEiT and Data2VecVision classes.

`register()` adds the name and patches the bias modules. Transformers' layers pass the bias to an attention function as
a dense mask. If the configuration has "triton", the patched modules return their table, and the function reads it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import ExitStack
from types import ModuleType
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.beit import modeling_beit
from transformers.models.data2vec import modeling_data2vec_vision

from ...layers import attention_backends
from ...layers.module_hooks import watches_keywords, watches_output
from ...position_bias import Window
from ..bias_handle import dense, show_dense, showing_methods
from ..forward_scope import choose_in_forward, in_scope
from ..library_code import Functions, changed_function, library_functions
from .fused_layers import BLOCKS, FUSED, INNER_BIASES, TRUNKS, as_handle, hide_dense, table_of
from .library_reasons import INDEX
from .monkey_patch import replace_attribute, set_item
from .table_bias import DenseBias, TableBias, key_mask_of

NAME = "triton"


def enter_attention(undo: ExitStack) -> None:
    """Register the name until `undo` is closed."""
    set_item(undo, AttentionInterface._global_mapping, NAME, triton_attention)
    set_item(undo, AttentionMaskInterface._global_mapping, NAME, padding_mask)
    _enter_family(undo, modeling_beit, "Beit", "BEIT")
    _enter_family(undo, modeling_data2vec_vision, "Data2VecVision", "DATA2VEC_VISION")
    for block in BLOCKS:
        for name, method in showing_methods(block.__call__, block.forward, _hide_if_triton, _any).items():
            replace_attribute(undo, block, name, method)
        block.__init_subclass__()  # Transformers wraps the forward of a class here, for gradient checkpointing
    for trunk in TRUNKS:
        replace_attribute(undo, trunk, "forward", in_scope(trunk.forward))


def _enter_family(undo: ExitStack, modeling: ModuleType, family: str, constant: str) -> None:
    bias = getattr(modeling, f"{family}RelativePositionBias")
    base = getattr(modeling, f"{family}PreTrainedModel")
    replace_attribute(undo, bias, "__init__", _keeping_config(bias.__init__))
    replace_attribute(undo, bias, "forward", _returning_table(bias.forward, library_functions(bias, INDEX)))
    replace_attribute(undo, bias, "__call__", _returning_handle(bias.__call__))
    choose = base.get_correct_attn_implementation
    replace_attribute(undo, base, "get_correct_attn_implementation", _configuring_biases(choose, bias))
    classes = getattr(modeling, f"{constant}_SELF_ATTENTION_CLASSES", None)
    if classes is not None:  # split layers choose a class, not a function
        set_item(undo, classes, NAME, SELF_ATTENTION[classes["eager"]])
        return
    attention = getattr(modeling, f"{family}Attention")
    replace_attribute(undo, attention, "__call__", _showing_dense(attention.__call__))


def triton_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: TableBias | DenseBias | Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Compute attention as Transformers calls it: q, k, v `[B, H, N, D]` to `[B, N, H, D]`.

    With `output_attentions` the eager path runs, which also returns the attention weights. Transformers' `"eager"` or
    `"sdpa"` runs if hooks expect a dense bias.
    """
    if not isinstance(module, modeling_beit.BeitAttention):
        raise ValueError(f"attn_implementation={NAME!r} supports BEiT, not {type(module).__name__}")
    if isinstance(attention_mask, DenseBias) or watches_keywords(module):
        name = "eager" if kwargs.get("output_attentions") else "sdpa"
        run = ALL_ATTENTION_FUNCTIONS.get_interface(name, modeling_beit.eager_attention_forward)
        return run(module, query, key, value, dense(attention_mask), scaling=scaling, dropout=dropout)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    table, window, key_mask = _split_mask(attention_mask, query.shape[1])
    if key_mask is not None:
        key_mask = key_mask.expand(q.shape[0], -1)
    if not kwargs.get("output_attentions"):
        backend = choose_in_forward(NAME, q.device, q.dtype, q.shape[-1]).attention
        return attention_backends.run_attention(backend, q, k, v, table, window, key_mask, scaling, dropout), None
    bias = None if table is None or window is None else attention_backends.dense_bias(table, window)
    return attention_backends.eager_attention(q, k, v, bias, key_mask, scaling, dropout)


def _split_mask(mask: TableBias | Tensor | None, heads: int) -> tuple[Tensor | None, Window | None, Tensor | None]:
    """Return the table, window and key mask of an attention mask."""
    if isinstance(mask, TableBias):
        return mask.table, mask.window, mask.key_mask
    if mask is None:
        return None, None, None
    if mask.ndim == 4 and mask.shape[1] == heads > 1:
        raise ValueError(
            f"attention got a dense bias {list(mask.shape)}: the model was built before register() and its "
            f"configuration was changed afterwards; call model.set_attn_implementation({NAME!r})"
        )
    return None, None, key_mask_of(mask)


def padding_mask(*args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
    """Build the mask as Transformers calls it: bool `[B, 1, 1, N]`, True = attend; None without a mask."""
    return None if attention_mask is None else attention_mask[:, None, None, :]


def _keeping_config(init: Callable[..., None]) -> Callable[..., None]:
    def init_and_keep_config(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        init(self, config, *args, **kwargs)
        self.config = config

    return init_and_keep_config


def _returning_table(forward: Callable[..., Tensor], index: Functions) -> Callable[..., TableBias | Tensor]:
    @functools.wraps(forward)
    def forward_of_implementation(self: Any, window_size: Any, *args: Any, **kwargs: Any) -> TableBias | Tensor:
        if not _asks_for_triton(self) or watches_output(self) or changed_function(index, type(self), self):
            return forward(self, window_size, *args, **kwargs)
        return table_of(self, window_size)

    return forward_of_implementation


def _returning_handle(call: Callable[..., Any]) -> Callable[..., Any]:
    def call_of_implementation(self: Any, *args: Any, **kwargs: Any) -> Any:
        bias = call(self, *args, **kwargs)
        return as_handle(bias) if _asks_for_triton(self) else bias

    return call_of_implementation


def _showing_dense(call: Callable[..., Any]) -> Callable[..., Any]:
    def call_showing_dense(self: Any, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = show_dense(self, args, kwargs)
        return call(self, *args, **kwargs)

    return call_showing_dense


def _hide_if_triton(module: nn.Module, name: str, value: Any) -> Any:
    asks = any(_asks_for_triton(part) for part in module.modules())
    return hide_dense(module, name, value) if asks else value


def _any(module: nn.Module) -> bool:
    return True


def _asks_for_triton(module: Any) -> bool:
    return getattr(getattr(module, "config", None), "_attn_implementation", None) == NAME


def _configuring_biases(choose: Callable[..., str], bias: type[nn.Module]) -> Callable[..., str]:
    """Patch the choice of an implementation: bias modules built before get their configuration."""

    def get_correct_attn_implementation(self: Any, *args: Any, **kwargs: Any) -> str:
        implementation = choose(self, *args, **kwargs)
        if implementation == NAME:
            for module in self.modules():
                if isinstance(module, bias):
                    module.config = self.config
        return implementation

    return get_correct_attn_implementation


class TritonSelfAttentionMixin(nn.Module):
    """Self-attention of split layers that reads its own and a shared table."""

    attn_implementation = NAME
    has_relative_position_bias: bool

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.has_relative_position_bias:
            inner: Any = self.relative_position_bias
            inner.__class__ = INNER_BIASES[type(inner)]


def _subclass(eager: type[nn.Module]) -> type[nn.Module]:
    name = f"Triton{eager.__name__}"
    attributes = {"__module__": __name__, "__doc__": TritonSelfAttentionMixin.__doc__}
    made = type(name, (TritonSelfAttentionMixin, FUSED[eager]), attributes)
    globals()[name] = made  # pickle looks it up here
    return made


SELF_ATTENTION: dict[type[nn.Module], type[nn.Module]] = {
    getattr(modeling, name): _subclass(getattr(modeling, name))
    for modeling, name in (
        (modeling_beit, "BeitSelfAttention"),
        (modeling_data2vec_vision, "Data2VecVisionSelfAttention"),
    )
    if hasattr(modeling, name)
}
"""The class that split layers build for the name, by Transformers' eager class."""
