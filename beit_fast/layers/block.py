"""The layers of BEiT: embeddings, attention, MLP, layer scale and drop path, block, encoder.

Module and parameter names are those of the checkpoints on the hub.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..configuration.beit_config import BeitConfig
from ..ops.dispatch import attention, availability
from ..ops.dispatch import patch_embed as patch_embedding
from ..ops.dispatch.patch_embed import Normalization
from ..ops.dtensor_rules import map_columns
from ..ops.functorch import patch_embed, transforms_are_active
from ..ops.residual_norm import residual_add, residual_norm
from ..position_bias import Window, resize_position_embeddings, resize_table, table_rows
from .activations import ACTIVATIONS
from .linear import apply_linear
from .module_hooks import clone_if_hooked, hook_obstacles


def window_of(pixel_values: Tensor, patch_size: int) -> Window:
    """Patches that fit into an image `[B, C, H, W]`, `(height, width)`; what does not fill a patch is cropped."""
    height, width = pixel_values.shape[-2:]
    if height < patch_size or width < patch_size:
        raise ValueError(f"images of {height}x{width} pixels are smaller than one patch of {patch_size}x{patch_size}")
    return height // patch_size, width // patch_size


class BeitPatchEmbeddings(nn.Module):
    """Patches as tokens: `[B, C, H, W]` to `[B, P, E]` by a convolution whose stride is its kernel."""

    def __init__(self, config: BeitConfig) -> None:
        super().__init__()
        self.num_channels = config.num_channels
        self.patch_size = config.patch_size
        self.num_patches = config.num_patches
        self.projection = nn.Conv2d(config.num_channels, config.hidden_size, config.patch_size, config.patch_size)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.projection(pixel_values).flatten(2).transpose(1, 2)


class BeitEmbeddings(nn.Module):
    """CLS, patches (some replaced by the mask token) and, where configured, absolute positions: `[B, 1 + P, E]`.

    `patch_embed_implementation` is a name of `ops.dispatch.patch_embed` or None, which follows `attn_implementation`;
    `kernel` names what ran last. `"fused"` is one operator for all steps: it reads the parameters of
    `patch_embeddings.projection` and calls neither module. Where one of them was replaced or has hooks, None therefore
    takes `"conv"`, which calls them, and `"fused"` is an error.
    """

    def __init__(self, config: BeitConfig) -> None:
        super().__init__()
        self.config = config
        size = config.hidden_size
        self.native_window = config.window
        self.cls_token = nn.Parameter(torch.zeros(1, 1, size))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, size)) if config.use_mask_token else None
        self.patch_embeddings = BeitPatchEmbeddings(config)
        self.position_embeddings = (
            nn.Parameter(torch.zeros(1, config.num_patches + 1, size))
            if config.use_absolute_position_embeddings
            else None
        )
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.attn_implementation: str | None = None
        self.patch_embed_implementation: str | None = None
        self.kernel: str | None = None

    def forward(self, pixel_values: Tensor, window: Window, bool_masked_pos: Tensor | None = None) -> Tensor:
        channels = self.config.num_channels
        if pixel_values.ndim != 4 or pixel_values.shape[1] != channels:
            raise ValueError(f"pixel_values must be [batch, {channels}, height, width], not {list(pixel_values.shape)}")
        normalization = patch_embedding.normalization_of(pixel_values, self.config.pixel_mean, self.config.pixel_std)
        mask = self._mask(bool_masked_pos, (pixel_values.shape[0], window[0] * window[1]))
        positions: Tensor | None = self.position_embeddings
        if positions is not None:
            positions = resize_position_embeddings(positions, self.native_window, window)
        resolved = patch_embedding.resolve(
            self.patch_embed_implementation,
            self.attn_implementation,
            self.cls_token,
            self.config.attention_head_dim,
            self.obstacles_to_fusing(),
        )
        embed = self._fuse if resolved == "fused" else self._convolve
        tokens = embed(pixel_values, normalization, mask, positions)
        if not torch.compiler.is_compiling():
            self.kernel = patch_embedding.kernel_name(resolved, pixel_values, self.cls_token)
        return self.dropout(tokens)

    def obstacles_to_fusing(self) -> list[str]:
        """Why the operator cannot take the place of the modules here; empty where it can."""
        return patch_embedding.obstacles_to_fusing(self.patch_embeddings, BeitPatchEmbeddings)

    def _fuse(
        self, pixels: Tensor, normalization: Normalization | None, mask: Tensor | None, positions: Tensor | None
    ) -> Tensor:
        projection = self.patch_embeddings.projection
        mask_token = None if mask is None else self.mask_token
        mean, std = (None, None) if normalization is None else normalization
        return patch_embed(
            pixels, projection.weight, projection.bias, self.cls_token, mask, mask_token, positions, mean, std
        )

    def _convolve(
        self, pixels: Tensor, normalization: Normalization | None, mask: Tensor | None, positions: Tensor | None
    ) -> Tensor:
        dtypes = (p.dtype for p in self.patch_embeddings.parameters() if p.is_floating_point())
        dtype = next(dtypes, self.cls_token.dtype)
        tokens = self.patch_embeddings(patch_embedding.float_pixels(pixels, normalization, dtype))
        if mask is not None and self.mask_token is not None:
            tokens = torch.where(mask.unsqueeze(-1), self.mask_token.to(tokens.dtype), tokens)
        tokens = torch.cat([self.cls_token.expand(tokens.shape[0], -1, -1), tokens], dim=1)
        return tokens if positions is None else tokens + positions

    def _mask(self, bool_masked_pos: Tensor | None, accepted: tuple[int, int]) -> Tensor | None:
        """`bool_masked_pos`, `[B, P]` or `[B, h, w]` of any type, as bool of the accepted shape `[B, P]`."""
        if bool_masked_pos is None:
            return None
        if self.mask_token is None:
            raise ValueError("bool_masked_pos needs a mask token: build the model with use_mask_token=True")
        masked = bool_masked_pos.flatten(1).bool()
        if masked.shape != accepted:
            raise ValueError(
                f"bool_masked_pos must be [batch, patches] = {list(accepted)}, not {list(bool_masked_pos.shape)}"
            )
        return masked


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
            bias = attention.dense_bias(table, window) if bias is None and table is not None else bias
            out, weights = attention.eager_attention(q, k, v, bias, key_mask, dropout_p=dropout_p)
        else:
            out = attention.attend(q, k, v, table, window, key_mask, None, dropout_p, self.attn_implementation, bias)
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


class BeitIntermediate(nn.Module):
    """First half of the MLP: expand, activate."""

    def __init__(self, config: BeitConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation = ACTIVATIONS[config.hidden_act]()
        self.attn_implementation: str | None = None

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.activation(apply_linear(self.dense, hidden_states, self.attn_implementation))


class BeitOutput(nn.Module):
    """Second half of the MLP: contract, dropout."""

    def __init__(self, config: BeitConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.intermediate_size, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.attn_implementation: str | None = None

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.dropout(apply_linear(self.dense, hidden_states, self.attn_implementation))


class BeitDropPath(nn.Module):
    """Stochastic depth per sample (arXiv 1603.09382): a residual branch is dropped, or scaled by 1 / keep."""

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, branch: Tensor) -> Tensor:
        factors = self._draw(branch)
        return branch if factors is None else branch * factors.view(-1, *[1] * (branch.ndim - 1))

    def factors(self, branch: Tensor) -> Tensor | None:
        """fp32 `[B]`: what `forward` would multiply each sample of this branch by; None where nothing is dropped."""
        return self._draw(branch, torch.float32)

    def _draw(self, branch: Tensor, dtype: torch.dtype | None = None) -> Tensor | None:
        if self.drop_prob == 0.0 or not self.training:
            return None
        keep_prob = 1.0 - self.drop_prob
        keep = branch.new_empty(branch.shape[0]).bernoulli_(keep_prob).to(dtype or branch.dtype)
        return keep / keep_prob if keep_prob > 0 else keep

    def extra_repr(self) -> str:
        return f"p={self.drop_prob}"


class BeitLayer(nn.Module):
    """A block: `x + lambda_1 * attention(norm(x))`, then `x + lambda_2 * mlp(norm(x))`, drop path on both branches.

    Where attention runs Triton's kernels, so do the sums and the norm between them, in one operator each; it reads the
    parameters of `layernorm_after`, draws from `drop_path`, and calls neither. Where one of them was replaced or has
    hooks, both are called.
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

    def forward(
        self,
        hidden_states: Tensor,
        window: Window,
        shared_table: Tensor | None = None,
        shared_bias: Tensor | None = None,
        key_mask: Tensor | None = None,
        output_attentions: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        branch, weights = self.attention(
            self.layernorm_before(hidden_states),
            window,
            shared_table,
            shared_bias,
            key_mask,
            output_attentions,
        )
        if not output_attentions and self._fuses(hidden_states, branch):
            return self._fused_half(hidden_states, branch), None
        hidden_states = hidden_states + self.drop_path(_scaled(branch, self.lambda_1))
        branch = self.output(self.intermediate(self.layernorm_after(hidden_states)))
        return hidden_states + self.drop_path(_scaled(branch, self.lambda_2)), weights

    def obstacles_to_fusing(self) -> list[str]:
        """Why operators cannot take the place of `layernorm_after` and `drop_path` here; empty where they can."""
        modules = {"layernorm_after": self.layernorm_after, "drop_path": self.drop_path}
        accepted = {"layernorm_after": (nn.LayerNorm,), "drop_path": (BeitDropPath, nn.Identity)}
        replaced = [
            f"{name} is a {type(module).__name__}"
            for name, module in modules.items()
            if type(module) not in accepted[name]
        ]
        return replaced + hook_obstacles(modules)

    def _fuses(self, hidden_states: Tensor, branch: Tensor) -> bool:
        """Whether Triton's kernels run attention here, and could all that comes after it."""
        mixer = getattr(self.attention, "attention", None)
        if not isinstance(mixer, BeitSelfAttention) or transforms_are_active() or hasattr(branch, "device_mesh"):
            return False  # a DTensor has a mesh, and the operators have no rules for it
        kernel = attention.kernel_name(mixer.attn_implementation, branch.device, branch.dtype, mixer.head_dim)
        if kernel not in availability.TRITON_KERNELS or self.obstacles_to_fusing():
            return False
        norm = self.layernorm_after
        tensors = (hidden_states, branch, self.lambda_1, self.lambda_2, norm.weight, norm.bias)
        return availability.triton_takes_rows(branch.shape[-1], [x.dtype for x in tensors if x is not None])

    def _fused_half(self, hidden_states: Tensor, branch: Tensor) -> Tensor:
        norm = self.layernorm_after
        hidden_states, normalized = residual_norm(
            hidden_states, branch, self.lambda_1, self._drop_factors(branch), norm.weight, norm.bias, norm.eps
        )
        branch = self.output(self.intermediate(normalized))
        return residual_add(hidden_states, branch, self.lambda_2, self._drop_factors(branch))

    def _drop_factors(self, branch: Tensor) -> Tensor | None:
        return self.drop_path.factors(branch) if isinstance(self.drop_path, BeitDropPath) else None


def _scaled(branch: Tensor, layer_scale: Tensor | None) -> Tensor:
    return branch if layer_scale is None else layer_scale * branch


class BeitEncoder(nn.Module):
    """The stack of blocks, with the bias table that they may share."""

    def __init__(self, config: BeitConfig) -> None:
        super().__init__()
        self.relative_position_bias = (
            BeitRelativePositionBias(config) if config.use_shared_relative_position_bias else None
        )
        last = max(config.num_hidden_layers - 1, 1)
        rates = [config.drop_path_rate * index / last for index in range(config.num_hidden_layers)]
        self.layer = nn.ModuleList(BeitLayer(config, rate) for rate in rates)
        self.gradient_checkpointing = False
        self.checkpoint_options: dict[str, Any] = {"use_reentrant": False}

    def forward(
        self,
        hidden_states: Tensor,
        window: Window,
        key_mask: Tensor | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
    ) -> tuple[Tensor, tuple[Tensor, ...] | None, tuple[Tensor, ...] | None]:
        """`[B, N, E]` to the last layer's output and, where asked, all states (input first) and attention weights."""
        shared_table, shared_bias = self._shared(hidden_states, window, output_attentions)
        states, attentions = [hidden_states], []
        for layer in self.layer:
            arguments = (hidden_states, window, shared_table, shared_bias, key_mask, output_attentions)
            if self.gradient_checkpointing and self.training:
                hidden_states, weights = torch.utils.checkpoint.checkpoint(layer, *arguments, **self.checkpoint_options)
            else:
                hidden_states, weights = layer(*arguments)
            if output_hidden_states:
                states.append(hidden_states)
            if weights is not None:
                attentions.append(weights)
        return (
            hidden_states,
            tuple(states) if output_hidden_states else None,
            tuple(attentions) if output_attentions else None,
        )

    def _shared(
        self, hidden_states: Tensor, window: Window, output_attentions: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """The shared table for this window and, where every layer would gather the same bias, that bias `[H, N, N]`."""
        if self.relative_position_bias is None:
            return None, None
        table = self.relative_position_bias(window)
        first = next(module for module in self.modules() if isinstance(module, BeitSelfAttention))
        if first.relative_position_bias is not None:
            return table, None
        resolved = attention.resolve(
            first.attn_implementation, hidden_states.device, hidden_states.dtype, first.head_dim
        )
        return table, attention.dense_bias(table, window) if output_attentions or resolved != "triton" else None
