"""The trunk of BEiT, masked image modeling and image classification."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch.nn.functional as F
from torch import Tensor, nn

from ..configuration.beit_config import BeitConfig
from ..layers.block import BeitEncoder
from ..layers.embeddings import BeitEmbeddings, window_of
from ..utils.names import AttentionImplementation, PatchEmbedImplementation
from .base import BeitPreTrainedModel
from .inputs import check_inputs, key_mask_of
from .labels import check_image_labels, check_patch_label_count, check_patch_labels, problem_of_labels
from .outputs import BeitModelOutputWithPooling, ImageClassifierOutput, MaskedLMOutput


class BeitPooler(nn.Module):
    """Mean of the patch tokens and LayerNorm, or the CLS token: `[B, N, E]` to `[B, E]`."""

    def __init__(self, config: BeitConfig) -> None:
        super().__init__()
        self.layernorm = (
            nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) if config.use_mean_pooling else None
        )

    def forward(self, hidden_states: Tensor) -> Tensor:
        if self.layernorm is None:
            return hidden_states[:, 0]
        return self.layernorm(hidden_states[:, 1:].mean(1))


class BeitModel(BeitPreTrainedModel):
    """The BEiT vision transformer (arXiv 2106.08254) without a head.

    Args:
        config: Sizes, biases and pooling.
        add_pooling_layer: Whether `pooler_output` is computed.
        attn_implementation, patch_embed_implementation: See `BeitPreTrainedModel`.
    """

    def __init__(
        self,
        config: BeitConfig,
        add_pooling_layer: bool = True,
        attn_implementation: AttentionImplementation | None = None,
        patch_embed_implementation: PatchEmbedImplementation | None = None,
    ) -> None:
        super().__init__(config, attn_implementation, patch_embed_implementation)
        config = self.config
        self.embeddings = BeitEmbeddings(config)
        self.encoder = BeitEncoder(config)
        self.layernorm = (
            nn.Identity() if config.use_mean_pooling else nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        )
        self.pooler = BeitPooler(config) if add_pooling_layer else None
        self._finish_construction()

    @overload
    def forward(
        self,
        pixel_values: Tensor,
        bool_masked_pos: Tensor | None = ...,
        interpolate_pos_encoding: bool = ...,
        attention_mask: Tensor | None = ...,
        output_attentions: bool | None = ...,
        output_hidden_states: bool | None = ...,
        return_dict: Literal[True] | None = ...,
    ) -> BeitModelOutputWithPooling: ...
    @overload
    def forward(
        self,
        pixel_values: Tensor,
        bool_masked_pos: Tensor | None = ...,
        interpolate_pos_encoding: bool = ...,
        attention_mask: Tensor | None = ...,
        output_attentions: bool | None = ...,
        output_hidden_states: bool | None = ...,
        *,
        return_dict: Literal[False],
    ) -> tuple[Any, ...]: ...
    @overload
    def forward(
        self,
        pixel_values: Tensor,
        bool_masked_pos: Tensor | None = ...,
        interpolate_pos_encoding: bool = ...,
        attention_mask: Tensor | None = ...,
        output_attentions: bool | None = ...,
        output_hidden_states: bool | None = ...,
        return_dict: bool | None = ...,
    ) -> BeitModelOutputWithPooling | tuple[Any, ...]: ...
    def forward(
        self,
        pixel_values: Tensor,
        bool_masked_pos: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        attention_mask: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> BeitModelOutputWithPooling | tuple[Any, ...]:
        """Run the trunk.

        Args:
            pixel_values: `[B, C, H, W]` of any size, cropped to whole patches. Floating point, normalized by an image
                processor, or uint8 after `set_pixel_normalization`.
            bool_masked_pos: `[B, P]`, True where a patch is replaced by the mask token.
            interpolate_pos_encoding: Ignored: positions always fit the image.
            attention_mask: `[B, N]` with CLS first, non-zero where a token may be attended to.
            output_attentions: Return the attention weights, which requires `"eager"` for this call.
            output_hidden_states: Return the embeddings and the output of every layer.
            return_dict: Return a `BeitModelOutputWithPooling` if True, a tuple without Nones if False.

        Returns:
            last_hidden_state `[B, N, E]`, pooler_output `[B, E]`, hidden_states (layers + 1 of `[B, N, E]`, before the
            final LayerNorm), attentions (layers of `[B, H, N, N]`).
        """
        check_inputs(pixel_values, self.config.num_channels, bool_masked_pos, attention_mask)
        window = window_of(pixel_values, self.config.patch_size)
        kernels = self._kernels_for(pixel_values)
        tokens = self.embeddings(pixel_values, window, bool_masked_pos, kernels.attention)
        hidden_states, states, attentions = self.encoder(
            tokens,
            window,
            key_mask_of(attention_mask, tokens),
            self._flag(output_attentions, "output_attentions"),
            self._flag(output_hidden_states, "output_hidden_states"),
            kernels,
        )
        hidden_states = self.layernorm(hidden_states)
        pooled = None if self.pooler is None else self.pooler(hidden_states)
        output = BeitModelOutputWithPooling(hidden_states, pooled, states, attentions)
        return output if self._flag(return_dict, "return_dict") else output.to_tuple()


class BeitForMaskedImageModeling(BeitPreTrainedModel):
    """BEiT with a linear layer that predicts visual tokens.

    It predicts the visual token of every patch (section 2.3 of the paper).
    """

    def __init__(
        self,
        config: BeitConfig,
        attn_implementation: AttentionImplementation | None = None,
        patch_embed_implementation: PatchEmbedImplementation | None = None,
    ) -> None:
        super().__init__(config, attn_implementation, patch_embed_implementation)
        config = self.config
        self.num_labels = config.num_labels
        self.beit = BeitModel(config, add_pooling_layer=False)
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size)
        self._finish_construction()

    @overload
    def forward(
        self,
        pixel_values: Tensor,
        bool_masked_pos: Tensor | None = ...,
        labels: Tensor | None = ...,
        interpolate_pos_encoding: bool = ...,
        attention_mask: Tensor | None = ...,
        output_attentions: bool | None = ...,
        output_hidden_states: bool | None = ...,
        return_dict: Literal[True] | None = ...,
    ) -> MaskedLMOutput: ...
    @overload
    def forward(
        self,
        pixel_values: Tensor,
        bool_masked_pos: Tensor | None = ...,
        labels: Tensor | None = ...,
        interpolate_pos_encoding: bool = ...,
        attention_mask: Tensor | None = ...,
        output_attentions: bool | None = ...,
        output_hidden_states: bool | None = ...,
        *,
        return_dict: Literal[False],
    ) -> tuple[Any, ...]: ...
    @overload
    def forward(
        self,
        pixel_values: Tensor,
        bool_masked_pos: Tensor | None = ...,
        labels: Tensor | None = ...,
        interpolate_pos_encoding: bool = ...,
        attention_mask: Tensor | None = ...,
        output_attentions: bool | None = ...,
        output_hidden_states: bool | None = ...,
        return_dict: bool | None = ...,
    ) -> MaskedLMOutput | tuple[Any, ...]: ...
    def forward(
        self,
        pixel_values: Tensor,
        bool_masked_pos: Tensor | None = None,
        labels: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        attention_mask: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> MaskedLMOutput | tuple[Any, ...]:
        """Predict visual tokens: logits `[B, P, vocab_size]`.

        Args:
            labels: `[masked patches]` of an integer dtype, one visual token for every True of `bool_masked_pos`, in
                row-major order. The loss is the mean cross-entropy over masked patches (-100 is ignored), and NaN if
                no label is left.

        The other arguments are those of `BeitModel.forward`.
        """
        check_inputs(pixel_values, self.config.num_channels, bool_masked_pos, attention_mask, labels)
        if labels is not None and bool_masked_pos is None:
            raise ValueError("labels of masked patches require bool_masked_pos")
        outputs = self.beit(
            pixel_values,
            bool_masked_pos=bool_masked_pos,
            attention_mask=attention_mask,
            output_attentions=self._flag(output_attentions, "output_attentions"),
            output_hidden_states=self._flag(output_hidden_states, "output_hidden_states"),
            return_dict=True,
        )
        logits = self.lm_head(self.layernorm(outputs.last_hidden_state)[:, 1:])  # [B, P, V]
        loss = None
        if labels is not None and bool_masked_pos is not None:
            loss = patch_loss(logits, bool_masked_pos, labels)
        output = MaskedLMOutput(loss, logits, outputs.hidden_states, outputs.attentions)
        return output if self._flag(return_dict, "return_dict") else output.to_tuple()


class BeitForImageClassification(BeitPreTrainedModel):
    """BEiT with a linear layer on the pooled tokens."""

    def __init__(
        self,
        config: BeitConfig,
        attn_implementation: AttentionImplementation | None = None,
        patch_embed_implementation: PatchEmbedImplementation | None = None,
    ) -> None:
        super().__init__(config, attn_implementation, patch_embed_implementation)
        config = self.config
        self.num_labels = config.num_labels
        self.beit = BeitModel(config, add_pooling_layer=True)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels) if config.num_labels > 0 else nn.Identity()
        self._finish_construction()

    @overload
    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = ...,
        interpolate_pos_encoding: bool = ...,
        attention_mask: Tensor | None = ...,
        output_attentions: bool | None = ...,
        output_hidden_states: bool | None = ...,
        return_dict: Literal[True] | None = ...,
    ) -> ImageClassifierOutput: ...
    @overload
    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = ...,
        interpolate_pos_encoding: bool = ...,
        attention_mask: Tensor | None = ...,
        output_attentions: bool | None = ...,
        output_hidden_states: bool | None = ...,
        *,
        return_dict: Literal[False],
    ) -> tuple[Any, ...]: ...
    @overload
    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = ...,
        interpolate_pos_encoding: bool = ...,
        attention_mask: Tensor | None = ...,
        output_attentions: bool | None = ...,
        output_hidden_states: bool | None = ...,
        return_dict: bool | None = ...,
    ) -> ImageClassifierOutput | tuple[Any, ...]: ...
    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        attention_mask: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> ImageClassifierOutput | tuple[Any, ...]:
        """Classify images: logits `[B, num_labels]`.

        Args:
            labels: Class indices `[B]` of any integer dtype (-100 is ignored), or numbers `[B]` for regression
                (`num_labels == 1`). For several labels an image, floats `[B, num_labels]` from 0 to 1.
                `config.problem_type` overrides this rule. If all class indices are ignored, the loss is NaN, as that of
                `torch.nn.functional.cross_entropy`.

        The other arguments are those of `BeitModel.forward`.
        """
        check_inputs(pixel_values, self.config.num_channels, None, attention_mask, labels)
        outputs = self.beit(
            pixel_values,
            attention_mask=attention_mask,
            output_attentions=self._flag(output_attentions, "output_attentions"),
            output_hidden_states=self._flag(output_hidden_states, "output_hidden_states"),
            return_dict=True,
        )
        logits = self.classifier(outputs.pooler_output)
        loss = None if labels is None else classification_loss(logits, labels, self.config.problem_type)
        output = ImageClassifierOutput(loss, logits, outputs.hidden_states, outputs.attentions)
        return output if self._flag(return_dict, "return_dict") else output.to_tuple()


def patch_loss(logits: Tensor, bool_masked_pos: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of the masked patches of `logits` `[B, P, V]`."""
    check_patch_labels(labels, logits.shape[-1])
    masked = logits[bool_masked_pos.flatten(1).bool()]  # [masked patches, V]
    check_patch_label_count(labels, masked.shape[0])
    return F.cross_entropy(masked, labels.to(logits.device).long())


def classification_loss(logits: Tensor, labels: Tensor, problem_type: str | None = None) -> Tensor:
    """Mean squared error, cross-entropy or binary cross-entropy of `logits` `[B, L]`.

    If `problem_type` is None: regression for one label, cross-entropy for integer labels, else several labels.

    Raises:
        ValueError: If the labels do not fit; values are checked on CPU.
    """
    batch, num_labels = logits.shape
    check_image_labels(labels, batch, num_labels, problem_type)
    problem_type = problem_of_labels(labels, num_labels, problem_type)
    labels = labels.to(logits.device)
    if problem_type == "regression":
        return F.mse_loss(logits.squeeze(-1) if labels.ndim < logits.ndim else logits, labels.to(logits.dtype))
    if problem_type == "single_label_classification":
        return F.cross_entropy(logits, labels.flatten().long())
    return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))
