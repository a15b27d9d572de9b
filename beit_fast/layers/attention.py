"""Self-attention with relative position bias, and its output projection."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..configuration.beit_config import BeitConfig
from ..ops.dispatch import attention
from ..ops.dtensor_rules import map_columns
from ..position_bias import Window, resize_table, table_rows
from .attention_backends import attend, dense_bias, eager_attention
from .linear import apply_linear
from .module_hooks import clone_if_hooked


class BeitRelativePositionBias(nn.Module):
    """A bias table `[(2 * height - 1) * (2 * width - 1) + 3, H]` for the native window, resized to any other."""

    def __init__(self, config: BeitConfig) -> None:
        super().__init__()
        self.native_window = config.window
        rows = table_rows(config.window)
        self.relative_position_bias_table = nn.Parameter(torch.zeros(rows, config.num_attention_heads))
        self.register_load_state_dict_pre_hook(_drop_relative_position_index)

    def forward(self, window: Window) -> Tensor:
        parameter = self.relative_position_bias_table
        table = map_columns(partial(resize_table, old_window=self.native_window, new_window=window), parameter)
        return clone_if_hooked(self, table)


def _drop_relative_position_index(module: nn.Module, state_dict: dict[str, Any], prefix: str, *unused: Any) -> None:
    """Converted checkpoints carry the index as a buffer; it follows from the window and is computed."""
    state_dict.pop(f"{prefix}relative_position_index", None)


class BeitSelfAttention(nn.Module):
    """Multi-head self-attention with relative position bias, `[B, N, E]` to `[B, N, H * D]`.

    `attn_implementation` is a name of `beit_fast.ops.dispatch.attention` or None; `kernel` names what ran last.
    """

    def __init__(self, config: BeitConfig) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.head_dim = config.attention_head_dim
        inner = self.num_heads * self.head_dim
        self.query = nn.Linear(config.hidden_size, inner)
        self.key = nn.Linear(config.hidden_size, inner, bias=False)
        self.value = nn.Linear(config.hidden_size, inner)
        self.dropout_p = config.attention_probs_dropout_prob
        self.relative_position_bias = BeitRelativePositionBias(config) if config.use_relative_position_bias else None
        self.attn_implementation: str | None = None
        self.kernel: str | None = None

    def forward(
        self,
        hidden_states: Tensor,
        window: Window,
        shared_table: Tensor | None = None,
        shared_bias: Tensor | None = None,
        key_mask: Tensor | None = None,
        output_attentions: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        q, k, v = (  # [B, N, H, D]; tensor parallelism leaves each process some of the heads
            apply_linear(linear, hidden_states, self.attn_implementation).unflatten(-1, (-1, self.head_dim))
            for linear in (self.query, self.key, self.value)
        )
        table = self._table(window, shared_table)
        bias = shared_bias if self.relative_position_bias is None else None
        dropout_p = self.dropout_p if self.training else 0.0
        weights = None
        if output_attentions:
            bias = dense_bias(table, window) if bias is None and table is not None else bias
            out, weights = eager_attention(q, k, v, bias, key_mask, dropout_p=dropout_p)
        else:
            out = attend(q, k, v, table, window, key_mask, None, dropout_p, self.attn_implementation, bias)
        if not torch.compiler.is_compiling():
            asked = "eager" if output_attentions else self.attn_implementation
            self.kernel = attention.kernel_name(asked, q.device, q.dtype, self.head_dim)
        return out.flatten(2), weights

    def _table(self, window: Window, shared_table: Tensor | None) -> Tensor | None:
        """The gather is linear, so two biases are one gather from the sum of their tables."""
        if self.relative_position_bias is None:
            return shared_table
        table = self.relative_position_bias(window)
        return table if shared_table is None else table + shared_table


class BeitSelfOutput(nn.Module):
    """Output projection of attention, then dropout."""

    def __init__(self, config: BeitConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.num_attention_heads * config.attention_head_dim, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.attn_implementation: str | None = None

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.dropout(apply_linear(self.dense, hidden_states, self.attn_implementation))


class BeitAttention(nn.Module):
    """Self-attention and its output projection, `[B, N, E]` to `[B, N, E]`."""

    def __init__(self, config: BeitConfig) -> None:
        super().__init__()
        self.attention = BeitSelfAttention(config)
        self.output = BeitSelfOutput(config)

    def forward(self, hidden_states: Tensor, window: Window, *args: Any) -> tuple[Tensor, Tensor | None]:
        mixed, weights = self.attention(hidden_states, window, *args)
        return self.output(mixed), weights
