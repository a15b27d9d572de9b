"""Semantic segmentation: feature pyramid, UPerNet head (arXiv 1807.10221), auxiliary FCN head (arXiv 1411.4038)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..configuration.beit_config import BeitConfig
from ..layers.embeddings import window_of
from ..position_bias import Window
from ..utils.names import AttentionImplementation, PatchEmbedImplementation
from .base import BeitPreTrainedModel
from .beit import BeitModel
from .inputs import check_inputs
from .labels import check_pixel_labels
from .outputs import SemanticSegmenterOutput


def feature_map(hidden_state: Tensor, window: Window) -> Tensor:
    """Tokens as an image, CLS dropped: `[B, N, E]` to `[B, E, h, w]`."""
    return hidden_state[:, 1:].transpose(1, 2).unflatten(-1, window).contiguous()


def _upsample(size: int) -> nn.ConvTranspose2d:
    return nn.ConvTranspose2d(size, size, kernel_size=2, stride=2)


def _resize(features: Tensor, size: Sequence[int]) -> Tensor:
    return F.interpolate(features, size=list(size), mode="bilinear", align_corners=False)


class FeaturePyramidMixin:
    """Four maps of one resolution, resized by 4, 2, 1 and 1/2."""

    def _build_pyramid(self, size: int) -> None:
        self.fpn1 = nn.Sequential(_upsample(size), nn.BatchNorm2d(size), nn.GELU(), _upsample(size))
        self.fpn2 = nn.Sequential(_upsample(size))
        self.fpn3 = nn.Identity()
        self.fpn4 = nn.MaxPool2d(kernel_size=2, stride=2)

    def _pyramid(self, features: Sequence[Tensor]) -> tuple[Tensor, ...]:
        steps = (self.fpn1, self.fpn2, self.fpn3, self.fpn4)
        return tuple(step(feature) for step, feature in zip(steps, features, strict=True))


class BeitConvModule(nn.Module):
    """Convolution without bias, batch norm, ReLU."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False)
        self.bn = nn.BatchNorm2d(out_channels)
        self.activation = nn.ReLU()

    def forward(self, features: Tensor) -> Tensor:
        return self.activation(self.bn(self.conv(features)))


class BeitAdaptivePool(nn.Module):
    """Means over a grid of cells: `[B, E, h, w]` to `[B, E, cells, cells]`.

    The cells may overlap. PyTorch decomposes `adaptive_avg_pool2d` differently if `cells` divides the size. An exported
    graph fixes one case and gives wrong results for other sizes, under ONNX without an error. For symbolic sizes the
    means are therefore two matrix products.
    """

    def __init__(self, cells: int) -> None:
        super().__init__()
        self.cells = cells

    def forward(self, features: Tensor) -> Tensor:
        sizes = features.shape[-2:]
        if not any(isinstance(size, torch.SymInt) for size in sizes):
            return F.adaptive_avg_pool2d(features, self.cells)
        by_row, by_column = (_cell_means(size, self.cells, features) for size in sizes)
        return by_row @ features @ by_column.t()

    def extra_repr(self) -> str:
        return f"cells={self.cells}"


def _cell_means(size: int, cells: int, like: Tensor) -> Tensor:
    """Matrix `[cells, size]` that computes means over overlapping cells. The cells are those of torch's pooling."""
    cell = torch.arange(cells, device=like.device).unsqueeze(1)
    place = torch.arange(size, device=like.device)
    first, last = cell * size // cells, ((cell + 1) * size - 1) // cells
    inside = ((first <= place) & (place <= last)).to(like.dtype)  # [cells, size]
    return inside / inside.sum(1, keepdim=True)


