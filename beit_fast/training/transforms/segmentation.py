"""Joint transform of an image and its annotation, for semantic segmentation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...configuration.fields import is_integer
from ...image_processing.inputs import read_label_maps
from ...image_processing.options import Resampling
from ...image_processing.processor import IGNORED_LABEL, reduce_labels
from ...image_processing.resampling import Size, resize_nearest
from ...utils.messages import FieldError, describe, join_some, raise_errors
from ..arguments import (
    fraction_errors,
    interpolation_errors,
    normalization_errors,
    range_errors,
    sides_of,
    size_errors,
    three_numbers,
)
from .pixels import distort, normalized, resized, to_tensor
from .random_numbers import Draw, uniform

if TYPE_CHECKING:
    from ..data.source import Example

_ATTEMPTS = 10  # crops to draw before one with a large class is taken
_LONGEST = 4  # the longer side is at most this many times the shorter one after scaling


class _Window(NamedTuple):
    """Rectangle of pixels."""

    top: int
    left: int
    height: int
    width: int


class SegmentationTransform:
    """Scale, crop, flip, distort, normalize and pad an image and its annotation.

    The steps are those that are usual for ADE20k, and of unilm's segmentation. The annotation is resized by nearest
    neighbor, so no class id is new. All random numbers come from the generator of a call.

    Args:
        input_size: Size of the crop: an int or (height, width).
        image_mean, image_std: Normalization; use those of the model's image processor.
        num_labels: Number of classes. An annotation with other ids, except `ignore_index`, is an error. None accepts
            all ids.
        do_reduce_labels: Subtract 1 from class ids before all other steps; 0 becomes `ignore_index`.
        ignore_index: Class id of padding, which the loss ignores.
        scale: Range of the scale, uniform. At 1 the image fits in a rectangle whose shorter side is that of
            `input_size` and whose longer one is four times as long.
        cat_max_ratio: Draw a crop again, up to ten times, if one class has at least this share of its pixels.
        flip_probability: Probability of a horizontal flip.
        color_jitter: Whether brightness, contrast, saturation and hue change.
        train_interpolation: Filter of resizing the image, by Pillow's name.

    Raises:
        TypeError, ValueError: If arguments do not fit; the error lists all of them.
    """

    def __init__(
        self,
        input_size: int | Size = 512,
        image_mean: float | Sequence[float] = (0.5, 0.5, 0.5),
        image_std: float | Sequence[float] = (0.5, 0.5, 0.5),
        *,
        num_labels: int | None = None,
        do_reduce_labels: bool = False,
        ignore_index: int = IGNORED_LABEL,
        scale: tuple[float, float] = (0.5, 2.0),
        cat_max_ratio: float = 0.75,
        flip_probability: float = 0.5,
        color_jitter: bool = True,
        train_interpolation: Resampling = "bilinear",
    ) -> None:
        errors = size_errors("input_size", input_size, 1, "a positive int or a (height, width) pair")
        errors += normalization_errors(image_mean, image_std) + range_errors("scale", scale, most=math.inf)
        errors += fraction_errors("cat_max_ratio", cat_max_ratio) + _integer_errors("ignore_index", ignore_index)
        errors += [] if num_labels is None else _integer_errors("num_labels", num_labels, 2)
        errors += fraction_errors("flip_probability", flip_probability)
        errors += interpolation_errors("train_interpolation", train_interpolation)
        raise_errors(type(self).__name__, errors)
        self.size = sides_of(input_size)
        self.image_mean, self.image_std = three_numbers(image_mean), three_numbers(image_std)
        self.num_labels, self.do_reduce_labels, self.ignore_index = num_labels, do_reduce_labels, ignore_index
        self.scale, self.cat_max_ratio, self.flip_probability = scale, cat_max_ratio, flip_probability
        self.color_jitter, self.train_interpolation = color_jitter, train_interpolation

    def __call__(self, example: Example, generator: torch.Generator) -> dict[str, Tensor]:
        """Transform one example.

        Args:
            example: An RGB Pillow image and its annotation, an image of class ids.
            generator: A CPU generator.

        Returns:
            `pixel_values` float32 `[3, *input_size]`, zero where padded, and `labels` int64 `input_size`.

        Raises:
            ValueError: If the annotation has another size than the image, or ids outside the classes.
        """
        draw = uniform(generator)
        pixels, labels = np.asarray(example.image), self.labels_of(example)  # [H, W, 3], [H, W]
        height, width = self._scaled_size(pixels.shape[0], pixels.shape[1], draw)
        labels = resize_nearest(labels, (height, width))
        window = self._window(labels, draw)
        pixels = resized(pixels, (height, width), self.train_interpolation)
        pixels = pixels[window.top : window.top + window.height, window.left : window.left + window.width]
        labels = _cut(labels, window)
        if draw(0, 1) < self.flip_probability:
            pixels, labels = pixels[:, ::-1], labels.flip(1)
        if self.color_jitter:
            pixels = distort(np.ascontiguousarray(pixels), draw)
        view = normalized(to_tensor(pixels), self.image_mean, self.image_std)
        below, right = self.size[0] - window.height, self.size[1] - window.width
        padded = torch.nn.functional.pad(view, (0, right, 0, below))
        labels = torch.nn.functional.pad(labels, (0, right, 0, below), value=self.ignore_index)
        return {"pixel_values": padded, "labels": labels.contiguous()}

    def labels_of(self, example: Example) -> Tensor:
        """Return the checked class ids of the annotation, int64 `[H, W]`.

        Raises:
            ValueError: If the annotation has another size than the image, or ids outside the classes.
        """
        if example.label is None:
            raise ValueError("the image has no annotation")
        labels = read_label_maps(example.label)[0]
        size = (example.image.height, example.image.width)
        if tuple(labels.shape) != size:
            raise ValueError(f"the annotation is {list(labels.shape)} (expected {list(size)}, the size of the image)")
        if self.do_reduce_labels:
            labels = reduce_labels(labels)
            if self.ignore_index != IGNORED_LABEL:
                labels = torch.where(labels == IGNORED_LABEL, self.ignore_index, labels)
        if self.num_labels is not None:
            wrong = (labels < 0) | (labels >= self.num_labels)
            found = labels[wrong & (labels != self.ignore_index)].unique().tolist()
            if found:
                after = " after reducing labels" if self.do_reduce_labels else ""
                raise ValueError(
                    f"the annotation has the class ids {join_some(found, 5)}{after} (expected 0 to "
                    f"{self.num_labels - 1}, or {self.ignore_index}, which is ignored)"
                )
        return labels

    def _scaled_size(self, height: int, width: int, draw: Draw) -> Size:
        """Draw the (height, width) to which an image is resized."""
        short = min(self.size) * draw(*self.scale)
        factor = min(_LONGEST * short / max(height, width), short / min(height, width))
        return max(1, round(height * factor)), max(1, round(width * factor))

    def _window(self, labels: Tensor, draw: Draw) -> _Window:
        """Draw a crop in which no class has too many pixels."""
        height, width = (min(side, limit) for side, limit in zip(labels.shape, self.size, strict=True))
        for _ in range(_ATTEMPTS):
            top = int(draw(0, labels.shape[0] - height + 1))
            left = int(draw(0, labels.shape[1] - width + 1))
            window = _Window(top, left, height, width)
            if self._is_mixed(_cut(labels, window)):
                break
        return window

    def _is_mixed(self, labels: Tensor) -> bool:
        counts = labels[labels != self.ignore_index].unique(return_counts=True)[1]
        return len(counts) > 1 and bool(counts.max() < self.cat_max_ratio * counts.sum())


def _cut(labels: Tensor, window: _Window) -> Tensor:
    return labels[window.top : window.top + window.height, window.left : window.left + window.width]


def _integer_errors(name: str, value: Any, least: int | None = None) -> list[FieldError]:
    if is_integer(value) and (least is None or value >= least):
        return []
    expected = "an int" if least is None else f"an int from {least}"
    return [FieldError(f"{describe(name, value)} (expected {expected})", not is_integer(value))]
