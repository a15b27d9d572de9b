"""Operations of RandAugment on Pillow images, with timm's names, ranges and levels.

A level is from 0 to 10, or to the `mmax` of a policy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from .random_numbers import Draw

if TYPE_CHECKING:
    from PIL.Image import Image as PillowImage

LEVELS = 10.0
"""The level at which an operation has the end of its range."""

Color: TypeAlias = tuple[int, int, int]

_DEGREES, _SHEAR, _TRANSLATION = 30.0, 0.3, 0.45
_LEAST_FACTOR = 0.1


class Placement(NamedTuple):
    """How a geometric operation samples pixels.

    Args:
        resample: Pillow's number of the filter.
        fill: The color of pixels outside the image.
    """

    resample: int
    fill: Color


Operation: TypeAlias = "Callable[[PillowImage, float, Placement, Draw], PillowImage]"
"""Change an RGB image by a level."""


def _signed(value: float, draw: Draw) -> float:
    """Return the value or, half of the time, its negative."""
    return -value if draw(0, 1) > 0.5 else value


def _affine(image: PillowImage, matrix: tuple[float, ...], placement: Placement) -> PillowImage:
    from PIL import Image

    filter_ = Image.Resampling(placement.resample)
    return image.transform(image.size, Image.Transform.AFFINE, matrix, resample=filter_, fillcolor=placement.fill)


def _auto_contrast(image: PillowImage, level: float, placement: Placement, draw: Draw) -> PillowImage:
    from PIL import ImageOps

    return ImageOps.autocontrast(image)


def _equalize(image: PillowImage, level: float, placement: Placement, draw: Draw) -> PillowImage:
    from PIL import ImageOps

    return ImageOps.equalize(image)


def _invert(image: PillowImage, level: float, placement: Placement, draw: Draw) -> PillowImage:
    from PIL import ImageOps

    return ImageOps.invert(image)


def _rotate(image: PillowImage, level: float, placement: Placement, draw: Draw) -> PillowImage:
    from PIL import Image

    degrees = _signed(level / LEVELS * _DEGREES, draw)
    return image.rotate(degrees, resample=Image.Resampling(placement.resample), fillcolor=placement.fill)


def _shear_x(image: PillowImage, level: float, placement: Placement, draw: Draw) -> PillowImage:
    return _affine(image, (1, _signed(level / LEVELS * _SHEAR, draw), 0, 0, 1, 0), placement)


def _shear_y(image: PillowImage, level: float, placement: Placement, draw: Draw) -> PillowImage:
    return _affine(image, (1, 0, 0, _signed(level / LEVELS * _SHEAR, draw), 1, 0), placement)


def _translate_x(image: PillowImage, level: float, placement: Placement, draw: Draw) -> PillowImage:
    pixels = _signed(level / LEVELS * _TRANSLATION, draw) * image.width
    return _affine(image, (1, 0, pixels, 0, 1, 0), placement)


def _translate_y(image: PillowImage, level: float, placement: Placement, draw: Draw) -> PillowImage:
    pixels = _signed(level / LEVELS * _TRANSLATION, draw) * image.height
    return _affine(image, (1, 0, 0, 0, 1, pixels), placement)


def _posterized(image: PillowImage, bits: int) -> PillowImage:
    """Keep the high bits of each channel; 0 bits are black, which Pillow 13 refuses."""
    kept = 256 - 2 ** (8 - bits)
    return image.point([value & kept for value in range(256)] * 3)


def _posterize(image: PillowImage, level: float, placement: Placement, draw: Draw) -> PillowImage:
    return _posterized(image, int(level / LEVELS * 4))


def _posterize_increasing(image: PillowImage, level: float, placement: Placement, draw: Draw) -> PillowImage:
    return _posterized(image, 4 - int(level / LEVELS * 4))


def _solarize_limit(level: float) -> int:
    return min(256, int(level / LEVELS * 256))


def _solarize(image: PillowImage, level: float, placement: Placement, draw: Draw) -> PillowImage:
    from PIL import ImageOps

    return ImageOps.solarize(image, _solarize_limit(level))


def _solarize_increasing(image: PillowImage, level: float, placement: Placement, draw: Draw) -> PillowImage:
    from PIL import ImageOps

    return ImageOps.solarize(image, 256 - _solarize_limit(level))


def _solarize_add(image: PillowImage, level: float, placement: Placement, draw: Draw) -> PillowImage:
    """Add to pixels below 128."""
    added = min(128, int(level / LEVELS * 110))
    table = [min(255, value + added) if value < 128 else value for value in range(256)]
    return image.point(table * 3)


def _enhanced(name: str) -> Operation:
    """Return an operation with factors from 0.1 to 1.9; level 5 changes nothing."""

    def enhance(image: PillowImage, level: float, placement: Placement, draw: Draw) -> PillowImage:
        from PIL import ImageEnhance

        return getattr(ImageEnhance, name)(image).enhance(level / LEVELS * 1.8 + 0.1)

    return enhance


def _enhanced_increasing(name: str) -> Operation:
    """Return an operation with factors further from 1 at higher levels."""

    def enhance(image: PillowImage, level: float, placement: Placement, draw: Draw) -> PillowImage:
        from PIL import ImageEnhance

        factor = max(_LEAST_FACTOR, 1.0 + _signed(level / LEVELS * 0.9, draw))
        return getattr(ImageEnhance, name)(image).enhance(factor)

    return enhance


def _desaturate(image: PillowImage, level: float, placement: Placement, draw: Draw) -> PillowImage:
    from PIL import ImageEnhance

    amount = min(1.0, 0.5 + 0.5 * level / LEVELS)
    return ImageEnhance.Color(image).enhance(1.0 - amount)


def _gaussian_blur(image: PillowImage, level: float, placement: Placement, draw: Draw) -> PillowImage:
    from PIL import ImageFilter

    return image.filter(ImageFilter.GaussianBlur(radius=min(2.0, 0.1 + 1.9 * level / LEVELS)))


OPERATIONS: dict[str, Operation] = {
    "AutoContrast": _auto_contrast,
    "Equalize": _equalize,
    "Invert": _invert,
    "Rotate": _rotate,
    "Posterize": _posterize,
    "PosterizeIncreasing": _posterize_increasing,
    "Solarize": _solarize,
    "SolarizeIncreasing": _solarize_increasing,
    "SolarizeAdd": _solarize_add,
    "Color": _enhanced("Color"),
    "ColorIncreasing": _enhanced_increasing("Color"),
    "Contrast": _enhanced("Contrast"),
    "ContrastIncreasing": _enhanced_increasing("Contrast"),
    "Brightness": _enhanced("Brightness"),
    "BrightnessIncreasing": _enhanced_increasing("Brightness"),
    "Sharpness": _enhanced("Sharpness"),
    "SharpnessIncreasing": _enhanced_increasing("Sharpness"),
    "ShearX": _shear_x,
    "ShearY": _shear_y,
    "TranslateXRel": _translate_x,
    "TranslateYRel": _translate_y,
    "Desaturate": _desaturate,
    "GaussianBlur": _gaussian_blur,
}
"""Operations by timm's names."""