class BeitUperHead(nn.Module):
    """UPerNet: pyramid pooling on the coarsest map, lateral connections from coarse to fine, one fused prediction."""

    def __init__(self, config: BeitConfig) -> None:
        super().__init__()
        size, scales = config.hidden_size, config.pool_scales
        self.psp_modules = nn.ModuleList(
            nn.Sequential(BeitAdaptivePool(scale), BeitConvModule(size, size, 1)) for scale in scales
        )
        self.bottleneck = BeitConvModule(size * (1 + len(scales)), size, 3)
        self.lateral_convs = nn.ModuleList(BeitConvModule(size, size, 1) for _ in range(3))
        self.fpn_convs = nn.ModuleList(BeitConvModule(size, size, 3) for _ in range(3))
        self.fpn_bottleneck = BeitConvModule(4 * size, size, 3)
        self.classifier = nn.Conv2d(size, config.num_labels, kernel_size=1)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Predict logits `[B, num_labels, h, w]` from four maps, fine to coarse.

        The logits have the size of the finest map.
        """
        pooled = [_resize(module(features[-1]), features[-1].shape[2:]) for module in self.psp_modules]
        levels = [conv(feature) for conv, feature in zip(self.lateral_convs, features[:-1], strict=True)]
        levels.append(self.bottleneck(torch.cat([features[-1], *pooled], dim=1)))
        for index in range(len(levels) - 1, 0, -1):
            finer = levels[index - 1]
            levels[index - 1] = finer + _resize(levels[index], finer.shape[2:])
        outputs = [conv(level) for conv, level in zip(self.fpn_convs, levels[:-1], strict=True)] + levels[-1:]
        outputs[1:] = [_resize(output, outputs[0].shape[2:]) for output in outputs[1:]]
        return self.classifier(self.fpn_bottleneck(torch.cat(outputs, dim=1)))


class BeitFCNHead(nn.Module):
    """Auxiliary head: a few convolutions on one of the four maps."""

    def __init__(self, config: BeitConfig, in_index: int = 2) -> None:
        super().__init__()
        size, channels, count = config.hidden_size, config.auxiliary_channels, config.auxiliary_num_convs
        self.in_index = in_index
        self.convs = nn.Sequential(
            *(BeitConvModule(channels if index else size, channels, 3) for index in range(count))
        )
        out = channels if count else size
        self.conv_cat = BeitConvModule(size + out, channels, 3) if config.auxiliary_concat_input else None
        self.classifier = nn.Conv2d(channels if self.conv_cat else out, config.num_labels, kernel_size=1)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Predict logits `[B, num_labels, h, w]` from four maps. The logits have the size of map `in_index`."""
        feature = features[self.in_index]
        output = self.convs(feature)
        if self.conv_cat is not None:
            output = self.conv_cat(torch.cat([feature, output], dim=1))
        return self.classifier(output)


class BeitForSemanticSegmentation(FeaturePyramidMixin, BeitPreTrainedModel):
    """BEiT with a feature pyramid, a UPerNet head and an auxiliary head.

    The maps are taken as Transformers takes them: entry `i` of `config.out_indices` reads `hidden_states[i - 1]`, the
    output of `i - 1` blocks. `[3, 5, 7, 11]` suits a base model.
    """

    def __init__(
        self,
        config: BeitConfig,
        attn_implementation: AttentionImplementation | None = None,
        patch_embed_implementation: PatchEmbedImplementation | None = None,
    ) -> None:
        super().__init__(config, attn_implementation, patch_embed_implementation)
        config = self.config
        if len(config.out_indices) != 4:
            raise ValueError(
                f"BeitForSemanticSegmentation needs four out_indices, such as [3, 5, 7, 11] for 12 layers; "
                f"the config has {list(config.out_indices)}"
            )
        self.num_labels = config.num_labels
        self.beit = BeitModel(config, add_pooling_layer=False)
        self._build_pyramid(config.hidden_size)
        self.decode_head = BeitUperHead(config)
        self.auxiliary_head = BeitFCNHead(config) if config.use_auxiliary_head else None
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
    ) -> SemanticSegmenterOutput: ...
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
    ) -> SemanticSegmenterOutput | tuple[Any, ...]: ...
    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        attention_mask: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> SemanticSegmenterOutput | tuple[Any, ...]:
        """Segment images: logits `[B, num_labels, 4 * h, 4 * w]` for a grid of `h x w` patches.

        Args:
            labels: Class of every pixel, `[B, height, width]` of any integer dtype. The loss is the cross-entropy at
                the size of the labels, without `config.semantic_loss_ignore_index`, plus that of the auxiliary head,
                weighted by `config.auxiliary_loss_weight`. It is NaN if all pixels are ignored.

        The other arguments are those of `BeitModel.forward`.
        """
        check_inputs(pixel_values, self.config.num_channels, None, attention_mask, labels)
        if labels is not None and self.config.num_labels == 1:
            raise ValueError("a segmentation loss requires config.num_labels > 1")
        keep_states = self._flag(output_hidden_states, "output_hidden_states")
        outputs = self.beit(
            pixel_values,
            attention_mask=attention_mask,
            output_attentions=self._flag(output_attentions, "output_attentions"),
            output_hidden_states=True,
            return_dict=True,
        )
        window = window_of(pixel_values, self.config.patch_size)
        states = [outputs.hidden_states[index - 1] for index in self.config.out_indices]
        features = self._pyramid([feature_map(state, window) for state in states])
        logits = self.decode_head(features)
        loss = None if labels is None else self._loss(logits, features, labels)
        output = SemanticSegmenterOutput(
            loss, logits, outputs.hidden_states if keep_states else None, outputs.attentions
        )
        return output if self._flag(return_dict, "return_dict") else output.to_tuple()

    def _loss(self, logits: Tensor, features: Sequence[Tensor], labels: Tensor) -> Tensor:
        ignored = self.config.semantic_loss_ignore_index
        check_pixel_labels(labels, logits.shape[0], logits.shape[1], ignored)
        labels = labels.to(logits.device).long()
        loss = F.cross_entropy(_resize(logits, labels.shape[-2:]), labels, ignore_index=ignored)
        if self.auxiliary_head is None:
            return loss
        auxiliary = _resize(self.auxiliary_head(features), labels.shape[-2:])
        weight = self.config.auxiliary_loss_weight
        return loss + weight * F.cross_entropy(auxiliary, labels, ignore_index=ignored)
