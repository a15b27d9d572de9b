"""The encoder of an optimized model: folded blocks and a cache of biases."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers.attention_backends import dense_bias, eager_attention, run_attention
from ..layers.block import BeitEncoder, BeitLayer
from ..layers.context import BlockContext, Kernels, kernels_for
from ..ops.dispatch import availability
from ..ops.packed_bias import pack_bias, packed_bias_attention
from ..ops.residual_norm import residual_norm
from ..position_bias import Window, resize_table, token_count
from .compilation import raise_if_compiling
from .folding import FoldedLayer, fold_layer
from .linear import InferenceLinear, build_linear


class LayerBias(NamedTuple):
    """The bias of a layer for one window: its table `[rows, H]` and the packed bias of the Triton kernels."""

    table: Tensor | None
    packed: Any


Biases = tuple[LayerBias, ...]


class BiasCache:
    """A cache of the biases for the last `limit` windows.

    Each bias is for the attention kernel of a forward pass.
    """

    def __init__(self, make: Callable[[Window, str], Biases], limit: int = 8) -> None:
        self.limit = limit
        self._make = make
        self._biases: OrderedDict[tuple[Window, str], Biases] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._biases)

    def __call__(self, window: Window, kernel: str) -> Biases:
        key = (window, kernel)
        with self._lock:
            biases = self._biases.pop(key, None)
            if biases is None:
                biases = self._make(window, kernel)
                while len(self._biases) >= self.limit:
                    self._biases.popitem(last=False)
            self._biases[key] = biases
            return biases

    def held(self) -> list[Biases]:
        """Return the cached biases. A CUDA graph that captures their addresses must keep a reference."""
        return list(self._biases.values())

    def clear(self) -> None:
        """Drop all biases, because they depend on the attention kernel."""
        with self._lock:
            self._biases.clear()


class FoldedBlock(nn.Module):
    """A folded block: attention, four linear layers, and norms without gain and shift."""

    def __init__(self, folded: FoldedLayer, num_heads: int, rows: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.eps = folded.eps
        self.last_kernel: str | None = None
        self.qkv = build_linear(folded.qkv, rows)
        self.out = build_linear(folded.out, rows)
        self.up = build_linear(folded.up, rows, folded.activation)
        self.down = build_linear(folded.down, rows)

    def forward(self, hidden_states: Tensor, bias: LayerBias, context: BlockContext) -> tuple[Tensor, Tensor | None]:
        """Return `[B, N, E]`, and the attention weights if requested.

        The weights have the shape `[B, H, N, N]`.
        """
        attended, weights = self.self_attention(self.norm(hidden_states, 0), bias, context)
        hidden_states = self.out.add(attended, hidden_states)
        return self.down.add(self.up(self.norm(hidden_states, 1)), hidden_states), weights

    def norm(self, hidden_states: Tensor, number: int) -> Tensor:
        """Normalize before attention (0) or before the MLP (1)."""
        return F.layer_norm(hidden_states, hidden_states.shape[-1:], eps=self.eps[number])

    def self_attention(
        self, normalized: Tensor, bias: LayerBias, context: BlockContext
    ) -> tuple[Tensor, Tensor | None]:
        """Attend without the output projection: return `[B, N, H * D]` and the attention weights."""
        q, k, v = self.qkv(normalized).unflatten(-1, (3, self.num_heads, -1)).unbind(2)  # [B, N, H, D]
        kernels = context.kernels.serving(q.device, q.dtype)
        self.last_kernel = kernels.name
        weights = None
        if context.output_attentions:
            dense = None if bias.table is None else dense_bias(bias.table, context.window)
            out, weights = eager_attention(q, k, v, dense, context.key_mask, scale=1.0)
        elif kernels.name in availability.TRITON_KERNELS:
            out = packed_bias_attention(q, k, v, bias.table, context.key_mask, context.window, 1.0, bias.packed)
        else:
            out = run_attention(kernels.attention, q, k, v, bias.table, context.window, context.key_mask, 1.0)
        return out.flatten(2), weights


class FoldedEncoder(nn.Module):
    """An encoder of folded blocks with the interface of `BeitEncoder`; it shares no memory with the original.

    Args:
        encoder: the encoder to fold.
        dtype: dtype of weights and arithmetic.
        rows: tokens in a batch, `B * N`, that weights are packed for; other numbers work too.
    """

    def __init__(self, encoder: BeitEncoder, dtype: torch.dtype, rows: int) -> None:
        super().__init__()
        blocks = [layer for layer in encoder.layer if isinstance(layer, BeitLayer)]
        first = blocks[0].attention.attention
        self.num_heads: int = first.num_heads
        self.head_dim: int = first.head_dim
        self.attn_implementation: str | None = encoder.attn_implementation
        self.dtype, self.device = dtype, first.query.weight.device
        self.layer = nn.ModuleList()
        tables = []
        for block in blocks:
            folded = fold_layer(block, dtype)
            self.layer.append(FoldedBlock(folded, first.num_heads, rows))
            tables.append(folded.table)
        self.biases = BiasCache(self._biases_for)
        self._native_tables = _with_shared_table(encoder, tables)
        biases = (encoder.relative_position_bias, first.relative_position_bias)
        self._native_window = next((bias.native_window for bias in biases if bias is not None), None)

    @torch.no_grad()
    def forward(
        self,
        hidden_states: Tensor,
        window: Window,
        key_mask: Tensor | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        kernels: Kernels | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...] | None, tuple[Tensor, ...] | None]:
        """Run all blocks, as `BeitEncoder.forward` does."""
        raise_if_compiling()
        if kernels is None:
            kernels = kernels_for(hidden_states, self.attn_implementation, self.head_dim)
        kernels = kernels.eager() if output_attentions else kernels
        context = BlockContext(window, None, None, key_mask, kernels, output_attentions)
        run = self._run_fused if self._fuses_norms(hidden_states) else self._run
        states, attentions = [hidden_states], []
        last = hidden_states
        for last, weights in run(hidden_states, context):
            if output_hidden_states:
                states.append(last)
            if weights is not None:
                attentions.append(weights)
        return (
            last,
            tuple(states) if output_hidden_states else None,
            tuple(attentions) if output_attentions else None,
        )

    def _run(self, hidden_states: Tensor, context: BlockContext) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Yield the output and the attention weights of each block."""
        biases = self.biases(context.window, context.kernels.name)
        for block, bias in zip(self.blocks(), biases, strict=True):
            hidden_states, weights = block(hidden_states, bias, context)
            yield hidden_states, weights

    def _run_fused(self, hidden_states: Tensor, context: BlockContext) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Yield the output and the attention weights of each block.

        One kernel computes each residual and the norm after it.
        """
        blocks, biases = list(self.blocks()), self.biases(context.window, context.kernels.name)
        normalized = blocks[0].norm(hidden_states, 0)
        for block, bias, following in zip(blocks, biases, [*blocks[1:], None], strict=True):
            attended, weights = block.self_attention(normalized, bias, context)
            hidden_states, normalized = residual_norm(hidden_states, block.out(attended), eps=block.eps[1])
            branch = block.down(block.up(normalized))
            if following is None:
                hidden_states = hidden_states + branch
            else:
                hidden_states, normalized = residual_norm(hidden_states, branch, eps=following.eps[0])
            yield hidden_states, weights

    def _fuses_norms(self, hidden_states: Tensor) -> bool:
        """Whether Triton kernels can compute the residuals and norms."""
        if hidden_states.device.type == "cpu" and not availability.INTERPRETED:
            return False
        size = hidden_states.shape[-1]
        rows = hidden_states.numel() // size
        return not availability.residual_norm_unsupported_reasons(
            hidden_states.device, [hidden_states.dtype], size, rows
        )

    def set_attn_implementation(self, attn_implementation: str | None) -> None:
        """Set the attention implementation of every block."""
        self.attn_implementation = attn_implementation
        self.biases.clear()
        for block in self.blocks():
            block.last_kernel = None

    def blocks(self) -> Iterator[FoldedBlock]:
        """Iterate over the blocks."""
        return (block for block in self.layer if isinstance(block, FoldedBlock))

    def linears(self) -> Iterator[InferenceLinear]:
        """Iterate over the linear layers of all blocks."""
        for block in self.blocks():
            yield from (block.qkv, block.out, block.up, block.down)

    def weight_bytes(self) -> int:
        """Return the bytes of the folded weights and of the native tables."""
        tables = {id(table): table for table in self._native_tables if table is not None}.values()
        return sum(linear.weight_bytes() for linear in self.linears()) + sum(t.nbytes for t in tables)

    def _biases_for(self, window: Window, kernel: str) -> Biases:
        """Build the bias of every layer.

        Layers that share a table share one bias.
        """
        made: dict[int, LayerBias] = {}
        for table in self._native_tables:
            if id(table) not in made:
                made[id(table)] = self._bias_for(table, window, kernel)
        return tuple(made[id(table)] for table in self._native_tables)

    def _bias_for(self, table: Tensor | None, window: Window, kernel: str) -> LayerBias:
        if table is not None and self._native_window is not None:
            table = resize_table(table, self._native_window, window)
        if kernel not in availability.TRITON_KERNELS:
            return LayerBias(table, None)
        like = torch.empty(1, token_count(window), self.num_heads, self.head_dim, dtype=self.dtype, device=self.device)
        return LayerBias(table, pack_bias(table, window, 1.0, like))


def _with_shared_table(encoder: BeitEncoder, tables: list[Tensor | None]) -> tuple[Tensor | None, ...]:
    """Add the shared table to each layer's table; resizing is linear, so the sum is resized once."""
    if encoder.relative_position_bias is None:
        return tuple(tables)
    parameter = encoder.relative_position_bias.relative_position_bias_table.detach()
    shared = parameter.to(torch.promote_types(parameter.dtype, torch.float32), copy=True)
    return tuple(shared if table is None else table + shared for table in tables)
