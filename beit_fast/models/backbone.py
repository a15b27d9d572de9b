"""`BeitBackbone`: feature maps for dense prediction, as UperNet, DPT and ZoeDepth expect them."""

from __future__ import annotations

import inspect
import sys
from typing import Any, ClassVar, Literal, cast, overload

from torch import Tensor

from ..configuration.beit_config import BeitConfig
from ..layers.block import BeitEncoder
from ..layers.embeddings import BeitEmbeddings, window_of
from ..utils.names import AttentionImplementation, PatchEmbedImplementation
from .base import BeitPreTrainedModel
from .inputs import check_inputs, key_mask_of
from .outputs import BackboneOutput
from .segmentation import FeaturePyramidMixin, feature_map


class _BackboneType:
    """Read as Transformers' `BackboneType.TRANSFORMERS` if Transformers is imported, else as its value."""

    def __get__(self, backbone: Any, owner: type) -> str:
        for name in ("transformers.backbone_utils", "transformers.utils.backbone_utils"):
            kinds = getattr(sys.modules.get(name), "BackboneType", None)
            if kinds is not None:
                return cast(str, kinds.TRANSFORMERS)  # a str and an Enum
        return "transformers"


class BeitBackbone(FeaturePyramidMixin, BeitPreTrainedModel):
    """The trunk without a final norm, with the outputs of chosen stages.

    Stage `"stem"` is the embeddings, `"stageK"` the output of K blocks; `config.out_features` or `config.out_indices`
    chooses. `config.reshape_hidden_states` gives `[B, E, h, w]` maps, else `[B, N, E]` tokens with CLS first;
    `config.add_fpn` brings four maps to 4, 2, 1 and 1/2 times the resolution.
    """

    base_model_prefix: ClassVar[str] = ""
    backbone_type = _BackboneType()
    has_attentions: ClassVar[bool] = True

    def __init__(
        self,
        config: BeitConfig,
        attn_implementation: AttentionImplementation | None = None,
        patch_embed_implementation: PatchEmbedImplementation | None = None,
    ) -> None:
        super().__init__(config, attn_implementation, patch_embed_implementation)
        config = self.config
        self.num_features = [config.hidden_size] * (config.num_hidden_layers + 1)
        self.embeddings = BeitEmbeddings(config)
        self.encoder = BeitEncoder(config)
        if config.add_fpn:
            if not config.reshape_hidden_states:
                raise ValueError("add_fpn=True requires reshape_hidden_states=True")
            self._build_pyramid(config.hidden_size)
        self._finish_construction()

    @property
    def stage_names(self) -> list[str]:
        """Stage names, `["stem", "stage1", ...]`."""
        return self.config.stage_names

    @property
    def out_features(self) -> list[str]:
        """Names of the stages whose output is returned; settable."""
        return self.config.out_features

    @out_features.setter
    def out_features(self, value: list[str]) -> None:
        self.config.out_features = value

    @property
    def out_indices(self) -> list[int]:
        """Indices into `stage_names` of the stages whose output is returned; settable."""
        return self.config.out_indices

    @out_indices.setter
    def out_indices(self, value: list[int]) -> None:
        self.config.out_indices = value

    @property
    def out_feature_channels(self) -> dict[str, int]:
        """Channels of every stage by name."""
        return dict(zip(self.stage_names, self.num_features, strict=True))

    @property
    def channels(self) -> list[int]:
        """Channels of every returned feature map."""
        return [self.out_feature_channels[name] for name in self.out_features]

    def forward_with_filtered_kwargs(self, *args: Any, **kwargs: Any) -> BackboneOutput | tuple[Any, ...]:
        """Call the backbone, without keyword arguments that its `forward` does not have."""
        known = inspect.signature(self.forward).parameters
        return self(*args, **{name: value for name, value in kwargs.items() if name in known})

    @overload
    def forward(
        self,
        pixel_values: Tensor,
        attention_mask: Tensor | None = ...,
        output_hidden_states: bool | None = ...,
        output_attentions: bool | None = ...,
        return_dict: Literal[True] | None = ...,
    ) -> BackboneOutput: ...
    @overload
    def forward(
        self,
        pixel_values: Tensor,
        attention_mask: Tensor | None = ...,
        output_hidden_states: bool | None = ...,
        output_attentions: bool | None = ...,
        *,
        return_dict: Literal[False],
    ) -> tuple[Any, ...]: ...
    @overload
    def forward(
        self,
        pixel_values: Tensor,
        attention_mask: Tensor | None = ...,
        output_hidden_states: bool | None = ...,
        output_attentions: bool | None = ...,
        return_dict: bool | None = ...,
    ) -> BackboneOutput | tuple[Any, ...]: ...
    def forward(
        self,
        pixel_values: Tensor,
        attention_mask: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> BackboneOutput | tuple[Any, ...]:
        """Return the maps of the chosen stages.

        The maps are a tuple of `[B, E, h, w]` or `[B, N, E]`. The arguments are those of `BeitModel.forward`.
        """
        keep_states = self._flag(output_hidden_states, "output_hidden_states")
        check_inputs(pixel_values, self.config.num_channels, attention_mask=attention_mask)
        window = window_of(pixel_values, self.config.patch_size)
        kernels = self._kernels_for(pixel_values)
        tokens = self.embeddings(pixel_values, window, None, kernels.attention)
        _, states, attentions = self.encoder(
            tokens,
            window,
            key_mask_of(attention_mask, tokens),
            self._flag(output_attentions, "output_attentions"),
            output_hidden_states=True,
            kernels=kernels,
        )
        features = tuple(states[index] for index in self.out_indices)
        if self.config.reshape_hidden_states:
            features = tuple(feature_map(state, window) for state in features)
        if self.config.add_fpn:
            features = self._pyramid(features)
        output = BackboneOutput(features, states if keep_states else None, attentions)
        return output if self._flag(return_dict, "return_dict") else output.to_tuple()
