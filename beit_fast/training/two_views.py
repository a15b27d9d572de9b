"""Two views of an image: one for the model, one for the visual tokenizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..configuration.fields import is_number
from ..image_processing.inputs import as_array, as_levels, as_tensor, read_images
from ..image_processing.options import RESAMPLING_NAMES, Resampling
from ..image_processing.resampling import Size, resize_array
from ..utils.messages import FieldError, describe, join_choices, raise_errors
from .arguments import sides_of, size_errors
from .seeding import VIEWS, RandomStream, seed_errors
from .tokenizers.pixels import dalle_pixels

if TYPE_CHECKING:
    from PIL.Image import Image as PillowImage

_ATTEMPTS = 10  # crops to draw before the center is taken


class Crop(NamedTuple):
    """Rectangle of pixels, and whether it is flipped from left to right."""

    top: int
    left: int
    height: int
    width: int
    is_flipped: bool


class TwoViewTransform:
    """Crop and flip an image once, then resize it to two views.

    One view is for the model, one for the tokenizer (section 2.1 of the paper). Names and defaults are those of unilm's
    pre-training. Pillow resizes both, also for tensors, so a uint8 tensor and a Pillow image of the same pixels have
    the same views.

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
        means, deviations = _three_numbers(image_mean), _three_numbers(image_std)
        expected = "a positive int or a (height, width) pair"
        errors = [error for name, size in sizes.items() for error in size_errors(name, size, 1, expected)]
        errors += [
            FieldError(f"{describe(name, value)} (expected {join_choices(RESAMPLING_NAMES)})")
            for name, value in filters.items()
            if value not in RESAMPLING_NAMES
        ]
        if len(means) != 3:
            errors.append(FieldError(f"{describe('image_mean', image_mean)} (expected a number or 3 numbers)"))
        if len(deviations) != 3 or min(deviations) <= 0:
            errors.append(FieldError(f"{describe('image_std', image_std)} (expected a positive number or 3 of them)"))
        errors += _range_errors("scale", scale, most=1.0) + _range_errors("ratio", ratio, most=math.inf)
        errors += _fraction_errors("flip_probability", flip_probability)
        errors += [] if color_jitter is None else _fraction_errors("color_jitter", color_jitter)
        raise_errors(type(self).__name__, errors + seed_errors(seed))
        self.size, self.second_size = sides_of(input_size), sides_of(second_input_size)
        self.train_interpolation, self.second_interpolation = train_interpolation, second_interpolation
        self.image_mean, self.image_std = means, deviations
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
        draw = _uniform(self._stream.generator() if generator is None else generator)
        if self.color_jitter is not None:
            pixels = jitter(pixels, self.color_jitter, draw)
        crop = self._crop(pixels.shape[0], pixels.shape[1], draw)
        pixels = pixels[crop.top : crop.top + crop.height, crop.left : crop.left + crop.width]
        if crop.is_flipped:
            pixels = pixels[:, ::-1]
        view = _resized(pixels, self.size, self.train_interpolation)
        tokenizer_view = _resized(pixels, self.second_size, self.second_interpolation)
        mean, std = (torch.tensor(numbers)[:, None, None] for numbers in (self.image_mean, self.image_std))
        if self.map_pixels:
            tokenizer_view = dalle_pixels(tokenizer_view)
        return {"pixel_values": (view - mean) / std, "tokenizer_pixels": tokenizer_view}

    def _crop(self, height: int, width: int, draw: Callable[[float, float], float]) -> Crop:
        """Draw a crop in range; the largest center crop if none fits."""
        is_flipped = draw(0, 1) < self.flip_probability
        low, high = self.ratio
        for _ in range(_ATTEMPTS):
            area = draw(*self.scale) * height * width
            aspect = math.exp(draw(math.log(low), math.log(high)))
            crop_height, crop_width = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
            if 0 < crop_height <= height and 0 < crop_width <= width:
                top = int(draw(0, height - crop_height + 1))
                left = int(draw(0, width - crop_width + 1))
                return Crop(top, left, crop_height, crop_width, is_flipped)
        crop_height, crop_width = height, width
        if width < low * height:
            crop_height = max(1, min(height, round(width / low)))
        elif width > high * height:
            crop_width = max(1, min(width, round(height * high)))
        return Crop((height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width, is_flipped)


def jitter(pixels: np.ndarray, strength: float, draw: Callable[[float, float], float]) -> np.ndarray:
    """Change brightness, contrast and saturation in random order.

    The pixels are uint8 `[H, W, 3]`. Each factor is uniform from `1 - strength` to `1 + strength`.
    """
    from PIL import Image, ImageEnhance

    image: PillowImage = Image.fromarray(pixels)
    steps = [ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color]
    while steps:
        step = steps.pop(int(draw(0, len(steps))))
        image = step(image).enhance(draw(1 - strength, 1 + strength))
    return np.asarray(image)


def _read_pixels(image: Any) -> np.ndarray:
    """Read one image as uint8 `[H, W, 3]`."""
    if isinstance(image, Tensor) and image.device.type not in ("cpu", "meta"):
        raise ValueError(f"the image is on {image.device} (expected a CPU tensor: pass image.cpu())")
    images = list(read_images(image, convert_rgb=True, input_data_format=None))
    if len(images) != 1:
        raise ValueError(f"expected one image, got {len(images)}; transform the images of a batch one by one")
    levels, _ = as_levels(as_tensor(images[0], None))
    return np.ascontiguousarray(np.moveaxis(as_array(levels), 0, -1))


def _resized(pixels: np.ndarray, size: Size, interpolation: Resampling) -> Tensor:
    """Resize uint8 `[H, W, 3]` to float32 `[3, *size]`.

    The result is from 0 to 1.
    """
    resized = resize_array(pixels, size, RESAMPLING_NAMES.index(interpolation))
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(resized, -1, 0))).float() / 255


def _uniform(generator: torch.Generator | None) -> Callable[[float, float], float]:
    """Return a function that draws a number from `low` to `high`."""

    def draw(low: float, high: float) -> float:
        return low + (high - low) * torch.rand((), dtype=torch.float64, generator=generator).item()

    return draw


def _three_numbers(value: Any) -> list[float]:
    numbers = value.tolist() if hasattr(value, "tolist") else value
    return [float(number) for number in (numbers if isinstance(numbers, Sequence) else [numbers] * 3)]


def _range_errors(name: str, limits: Any, most: float) -> list[FieldError]:
    has_type = isinstance(limits, (tuple, list)) and all(map(is_number, limits))
    if has_type and len(limits) == 2 and 0 < limits[0] <= limits[1] <= most and limits[1] < math.inf:
        return []
    upper = "" if most == math.inf else f", at most {most:g}"
    expected = f"a pair of positive numbers, the smaller one first{upper}"
    return [FieldError(f"{describe(name, limits)} (expected {expected})", not has_type)]


def _fraction_errors(name: str, value: Any) -> list[FieldError]:
    fits = is_number(value) and 0 <= value <= 1
    return (
        [] if fits else [FieldError(f"{describe(name, value)} (expected a number from 0 to 1)", not is_number(value))]
    )
