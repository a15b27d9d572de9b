"""Transformer blocks of BEiT and their stack."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from ..configuration.beit_config import BeitConfig
from ..ops.dispatch import availability
from ..ops.residual_norm import residual_add, residual_norm
from ..position_bias import Window
from ..utils.messages import full_name
from .attention import BeitAttention, BeitRelativePositionBias, BeitSelfAttention
from .attention_backends import dense_bias
from .context import BlockContext, Kernels, kernels_for
from .drop_path import BeitDropPath
from .mlp import BeitIntermediate, BeitOutput
from .module_hooks import hook_reasons

_DROP_PATH = re.compile(r"(?<=\(drop_path\): )(Identity\(\)|BeitDropPath\(p=[^)]*\))")


class BeitLayer(nn.Module):
    """A block: `x + lambda_1 * attention(norm(x))`, then `x + lambda_2 * mlp(norm(x))`, drop path on both branches.

    If attention runs in Triton kernels, so do the sums and the norm between them. These operators read the parameters
    of `layernorm_after` and draw from `drop_path`, without calling them. If one of the two modules was replaced or has
    hooks, both are called instead.
    """

    def __init__(self, config: BeitConfig, drop_path_rate: float = 0.0) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.layer_norm_eps
        self.attention = BeitAttention(config)
        self.intermediate = BeitIntermediate(config)
        self.output = BeitOutput(config)
        self.layernorm_before = nn.LayerNorm(size, eps=eps)
        self.layernorm_after = nn.LayerNorm(size, eps=eps)
        self.drop_path = BeitDropPath(drop_path_rate) if drop_path_rate > 0 else nn.Identity()
        initial = config.layer_scale_init_value
        self.lambda_1 = nn.Parameter(torch.full((size,), initial)) if initial > 0 else None
        self.lambda_2 = nn.Parameter(torch.full((size,), initial)) if initial > 0 else None

    def forward(self, hidden_states: Tensor, context: BlockContext) -> tuple[Tensor, Tensor | None]:
        """Run the block, `[B, N, E]` to `[B, N, E]`. The attention weights `[B, H, N, N]` are returned if requested."""
        context = context.serving(hidden_states)
        branch, weights = self.attention(self.layernorm_before(hidden_states), context)
        if context.kernels.fuse_residual_norm and self._can_fuse(hidden_states, branch):
            return self._fused_half(hidden_states, branch, context), None
        hidden_states = hidden_states + self.drop_path(_scaled(branch, self.lambda_1))
        branch = self.output(self.intermediate(self.layernorm_after(hidden_states), context), context)
        return hidden_states + self.drop_path(_scaled(branch, self.lambda_2)), weights

    def unsupported_reasons(self) -> list[str]:
        """Return the reasons why operators cannot replace `layernorm_after` and `drop_path` here.

        The list is empty if they can.
        """
        modules = {"layernorm_after": self.layernorm_after, "drop_path": self.drop_path}
        accepted = {"layernorm_after": (nn.LayerNorm,), "drop_path": (BeitDropPath, nn.Identity)}
        replaced = [
            f"{name} is a {full_name(type(module))}"
            for name, module in modules.items()
            if type(module) not in accepted[name]
        ]
        return replaced + hook_reasons(modules)

    def _can_fuse(self, hidden_states: Tensor, branch: Tensor) -> bool:
        """Whether the Triton kernels can fuse residual, drop path and LayerNorm here."""
        self_attention = getattr(self.attention, "attention", None)
        if not isinstance(self_attention, BeitSelfAttention) or hasattr(branch, "device_mesh"):
            return False  # a DTensor has a mesh, and the operators have no rules for it
        if self.unsupported_reasons():
            return False
        norm = self.layernorm_after
        tensors = (hidden_states, branch, self.lambda_1, self.lambda_2, norm.weight, norm.bias)
        return availability.triton_takes_rows(branch.shape[-1], [x.dtype for x in tensors if x is not None])

    def _fused_half(self, hidden_states: Tensor, branch: Tensor, context: BlockContext) -> Tensor:
        norm = self.layernorm_after
        hidden_states, normalized = residual_norm(
            hidden_states, branch, self.lambda_1, self._drop_path_scale(branch), norm.weight, norm.bias, norm.eps
        )
        branch = self.output(self.intermediate(normalized, context), context)
        return residual_add(hidden_states, branch, self.lambda_2, self._drop_path_scale(branch))

    def _drop_path_scale(self, branch: Tensor) -> Tensor | None:
        return self.drop_path.drop_path_scale(branch) if isinstance(self.drop_path, BeitDropPath) else None


def _scaled(branch: Tensor, layer_scale: Tensor | None) -> Tensor:
    return branch if layer_scale is None else layer_scale * branch


class BeitLayers(nn.ModuleList):
    """The blocks of an encoder.

    `repr` shows blocks that differ only in drop path as one.
    """

    def __repr__(self) -> str:
        parts = [_DROP_PATH.split(repr(layer), maxsplit=1) for layer in self]  # text, drop path, text
        groups = groupby(range(len(parts)), lambda index: parts[index][::2])
        return "\n".join([f"{self._get_name()}(", *(_shown([*group], parts) for _, group in groups), ")"])


def _shown(indices: Sequence[int], parts: Sequence[Sequence[str]]) -> str:
    """Show equal blocks as one.

    It has the drop path of the first and of the last block.
    """
    first, last = parts[indices[0]], parts[indices[-1]]
    drop_path = " to ".join(dict.fromkeys((*first[1:2], *last[1:2])))
    text = drop_path.join(first[::2]).replace("\n", "\n  ")
    if len(indices) == 1:
        return f"  ({indices[0]}): {text}"
    return f"  ({indices[0]}-{indices[-1]}): {len(indices)} x {text}"


class BeitEncoder(nn.Module):
    """The stack of blocks and the bias table that they may share."""

    def __init__(self, config: BeitConfig) -> None:
        super().__init__()
        self.relative_position_bias = (
            BeitRelativePositionBias(config) if config.use_shared_relative_position_bias else None
        )
        last = max(config.num_hidden_layers - 1, 1)
        rates = [config.drop_path_rate * index / last for index in range(config.num_hidden_layers)]
        self.layer = BeitLayers(BeitLayer(config, rate) for rate in rates)
        self.head_dim = config.attention_head_dim
        self.attn_implementation: str | None = None
        self.gradient_checkpointing = False
        self.checkpoint_options: dict[str, Any] = {"use_reentrant": False}
        self.checkpoint_every = 1
        self.checkpoint_offload = False
        # Transformers sets it in the encoders of a model around this one: checkpoint with its options.
        self._gradient_checkpointing_func: Callable[..., Any] | None = None

    def forward(
        self,
        hidden_states: Tensor,
        window: Window,
        key_mask: Tensor | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        kernels: Kernels | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...] | None, tuple[Tensor, ...] | None]:
        """Run the blocks.

        `kernels` are those of this forward pass if the model has chosen them. If None, they are chosen here.

        Returns:
            The last block's output `[B, N, E]` and, if requested, all states (the input first) and all attention
            weights.
        """
        if kernels is None:
            kernels = kernels_for(hidden_states, self.attn_implementation, self.head_dim)
        context = self._context(kernels.eager() if output_attentions else kernels, window, key_mask, output_attentions)
        states, attentions = [hidden_states], []
        for index, layer in enumerate(self.layer):
            if self.gradient_checkpointing and self.training and index % self.checkpoint_every == 0:
                hidden_states, weights = self._checkpointed(layer, hidden_states, context)
            else:
                hidden_states, weights = layer(hidden_states, context)
            if output_hidden_states:
                states.append(hidden_states)
            if weights is not None:
                attentions.append(weights)
        return (
            hidden_states,
            tuple(states) if output_hidden_states else None,
            tuple(attentions) if output_attentions else None,
        )

    def _context(
        self, kernels: Kernels, window: Window, key_mask: Tensor | None, output_attentions: bool
    ) -> BlockContext:
        """Make the context of the blocks. It holds the shared dense bias if every block would gather the same one."""
        table = None if self.relative_position_bias is None else self.relative_position_bias(window)
        bias = None
        if table is not None and kernels.attention != "triton" and not self._layers_have_own_bias():
            bias = dense_bias(table, window)
        return BlockContext(window, table, bias, key_mask, kernels, output_attentions)

    def _layers_have_own_bias(self) -> bool:
        first = next(module for module in self.modules() if isinstance(module, BeitSelfAttention))
        return first.relative_position_bias is not None

    def _checkpointed(
        self, layer: nn.Module, hidden_states: Tensor, context: BlockContext
    ) -> tuple[Tensor, Tensor | None]:
        """Run a block without keeping its activations."""

        def run(hidden_states: Tensor, table: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
            window, _, _, key_mask, kernels, output_attentions = context
            return layer(hidden_states, BlockContext(window, table, bias, key_mask, kernels, output_attentions))

        # Reentrant checkpointing differentiates only tensors that are arguments themselves.
        arguments = hidden_states, context.table, context.bias
        if self._gradient_checkpointing_func is not None:
            return self._gradient_checkpointing_func(run, *arguments)
        if not self.checkpoint_offload:
            return torch.utils.checkpoint.checkpoint(run, *arguments, **self.checkpoint_options)
        with torch.autograd.graph.save_on_cpu(pin_memory=hidden_states.device.type == "cuda"):
            return torch.utils.checkpoint.checkpoint(run, *arguments, **self.checkpoint_options)
