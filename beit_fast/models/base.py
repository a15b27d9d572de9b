"""Base class of the models: construction, initialization, choice of kernels, gradient checkpointing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from ..configuration.beit_config import BeitConfig
from ..configuration.conversion import as_beit_config
from ..layers.attention import BeitRelativePositionBias, BeitSelfAttention
from ..layers.block import BeitEncoder, BeitLayer
from ..layers.context import Kernels, choose_kernels, query_dtype
from ..layers.embeddings import BeitEmbeddings
from ..ops.dispatch import attention, patch_embed
from ..utils.names import AttentionImplementation, PatchEmbedImplementation
from .gradient_checkpointing import GradientCheckpointingMixin
from .pretrained import PretrainedMixin


def _take_transformers_names(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *unused: Any) -> None:
    """Import the hook at its first use: models need nothing else of `checkpoint`."""
    from ..checkpoint.state_dict_names import take_transformers_names

    take_transformers_names(module, state_dict, prefix)


class BeitPreTrainedModel(PretrainedMixin, GradientCheckpointingMixin, nn.Module):
    """Base class of the models.

    `from_pretrained` reads checkpoints of Transformers 4 and 5 (BEiT, DiT, Data2VecVision), timm, unilm and
    mmsegmentation. The configuration of the latter three is inferred from shapes. The checkpoint may have another head:
    missing parameters are initialized, with one warning, and parameters of the other head are ignored. If the
    checkpoint has one bias table for all layers and the configuration one for each, every layer gets a copy, as in
    unilm.

    Args:
        config: A `BeitConfig`, or a configuration of Transformers' BEiT, which is converted.
        attn_implementation: `"eager"`, `"sdpa"`, `"triton"` or None. None runs a fused kernel if one serves the device
            and dtype, else `"sdpa"`, as in an export to ONNX. It overrides the config.
        patch_embed_implementation: `"conv"` (`nn.Conv2d` and the steps after it), `"fused"` or None. `"fused"` is one
            operator from pixels to tokens, which reads the weight of the convolution without calling it. None runs
            `"fused"` if attention runs `"triton"` and the convolution was not replaced and has no hooks, else `"conv"`.
            It overrides the config.
    """

    config_class: ClassVar[type] = BeitConfig
    base_model_prefix: ClassVar[str] = "beit"
    main_input_name: ClassVar[str] = "pixel_values"
    input_modalities: ClassVar[tuple[str, ...]] = ("image",)
    supports_gradient_checkpointing: ClassVar[bool] = True
    _no_split_modules: ClassVar[list[str]] = ["BeitLayer"]
    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [r".*relative_position_index.*"]
    _keys_to_ignore_on_save: ClassVar[list[str] | None] = None
    _keys_to_ignore_on_load_missing: ClassVar[list[str] | None] = None
    _keep_in_fp32_modules: ClassVar[frozenset[str]] = frozenset()
    _keep_in_fp32_modules_strict: ClassVar[frozenset[str]] = frozenset()
    _supports_sdpa: ClassVar[bool] = True
    _supports_flash_attn: ClassVar[bool] = False
    _supports_flex_attn: ClassVar[bool] = False
    _supports_attention_backend: ClassVar[bool] = False  # attention functions of Transformers are not called

    def __init__(
        self,
        config: BeitConfig,
        attn_implementation: AttentionImplementation | None = None,
        patch_embed_implementation: PatchEmbedImplementation | None = None,
    ) -> None:
        super().__init__()
        kernels = {
            "attn_implementation": attention.check_implementation(attn_implementation),
            "patch_embed_implementation": patch_embed.check_implementation(patch_embed_implementation),
        }
        given = {name: value for name, value in kernels.items() if value is not None}
        self.config = as_beit_config(config, owner=type(self).__name__).with_implementations(**given)
        self.register_load_state_dict_pre_hook(_take_transformers_names)
        self.name_or_path = self.config.name_or_path  # adapters store it as the name of their base model
        self.attn_implementation = attention.check_implementation(self.config.attn_implementation)
        self.patch_embed_implementation = patch_embed.check_implementation(self.config.patch_embed_implementation)

    @classmethod
    def _from_config(
        cls,
        config: BeitConfig,
        attn_implementation: AttentionImplementation | None = None,
        dtype: torch.dtype | str | None = None,
        **kwargs: Any,
    ) -> Self:
        """Build an initialized model. Its dtype is `dtype`, by default that of the config or of torch."""
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

    @classmethod
    def can_generate(cls) -> bool:
        """Return False: the models do not generate text."""
        return False

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        """Return True: `set_attn_implementation` changes a built model."""
        return True

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        """Return False: the models have no experts."""
        return False

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Count the elements of the parameters; `exclude_embeddings` has no effect."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad or not only_trainable)

    def get_input_embeddings(self) -> nn.Module:
        """The patch embeddings."""
        return self._embeddings().patch_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the patch embeddings. `value` is a module from `[B, C, H, W]` to `[B, P, E]`."""
        self._embeddings().add_module("patch_embeddings", value)

    def get_output_embeddings(self) -> None:
        """Return None: the heads are not tied to an embedding."""
        return None

    def set_output_embeddings(self, new_embeddings: Any) -> None:
        """Raise NotImplementedError: the heads are not tied to an embedding."""
        raise NotImplementedError(f"{type(self).__name__} has no output embeddings; set its head by name")

    def set_attn_implementation(self, attn_implementation: AttentionImplementation | None) -> None:
        """Set `"eager"`, `"sdpa"`, `"triton"` or None for every layer. None chooses by device and dtype.

        `config` is replaced by a copy with this implementation; other models of the old one do not change.
        """
        attention.check_implementation(attn_implementation)
        self._configure(attn_implementation=attn_implementation)
        for module in self.modules():
            if isinstance(module, (BeitPreTrainedModel, BeitEmbeddings, BeitEncoder)):
                module.attn_implementation = attn_implementation
            if isinstance(module, (BeitEmbeddings, BeitSelfAttention)):
                module.last_kernel = None

    def attention_report(self) -> attention.AttentionReport:
        """Report which attention kernel ran in each layer. The report lists the reasons why others cannot serve."""
        layers = self._attention_layers()
        head_dim = self.config.attention_head_dim
        kernels = [layer.last_kernel for layer in layers]
        return attention.report(self.attn_implementation, kernels, self.device, self.dtype, head_dim)

    def set_patch_embed_implementation(self, patch_embed_implementation: PatchEmbedImplementation | None) -> None:
        """Set `"conv"`, `"fused"` or None (follows attention)."""
        patch_embed.check_implementation(patch_embed_implementation)
        self._configure(patch_embed_implementation=patch_embed_implementation)
        for module in self.modules():
            if isinstance(module, (BeitPreTrainedModel, BeitEmbeddings)):
                module.patch_embed_implementation = patch_embed_implementation
        self._embeddings().last_kernel = None

    def patch_embed_report(self) -> patch_embed.PatchEmbedReport:
        """Report which patch embedding ran, and why others cannot serve."""
        embeddings = self._embeddings()
        return patch_embed.report(
            self.patch_embed_implementation,
            embeddings.last_kernel,
            self.attn_implementation,
            embeddings.cls_token,
            self.config.attention_head_dim,
            embeddings.unsupported_reasons(),
        )

    def set_pixel_normalization(
        self, mean: Sequence[float] | float | None, std: Sequence[float] | float | None
    ) -> None:
        """Accept uint8 pixels, normalized as `(pixels / 255 - mean) / std`.

        Mean and standard deviation are those of pixels in 0..1, as in image processors:
        `model.set_pixel_normalization(processor.image_mean, processor.image_std)`. They are stored in `config`, which
        models may share, and saved with it. Floating-point pixels are expected to be normalized.

        Args:
            mean, std: One number for each channel, or one for all. None for both rejects uint8 pixels.

        Raises:
            TypeError, ValueError: If the configuration does not accept the numbers. It is then unchanged.
        """
        channels = self.config.num_channels
        given = {"pixel_mean": mean, "pixel_std": std}
        numbers = {
            name: [value] * channels if isinstance(value, (int, float)) else value for name, value in given.items()
        }
        self.config.update(numbers)

    def init_weights(self) -> None:
        """Initialize every parameter. Call it after `to_empty` on a model that was built on the meta device."""
        self.apply(self._init_weights)

    def _configure(self, **implementations: str | None) -> None:
        """Replace the configurations of all modules by copies with these implementations."""
        copies: dict[int, BeitConfig] = {}
        for module in self.modules():
            config = vars(module).get("config")
            if isinstance(config, BeitConfig):
                if id(config) not in copies:
                    copies[id(config)] = config.with_implementations(**implementations)
                vars(module)["config"] = copies[id(config)]

    def _finish_construction(self) -> None:
        """Initialize the modules outside nested models, and apply the configuration."""
        for child in self.children():
            if not isinstance(child, BeitPreTrainedModel):
                child.apply(self._init_weights)
        self.set_attn_implementation(attention.check_implementation(self.attn_implementation))
        self.set_patch_embed_implementation(patch_embed.check_implementation(self.patch_embed_implementation))
        if self.config.gradient_checkpointing:
            self.gradient_checkpointing_enable()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialize as Transformers: weights N(0, initializer_range); biases, tokens and tables 0; norms 1."""
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

    def _kernels_for(self, pixel_values: Tensor) -> Kernels:
        """Choose the kernels of a forward pass.

        The choice is made once for the embeddings and all blocks of this trunk.
        """
        trunk: Any = self
        dtype = query_dtype(trunk.embeddings.cls_token)
        encoder = trunk.encoder
        return choose_kernels(encoder.attn_implementation, pixel_values.device, dtype, encoder.head_dim)

    def _flag(self, value: bool | None, name: str) -> bool:
        """Return a forward argument, or the config's value if it is None."""
        return bool(getattr(self.config, name) if value is None else value)
