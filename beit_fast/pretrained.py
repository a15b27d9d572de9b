"""What every BEiT model shares: construction, initialisation, choice of attention, gradient checkpointing."""

from __future__ import annotations

from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from . import attention
from .configuration import BeitConfig
from .layers import BeitEmbeddings, BeitEncoder, BeitLayer, BeitRelativePositionBias, BeitSelfAttention


class BeitPreTrainedModel(nn.Module):
    """Base class of the models.

    Args:
        config: a `BeitConfig`, or a configuration of Transformers' BEiT, which is converted.
        attn_implementation: `"eager"`, `"sdpa"`, `"triton"` or None (a fused kernel where one serves the device and
            dtype, else `"sdpa"`); what is given here wins over what the config carries.
    """

    config_class: ClassVar[type] = BeitConfig
    base_model_prefix: ClassVar[str] = "beit"
    main_input_name: ClassVar[str] = "pixel_values"
    supports_gradient_checkpointing: ClassVar[bool] = True
    _no_split_modules: ClassVar[list[str]] = ["BeitLayer"]
    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [r".*relative_position_index.*"]

    def __init__(self, config: BeitConfig, attn_implementation: str | None = None) -> None:
        super().__init__()
        self.config = config if isinstance(config, BeitConfig) else BeitConfig.from_dict(config.to_dict())
        self.attn_implementation = attention.check_implementation(
            self.config.attn_implementation if attn_implementation is None else attn_implementation
        )

    @classmethod
    def _from_config(
        cls,
        config: BeitConfig,
        attn_implementation: str | None = None,
        dtype: torch.dtype | str | None = None,
        **kwargs: Any,
    ) -> Self:
        """A freshly initialised model in `dtype` (the config's, or torch's default); kwargs go to the constructor."""
        model = cls(config, attn_implementation=attn_implementation, **kwargs)
        dtype = model.config.dtype if dtype is None else dtype
        if isinstance(dtype, str):
            dtype = BeitConfig(dtype=dtype).dtype
        return model if dtype is None else model.to(dtype)

    @property
    def base_model(self) -> nn.Module:
        """The trunk: `self.beit` of a model with a head, else the model itself."""
        return getattr(self, self.base_model_prefix, self)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the parameters."""
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return next(self.parameters()).device

    def num_parameters(self, only_trainable: bool = False) -> int:
        """How many numbers the parameters hold."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad or not only_trainable)

    def get_input_embeddings(self) -> nn.Module:
        """The patch embeddings."""
        return self._embeddings().patch_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the patch embeddings by a module from `[B, C, H, W]` to `[B, P, E]`."""
        self._embeddings().add_module("patch_embeddings", value)

    def set_attn_implementation(self, attn_implementation: str | None) -> None:
        """Choose `"eager"`, `"sdpa"`, `"triton"` or None (by device and dtype) for every layer from now on."""
        self.attn_implementation = attention.check_implementation(attn_implementation)
        for module in self._attention_layers():
            module.attn_implementation = attn_implementation
            module.kernel = None

    def attention_report(self) -> attention.AttentionReport:
        """Which attention kernel ran in each layer, and why others cannot serve here."""
        layers = self._attention_layers()
        head_dim = self.config.attention_head_dim
        kernels = [layer.kernel for layer in layers]
        return attention.report(self.attn_implementation, kernels, self.device, self.dtype, head_dim)

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
        """Recompute each layer in the backward pass instead of keeping its activations.

        `gradient_checkpointing_kwargs` go to `torch.utils.checkpoint.checkpoint`, `use_reentrant=False` by default.
        """
        for module in self.modules():
            if isinstance(module, BeitEncoder):
                module.gradient_checkpointing = True
                module.checkpoint_options = {"use_reentrant": False} | (gradient_checkpointing_kwargs or {})

    def gradient_checkpointing_disable(self) -> None:
        """Keep activations again."""
        for module in self.modules():
            if isinstance(module, BeitEncoder):
                module.gradient_checkpointing = False

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether layers are recomputed in the backward pass."""
        return any(isinstance(m, BeitEncoder) and m.gradient_checkpointing for m in self.modules())

    def init_weights(self) -> None:
        """Draw every parameter anew, as construction did: needed after `to_empty` on a model built on meta."""
        self.apply(self._init_weights)

    def _finish_construction(self) -> None:
        """Initialise what this class added (a nested model has initialised itself) and set the attention."""
        for child in self.children():
            if not isinstance(child, BeitPreTrainedModel):
                child.apply(self._init_weights)
        self.set_attn_implementation(self.attn_implementation)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Transformers' rule: weights N(0, initializer_range), biases and tokens and tables zero, norms one."""
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
            module.weight.normal_(0.0, self.config.initializer_range)
            if module.bias is not None:
                module.bias.zero_()
        elif isinstance(module, (nn.LayerNorm, nn.BatchNorm2d)):
            module.reset_parameters()
        elif isinstance(module, BeitEmbeddings):
            for parameter in (module.cls_token, module.mask_token, module.position_embeddings):
                if parameter is not None:
                    parameter.zero_()
        elif isinstance(module, BeitRelativePositionBias):
            module.relative_position_bias_table.zero_()
        elif isinstance(module, BeitLayer):
            for scale in (module.lambda_1, module.lambda_2):
                if scale is not None:
                    scale.fill_(self.config.layer_scale_init_value)

    def _embeddings(self) -> BeitEmbeddings:
        return next(module for module in self.modules() if isinstance(module, BeitEmbeddings))

    def _attention_layers(self) -> list[BeitSelfAttention]:
        return [module for module in self.modules() if isinstance(module, BeitSelfAttention)]

    def _flag(self, value: bool | None, name: str) -> bool:
        """A forward argument, or the config's where it was left out."""
        return bool(getattr(self.config, name) if value is None else value)


def key_mask_of(attention_mask: Tensor | None, tokens: Tensor) -> Tensor | None:
    """An `attention_mask` `[B, N]` (non-zero = attend) as bool; ValueError for any other shape."""
    if attention_mask is None:
        return None
    if attention_mask.shape != tokens.shape[:2]:
        raise ValueError(
            f"attention_mask must be [batch, tokens] = {list(tokens.shape[:2])} with CLS first and non-zero where a "
            f"token may be attended to, not {list(attention_mask.shape)}"
        )
    return attention_mask.bool()
