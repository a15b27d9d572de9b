"""Self-attention with relative position bias, and its output projection."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..configuration.beit_config import BeitConfig
from ..ops.dtensor_rules import map_columns
from ..position_bias import Window, resize_table, table_rows
from .attention_backends import dense_bias, eager_attention, run_attention
from .context import BlockContext
from .linear import apply_linear
from .module_hooks import clone_if_hooked


class BeitRelativePositionBias(nn.Module):
    """Relative position bias table, resized to the window of the image.

    The table is `[(2 * height - 1) * (2 * width - 1) + 3, H]`.
    """

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

    def extra_repr(self) -> str:
        return f"window={tuple(self.native_window)}"


def _drop_relative_position_index(module: nn.Module, state_dict: dict[str, Any], prefix: str, *unused: Any) -> None:
    """Drop the index buffer of converted checkpoints: it is computed from the window."""
    state_dict.pop(f"{prefix}relative_position_index", None)


class BeitSelfAttention(nn.Module):
    """Multi-head self-attention with relative position bias: `[B, N, E]` to `[B, N, H * D]`.

    `last_kernel` is the name of the kernel that ran last, None before the first call outside `torch.compile`.
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
        self.last_kernel: str | None = None

    def forward(self, hidden_states: Tensor, context: BlockContext) -> tuple[Tensor, Tensor | None]:
        q, k, v = (  # [B, N, H, D]; under tensor parallelism H is the number of local heads
            apply_linear(linear, hidden_states, context.kernels.gemm).unflatten(-1, (-1, self.head_dim))
            for linear in (self.query, self.key, self.value)
        )
        kernels = context.kernels.serving(q.device, q.dtype)
        table = self._table(context)
        bias = context.bias if self.relative_position_bias is None else None
        dropout_p = self.dropout_p if self.training else 0.0
        weights = None
        if context.output_attentions:
            bias = dense_bias(table, context.window) if bias is None and table is not None else bias
            out, weights = eager_attention(q, k, v, bias, context.key_mask, dropout_p=dropout_p)
        else:
            out = run_attention(
                kernels.attention, q, k, v, table, context.window, context.key_mask, None, dropout_p, bias
            )
        if not torch.compiler.is_compiling():
            self.last_kernel = kernels.name
        return out.flatten(2), weights

    def _table(self, context: BlockContext) -> Tensor | None:
        """The sum of this layer's table and the shared one: the gather is linear, so one gather serves both."""
        if self.relative_position_bias is None:
            return context.table
        table = self.relative_position_bias(context.window)
        return table if context.table is None else table + context.table


class BeitSelfOutput(nn.Module):
    """Output projection of attention, then dropout."""

    def __init__(self, config: BeitConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.num_attention_heads * config.attention_head_dim, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden_states: Tensor, context: BlockContext) -> Tensor:
        return self.dropout(apply_linear(self.dense, hidden_states, context.kernels.gemm))


class BeitAttention(nn.Module):
    """Self-attention and its output projection, `[B, N, E]` to `[B, N, E]`."""

    def __init__(self, config: BeitConfig) -> None:
        super().__init__()
        self.attention = BeitSelfAttention(config)
        self.output = BeitSelfOutput(config)

    def forward(self, hidden_states: Tensor, context: BlockContext) -> tuple[Tensor, Tensor | None]:
        attended, weights = self.attention(hidden_states, context)
        return self.output(attended, context), weights
