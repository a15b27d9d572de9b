"""Transforms of image classification: augmentation for training, and the processor of evaluation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from ...image_processing import BeitImageProcessor
from ...image_processing.options import Resampling
from ...image_processing.resampling import Size
from ...image_processing.timm_options import resize_options
from ...utils.messages import raise_errors
from ..arguments import (
    fraction_errors,
    interpolation_errors,
    normalization_errors,
    range_errors,
    sides_of,
    size_errors,
    three_numbers,
)
from .crops import draw_crop
from .pixels import cropped, jitter, normalized, resized, to_tensor
from .rand_augment import RandAugment
from .random_erasing import ErasingMode, RandomErasing
from .random_numbers import one_of, uniform

if TYPE_CHECKING:
    from ..data.source import Example

_RANDOM_FILTERS: tuple[Resampling, ...] = ("bilinear", "bicubic")
_LARGE, _CROP_OF_SMALL = 384, 224 / 256  # from this size on, unilm evaluates the whole image


class ClassificationTransform:
    """Crop, flip, augment, normalize and erase an image for training.

    Names and defaults are those of unilm's fine-tuning. All random numbers come from the generator of a call.

    Args:
        input_size: Size of the result: an int or (height, width).
        image_mean, image_std: Normalization; use those of the model's image processor.
        train_interpolation: Filter of resizing by Pillow's name; `"random"` is bilinear or bicubic.
        aa: RandAugment's policy, or None.
        color_jitter: Largest change of brightness, contrast and saturation, without a policy only, as in timm. None
            changes no colors.
        reprob, remode, recount: Probability, mode and count of `RandomErasing`.
        scale: Range of the area of the crop, as a fraction of the image.
        ratio: Range of the aspect ratio of the crop, width by height; log-uniform.
        flip_probability: Probability of a horizontal flip.

    Raises:
        TypeError, ValueError: If arguments do not fit; the error lists all of them.
    """

    def __init__(
        self,
        input_size: int | Size = 224,
        image_mean: float | Sequence[float] = (0.5, 0.5, 0.5),
        image_std: float | Sequence[float] = (0.5, 0.5, 0.5),
        *,
        train_interpolation: Resampling | Literal["random"] = "bicubic",
        aa: str | None = "rand-m9-mstd0.5-inc1",
        color_jitter: float | None = 0.4,
        reprob: float = 0.25,
        remode: ErasingMode = "pixel",
        recount: int = 1,
        scale: tuple[float, float] = (0.08, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        flip_probability: float = 0.5,
    ) -> None:
        errors = size_errors("input_size", input_size, 1, "a positive int or a (height, width) pair")
        errors += normalization_errors(image_mean, image_std)
        errors += interpolation_errors("train_interpolation", train_interpolation, ("random",))
        errors += [] if color_jitter is None else fraction_errors("color_jitter", color_jitter)
        errors += range_errors("scale", scale, most=1.0) + range_errors("ratio", ratio, most=math.inf)
        errors += fraction_errors("flip_probability", flip_probability)
        raise_errors(type(self).__name__, errors)
        self.size = sides_of(input_size)
        self.image_mean, self.image_std = three_numbers(image_mean), three_numbers(image_std)
        self.filters: tuple[Resampling, ...] = (
            _RANDOM_FILTERS if train_interpolation == "random" else (train_interpolation,)
        )
        red, green, blue = (min(255, max(0, round(255 * mean))) for mean in self.image_mean)
        fill = (red, green, blue)
        self.augment = None if aa is None else RandAugment(aa, fill=fill, interpolation=train_interpolation)
        self.color_jitter = color_jitter
        self.erase = RandomErasing(reprob, remode, recount)
        self.scale, self.ratio, self.flip_probability = scale, ratio, flip_probability

    def __call__(self, example: Example, generator: torch.Generator) -> dict[str, Tensor]:
        """Transform one example.

        Args:
            example: An RGB Pillow image and its class id, or None.
            generator: A CPU generator.

        Returns:
            `pixel_values` float32 `[3, *input_size]`, and `labels` int64 `[]` if the example has a label.
        """
        draw = uniform(generator)
        pixels = np.asarray(example.image)  # [H, W, 3]
        crop = draw_crop(pixels.shape[0], pixels.shape[1], self.scale, self.ratio, self.flip_probability, draw)
        pixels = resized(cropped(pixels, crop), self.size, one_of(self.filters, draw))
        if self.augment is not None:
            pixels = self._augmented(pixels, generator)
        elif self.color_jitter is not None:
            pixels = jitter(pixels, self.color_jitter, draw)
        view = normalized(to_tensor(pixels), self.image_mean, self.image_std)
        features = {"pixel_values": self.erase(view, generator)}
        if example.label is not None:
            features["labels"] = torch.tensor(example.label)
        return features

    def _augmented(self, pixels: np.ndarray, generator: torch.Generator) -> np.ndarray:
        from PIL import Image

        assert self.augment is not None
        return np.asarray(self.augment(Image.fromarray(np.ascontiguousarray(pixels)), generator))


def evaluation_processor(
    input_size: int | Size = 224,
    image_mean: float | Sequence[float] = (0.5, 0.5, 0.5),
    image_std: float | Sequence[float] = (0.5, 0.5, 0.5),
    *,
    crop_pct: float | None = None,
    interpolation: Resampling = "bicubic",
) -> BeitImageProcessor:
    """Return the image processor that evaluates a classifier.

    It resizes an image to `input_size / crop_pct` and crops the center. With 1, a square image is resized and cropped
    to its center; sizes that are not square are resized without keeping the aspect ratio.

    Args:
        input_size: Size of the model's images: an int or (height, width).
        image_mean, image_std: Normalization, as in training.
        crop_pct: Share of the shorter side that is left. None is 224 / 256 below 384 pixels and 1 from there on, as
            in unilm.
        interpolation: Filter of resizing, by Pillow's name.

    Raises:
        TypeError, ValueError: If arguments do not fit; the error lists all of them.
    """
    errors = size_errors("input_size", input_size, 1, "a positive int or a (height, width) pair")
    raise_errors("evaluation_processor", errors + normalization_errors(image_mean, image_std))
    height, width = sides_of(input_size)
    if crop_pct is None:
        crop_pct = _CROP_OF_SMALL if min(height, width) < _LARGE else 1.0
    mode = "center" if height == width else "squash"
    entries = {"crop_pct": crop_pct, "interpolation": interpolation, "crop_mode": mode}
    options = resize_options(entries, (height, width))
    return BeitImageProcessor(**options, image_mean=three_numbers(image_mean), image_std=three_numbers(image_std))
