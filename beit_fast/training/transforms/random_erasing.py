"""Random erasing (arXiv 1708.04896), with timm's names and defaults."""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ...configuration.fields import is_integer
from ...utils.messages import FieldError, describe, join_choices, raise_errors
from ..arguments import fraction_errors, range_errors
from .random_numbers import Draw, uniform

ErasingMode = Literal["const", "rand", "pixel"]
ERASING_MODES: tuple[ErasingMode, ...] = get_args(ErasingMode)

_ATTEMPTS = 10  # rectangles to draw before one is left out


class RandomErasing:
    """Erase rectangles of a normalized image.

    Args:
        probability: Probability that an image is changed. unilm's name is `reprob`.
        mode: What replaces the pixels: `"const"` zeros, `"rand"` one normal number for each channel, `"pixel"`
            normal numbers. unilm's name is `remode`.
        count: Most rectangles of an image, whose number is uniform from 1. They share the area. unilm's name is
            `recount`.
        area: Range of the erased area, as a fraction of the image.
        aspect: Range of the aspect ratio, height by width; log-uniform.

    Raises:
        TypeError, ValueError: If arguments do not fit; the error lists all of them.
    """

    def __init__(
        self,
        probability: float = 0.25,
        mode: ErasingMode = "pixel",
        count: int = 1,
        *,
        area: tuple[float, float] = (0.02, 1 / 3),
        aspect: tuple[float, float] = (0.3, 1 / 0.3),
    ) -> None:
        errors = fraction_errors("probability", probability) + _count_errors(count)
        if mode not in ERASING_MODES:
            errors.append(FieldError(f"{describe('mode', mode)} (expected {join_choices(ERASING_MODES)})"))
        errors += range_errors("area", area, most=1.0) + range_errors("aspect", aspect, most=math.inf)
        raise_errors(type(self).__name__, errors)
        self.probability, self.mode, self.count = probability, mode, count
        self.area, self.aspect = area, aspect

    def __call__(self, pixel_values: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Erase rectangles of floating-point pixels `[C, H, W]`.

        Args:
            pixel_values: Normalized pixels on the CPU; they are not modified.
            generator: A CPU generator; None is torch's default one.

        Returns:
            `[C, H, W]` of the same dtype.
        """
        draw = uniform(generator)
        if draw(0, 1) >= self.probability:
            return pixel_values
        channels, height, width = pixel_values.shape
        erased = pixel_values.clone()
        count = 1 + int(draw(0, self.count))
        for _ in range(count):
            found = self._rectangle(height, width, count, draw)
            if found is None:
                continue
            top, left, rows, columns = found
            shape = (channels, rows, columns) if self.mode == "pixel" else (channels, 1, 1)
            new = torch.zeros(shape) if self.mode == "const" else torch.randn(shape, generator=generator)
            erased[:, top : top + rows, left : left + columns] = new
        return erased

    def _rectangle(self, height: int, width: int, count: int, draw: Draw) -> tuple[int, int, int, int] | None:
        """Draw (top, left, height, width) of a rectangle smaller than the image; None if none fits."""
        low, high = (math.log(limit) for limit in self.aspect)
        for _ in range(_ATTEMPTS):
            area = draw(*self.area) * height * width / count
            aspect = math.exp(draw(low, high))
            rows, columns = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if rows < height and columns < width:
                return int(draw(0, height - rows + 1)), int(draw(0, width - columns + 1)), rows, columns
        return None


def _count_errors(count: Any) -> list[FieldError]:
    fits = is_integer(count) and count >= 1
    return [] if fits else [FieldError(f"{describe('count', count)} (expected a positive int)", not is_integer(count))]
