"""What every BEiT model shares: construction, initialisation, choice of kernels, gradient checkpointing."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor, nn

from ..configuration.beit_config import BeitConfig
from ..layers.attention import BeitRelativePositionBias, BeitSelfAttention
from ..layers.block import BeitEncoder, BeitLayer
from ..layers.embeddings import BeitEmbeddings
from ..ops.dispatch import attention, patch_embed

if TYPE_CHECKING:
    from ..checkpoint.device_map import DeviceMap


class BeitPreTrainedModel(nn.Module):
    """Base class of the models.

    Args:
        config: a `BeitConfig`, or a configuration of Transformers' BEiT, which is converted.
        attn_implementation: `"eager"`, `"sdpa"`, `"triton"` or None (a fused kernel where one serves the device and
            dtype, else `"sdpa"`, as in an export to ONNX); what is given here wins over what the config carries.
        patch_embed_implementation: `"conv"` (`nn.Conv2d` and the steps after it), `"fused"` (one operator from pixels
            to tokens, which reads the convolution's weight and calls neither it nor its hooks) or None: `"fused"` where
            attention runs `"triton"` and the convolution was not replaced and has no hooks, else `"conv"`. It wins over
            the config likewise.
    """

    config_class: ClassVar[type] = BeitConfig
    base_model_prefix: ClassVar[str] = "beit"
    main_input_name: ClassVar[str] = "pixel_values"
    input_modalities: ClassVar[tuple[str, ...]] = ("image",)
    supports_gradient_checkpointing: ClassVar[bool] = True
    _no_split_modules: ClassVar[list[str]] = ["BeitLayer"]
    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [r".*relative_position_index.*"]
    _keys_to_ignore_on_save: ClassVar[list[str] | None] = None

    def __init__(
        self,
        config: BeitConfig,
        attn_implementation: str | None = None,
        patch_embed_implementation: str | None = None,
    ) -> None:
        super().__init__()
        self.config = config if isinstance(config, BeitConfig) else BeitConfig.from_dict(config.to_dict())
        self.name_or_path = self.config.name_or_path  # where adapters say what they were trained on
        self.attn_implementation = attention.check_implementation(
            self.config.attn_implementation if attn_implementation is None else attn_implementation
        )
        self.patch_embed_implementation = patch_embed.check_implementation(
            self.config.patch_embed_implementation if patch_embed_implementation is None else patch_embed_implementation
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

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        config: Any = None,
        attn_implementation: str | None = None,
        patch_embed_implementation: str | None = None,
        dtype: torch.dtype | str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        device_map: DeviceMap | None = None,
        max_memory: Mapping[int | str, int | str] | None = None,
        offload_folder: str | os.PathLike[str] | None = None,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        num_labels: int | None = None,
        ignore_mismatched_sizes: bool = False,
        image_size: int | tuple[int, int] | None = None,
        position_interpolation: str = "bilinear",
        output_loading_info: bool = False,
        **config_overrides: Any,
    ) -> Any:
        """A model with a checkpoint's parameters, in evaluation mode.

        Reads what Transformers 4 and 5 write (BEiT, DiT, Data2VecVision) and the files of timm, unilm and
        mmsegmentation, whose configuration is told from shapes. The file may be another head's: parameters that it
        lacks are initialised, with one warning; what belongs to another head only is left out. Where the file has
        one bias table for all layers and the configuration one for each, every layer gets a copy, as in unilm.

        Args:
            pretrained_model_name_or_path: a folder, a file (safetensors, an index of shards, or a pickle of tensors,
                read with `weights_only=True`), or a hub repository such as `"microsoft/beit-base-patch16-224"`.
            config: a `BeitConfig`, one of Transformers, a dict of fields or where to find one, instead of the
                checkpoint's own.
            attn_implementation, patch_embed_implementation: see the class.
            dtype, torch_dtype: of the parameters; by default, or for `"auto"`, the configuration's, else the file's.
            device: where the parameters go.
            device_map, max_memory, offload_folder: instead of `device`, spread the layers over devices, host memory and
                disk by the package accelerate: `"auto"`, or a device for every part by name; see
                `beit_fast.checkpoint.device_map.dispatch`. The file is read into host memory first.
            revision, cache_dir, token, local_files_only: passed to `huggingface_hub`.
            num_labels: classes, where another number than the file's; needs `ignore_mismatched_sizes` beside a head.
            ignore_mismatched_sizes: initialise parameters whose shape differs, with a warning, rather than refuse.
            image_size: resize bias tables and position embeddings for images of this size.
            position_interpolation: how: `"bilinear"` (Transformers, MiDaS) or `"geometric"` (timm, unilm).
            output_loading_info: return `(model, info)`, the latter with missing, unexpected and mismatched keys.
            config_overrides: fields of `BeitConfig` that win over the checkpoint's, and `add_pooling_layer`.

        Raises:
            FileNotFoundError: nothing is there; says what was looked for.
            TypeError: an override that is no field.
            ValueError: a file that does not fit, with every missing, unexpected and mismatched parameter; a damaged
                or unsafe file; a configuration that shapes do not tell.
        """
        from ..checkpoint import device_map as placement
        from ..checkpoint import loading
        from ..utils.hub import HubOptions

        placement.check(device, device_map, max_memory=max_memory, offload_folder=offload_folder)
        if dtype is not None and torch_dtype is not None and dtype != torch_dtype:
            raise ValueError(f"{dtype=} and {torch_dtype=} are two names of one argument; give one")
        options = loading.LoadOptions(
            attn_implementation,
            patch_embed_implementation,
            torch_dtype if dtype is None else dtype,
            device if device_map is None else "cpu",
            HubOptions(revision, cache_dir, token, local_files_only),
            image_size,
            position_interpolation,
            ignore_mismatched_sizes,
        )
        labels = {} if num_labels is None else {"num_labels": num_labels}
        model, info = loading.load_model(cls, pretrained_model_name_or_path, config, options, config_overrides | labels)
        if device_map is not None:
            placement.dispatch(model, device_map, max_memory, offload_folder)
        return (model, info) if output_loading_info else model

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        *,
        state_dict: Mapping[str, Tensor] | None = None,
        max_shard_size: int | str = "5GB",
        safe_serialization: bool = True,
    ) -> None:
        """Write `config.json` and safetensors under the hub's names, which Transformers 4 and 5 read.

        All files are written beside the old ones and flushed before any is replaced, each whole: a process that is
        killed leaves the old weights or the new ones, never a part.

        Args:
            save_directory: the folder, made if need be.
            state_dict: what to write instead of the model's own tensors, which may be spread over processes:
                `get_model_state_dict` of `torch.distributed.checkpoint` gathers them.
            max_shard_size: where the weights take more, they are split, with an index; bytes or as in `"5GB"`.
            safe_serialization: True; pickles are not written.

        Raises:
            ValueError: `safe_serialization=False`, parameters on the meta device or spread over processes, or a
                state_dict that is not the model's.
        """
        from ..checkpoint.saving import save_model

        save_model(self, save_directory, max_shard_size, safe_serialization, state_dict)

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
        """False: there is no text here."""
        return False

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """How many numbers the parameters hold; exclude_embeddings: without `nn.Embedding`, which no model has."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad or not only_trainable)

    def get_input_embeddings(self) -> nn.Module:
        """The patch embeddings."""
        return self._embeddings().patch_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the patch embeddings by a module from `[B, C, H, W]` to `[B, P, E]`."""
        self._embeddings().add_module("patch_embeddings", value)

    def set_attn_implementation(self, attn_implementation: str | None) -> None:
        """Choose `"eager"`, `"sdpa"`, `"triton"` or None (by device and dtype) for every layer from now on."""
        attention.check_implementation(attn_implementation)
        for module in self.modules():
            if isinstance(module, (BeitPreTrainedModel, BeitEmbeddings, BeitEncoder)):
                module.attn_implementation = attn_implementation
            if isinstance(module, (BeitEmbeddings, BeitSelfAttention)):
                module.last_kernel = None

    def attention_report(self) -> attention.AttentionReport:
        """Which attention kernel ran in each layer, and why others cannot serve here."""
        layers = self._attention_layers()
        head_dim = self.config.attention_head_dim
        kernels = [layer.last_kernel for layer in layers]
        return attention.report(self.attn_implementation, kernels, self.device, self.dtype, head_dim)

    def set_patch_embed_implementation(self, patch_embed_implementation: str | None) -> None:
        """Choose `"conv"`, `"fused"` or None (follows attention) from now on."""
        patch_embed.check_implementation(patch_embed_implementation)
        for module in self.modules():
            if isinstance(module, (BeitPreTrainedModel, BeitEmbeddings)):
                module.patch_embed_implementation = patch_embed_implementation
        self._embeddings().last_kernel = None

    def patch_embed_report(self) -> patch_embed.PatchEmbedReport:
        """Which patch embedding ran, and why others cannot serve here."""
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
        """Let the model take uint8 pixels, of which it makes `(pixels / 255 - mean) / std`.

        Mean and standard deviation are those of pixels scaled to 0..1, as image processors have them:
        `model.set_pixel_normalization(processor.image_mean, processor.image_std)`. They are kept in `config`, saved and
        loaded with it, and seen by every model built from the same config object. Floating-point pixels are taken as
        normalised, before and after.

        Args:
            mean, std: one number for each channel, or one for all; None for both refuses uint8 pixels again.

        Raises:
            TypeError, ValueError: what the configuration does not accept; nothing is changed.
        """
        channels = self.config.num_channels
        given = {"pixel_mean": mean, "pixel_std": std}
        numbers = {
            name: [value] * channels if isinstance(value, (int, float)) else value for name, value in given.items()
        }
        self.config.update(numbers)

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

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: dict[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """`gradient_checkpointing_enable` under its name in Transformers 5: every layer, nothing offloaded."""
        if every_n_layers != 1 or offload:
            raise ValueError(f"{every_n_layers=}, {offload=}; accepted: every_n_layers=1 and offload=False")
        self.gradient_checkpointing_enable(activation_checkpointing_kwargs)

    def activation_checkpointing_disable(self) -> None:
        """Keep activations again."""
        self.gradient_checkpointing_disable()

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether layers are recomputed in the backward pass."""
        return any(isinstance(m, BeitEncoder) and m.gradient_checkpointing for m in self.modules())

    def init_weights(self) -> None:
        """Draw every parameter anew, as construction did: needed after `to_empty` on a model built on meta."""
        self.apply(self._init_weights)

    def _finish_construction(self) -> None:
        """Initialise what this class added (a nested model has initialised itself) and set the kernels."""
        for child in self.children():
            if not isinstance(child, BeitPreTrainedModel):
                child.apply(self._init_weights)
        self.set_attn_implementation(self.attn_implementation)
        self.set_patch_embed_implementation(self.patch_embed_implementation)

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
