"""Two views of an image: one for the model, one for the visual tokenizer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..image_processing.inputs import as_array, as_levels, as_tensor, read_images
from ..image_processing.options import Resampling
from ..image_processing.resampling import Size
from ..utils.messages import raise_errors
from .arguments import (
    fraction_errors,
    interpolation_errors,
    normalization_errors,
    range_errors,
    sides_of,
    size_errors,
    three_numbers,
)
from .seeding import VIEWS, RandomStream, seed_errors
from .tokenizers.pixels import dalle_pixels
from .transforms.crops import draw_crop
from .transforms.pixels import cropped, jitter, normalized, resized, to_tensor
from .transforms.random_numbers import uniform


class TwoViewTransform:
    """Crop and flip an image once, then resize it to two views.

    One view is for the model, one for the tokenizer (section 2.1 of the paper). Names and defaults are those of unilm's
    pre-training. A uint8 tensor and a Pillow image of the same pixels have the same views. Values are within 2 levels
    of Pillow's.

    Args:
        input_size, second_input_size: Sizes of the model's and the tokenizer's view: an int or (height, width).
        train_interpolation, second_interpolation: Their filters, by Pillow's name.
        image_mean, image_std: Normalization of the model's view; use those of the model's image processor.
        map_pixels: Whether the tokenizer's view is `(1 - 0.2) x + 0.1` of pixels `x` from 0 to 1, as DALL-E's encoder
            requires. If False, it is `x`.
        scale: Range of the area of the crop, as a fraction of the image.
        ratio: Range of the aspect ratio of the crop, width by height; log-uniform.
        flip_probability: Probability of a horizontal flip.
        color_jitter: Largest change of brightness, contrast and saturation, in random order before the crop. 0.4 is
            the value of BEiT's recipes with jitter; None changes no colors.
        seed: Seed of an own random stream, which differs between the workers of a DataLoader and between epochs. None
            draws from torch's default generator, which a DataLoader seeds in each worker.

    Raises:
        TypeError, ValueError: If arguments do not fit; the error lists all of them.
    """

    def __init__(
        self,
        input_size: int | Size = 224,
        second_input_size: int | Size = 112,
        train_interpolation: Resampling = "bicubic",
        second_interpolation: Resampling = "lanczos",
        image_mean: float | Sequence[float] = (0.5, 0.5, 0.5),
        image_std: float | Sequence[float] = (0.5, 0.5, 0.5),
        *,
        map_pixels: bool = False,
        scale: tuple[float, float] = (0.08, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        flip_probability: float = 0.5,
        color_jitter: float | None = None,
        seed: int | None = None,
    ) -> None:
        sizes = {"input_size": input_size, "second_input_size": second_input_size}
        filters = {"train_interpolation": train_interpolation, "second_interpolation": second_interpolation}
        expected = "a positive int or a (height, width) pair"
        errors = [error for name, size in sizes.items() for error in size_errors(name, size, 1, expected)]
        errors += [error for name, value in filters.items() for error in interpolation_errors(name, value)]
        errors += normalization_errors(image_mean, image_std)
        errors += range_errors("scale", scale, most=1.0) + range_errors("ratio", ratio, most=math.inf)
        errors += fraction_errors("flip_probability", flip_probability)
        errors += [] if color_jitter is None else fraction_errors("color_jitter", color_jitter)
        raise_errors(type(self).__name__, errors + seed_errors(seed))
        self.size, self.second_size = sides_of(input_size), sides_of(second_input_size)
        self.train_interpolation, self.second_interpolation = train_interpolation, second_interpolation
        self.image_mean, self.image_std = three_numbers(image_mean), three_numbers(image_std)
        self.map_pixels, self.scale, self.ratio = map_pixels, scale, ratio
        self.flip_probability, self.color_jitter, self.seed = flip_probability, color_jitter, seed
        self._stream = RandomStream(seed, VIEWS)

    def __call__(self, image: Any, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Compute both views of one image.

        Args:
            image: A Pillow image, a path, or an array or CPU tensor `[C, H, W]` or `[H, W, C]`: uint8, or floating
                point from 0 to 1, which is rounded to 8 bits. Gray and transparent images become RGB.
            generator: A CPU generator for this call; None is the stream of the constructor.

        Returns:
            `pixel_values` float32 `[3, *input_size]`, normalized, and `tokenizer_pixels` float32
            `[3, *second_input_size]`, from 0 to 1 or mapped.

        Raises:
            FileNotFoundError, OSError: If a file does not exist or cannot be decoded.
            TypeError, ValueError: If the input is not one image.
        """
        pixels = _read_pixels(image)  # [H, W, 3]
        draw = uniform(self._stream.generator() if generator is None else generator)
        if self.color_jitter is not None:
            pixels = jitter(pixels, self.color_jitter, draw)
        crop = draw_crop(pixels.shape[0], pixels.shape[1], self.scale, self.ratio, self.flip_probability, draw)
        pixels = cropped(pixels, crop)
        view = to_tensor(resized(pixels, self.size, self.train_interpolation))
        tokenizer_view = to_tensor(resized(pixels, self.second_size, self.second_interpolation))
        if self.map_pixels:
            tokenizer_view = dalle_pixels(tokenizer_view)
        pixel_values = normalized(view, self.image_mean, self.image_std)
        return {"pixel_values": pixel_values, "tokenizer_pixels": tokenizer_view}


def _read_pixels(image: Any) -> np.ndarray:
    """Read one image as uint8 `[H, W, 3]`."""
    if isinstance(image, Tensor) and image.device.type not in ("cpu", "meta"):
        raise ValueError(f"the image is on {image.device} (expected a CPU tensor: pass image.cpu())")
    images = list(read_images(image, convert_rgb=True, input_data_format=None))
    if len(images) != 1:
        raise ValueError(f"expected one image, got {len(images)}; transform the images of a batch one by one")
    levels, _ = as_levels(as_tensor(images[0], None))
    return np.ascontiguousarray(np.moveaxis(as_array(levels), 0, -1))
