"""RandAugment (arXiv 1909.13719) by timm's policy strings, with Pillow."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

import torch

from ...image_processing.options import RESAMPLING_NAMES
from ...utils.messages import FieldError, describe, join_choices, raise_errors
from ..arguments import interpolation_errors
from .augment_ops import LEVELS, OPERATIONS, Color, Placement
from .random_numbers import one_of, uniform

if TYPE_CHECKING:
    from PIL.Image import Image as PillowImage

GRAY: Color = (128, 128, 128)
_RANDOM_FILTERS = ("bilinear", "bicubic")
_MANY = 100.0  # standard deviations above it draw the magnitude uniformly

_GEOMETRY = ("Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel")
_COLORS = ("Posterize", "Solarize", "Color", "Contrast", "Brightness", "Sharpness")
_PLAIN = ("AutoContrast", "Equalize", "Invert", "SolarizeAdd")
_FIXED = (*_PLAIN, *_GEOMETRY, *_COLORS)
_INCREASING = (*_PLAIN, *_GEOMETRY, *(f"{name}Increasing" for name in _COLORS))

_WEIGHTED_SETS: dict[str, dict[str, float]] = {
    "weights": {
        "Rotate": 3,
        "ShearX": 2,
        "ShearY": 2,
        "TranslateXRel": 1,
        "TranslateYRel": 1,
        "ColorIncreasing": 0.25,
        "SharpnessIncreasing": 0.25,
        "AutoContrast": 0.25,
        "SolarizeIncreasing": 0.05,
        "SolarizeAdd": 0.05,
        "ContrastIncreasing": 0.05,
        "BrightnessIncreasing": 0.05,
        "Equalize": 0.05,
        "PosterizeIncreasing": 0.05,
        "Invert": 0.05,
    },
    "3aw": {
        "SolarizeIncreasing": 6,
        "Desaturate": 6,
        "GaussianBlur": 6,
        "Rotate": 3,
        "ShearX": 2,
        "ShearY": 2,
        "PosterizeIncreasing": 1,
        "AutoContrast": 1,
        "ColorIncreasing": 1,
        "SharpnessIncreasing": 1,
        "ContrastIncreasing": 1,
        "BrightnessIncreasing": 1,
        "Equalize": 1,
        "Invert": 1,
    },
}
_PLAIN_SETS = {"3a": ("SolarizeIncreasing", "Desaturate", "GaussianBlur")}
_SETS = (*_WEIGHTED_SETS, *_PLAIN_SETS)

_SECTION = re.compile(r"(mstd|mmax|inc|m|n|p)(\d+(?:\.\d*)?(?:e[+-]?\d+)?|\.\d+)")
_EXPECTED = {
    "m": "an integer from 0",
    "n": "an integer from 1",
    "p": "a number from 0 to 1",
    "mstd": "a number from 0",
    "mmax": "an integer from 1",
    "inc": "0 or 1",
}
_HELP = "rand, then sections such as m9, n2, p0.5, mstd0.5, mmax10, inc1 or tweights, separated by dashes"


class RandAugment:
    """Apply random operations to a Pillow image.

    A policy string of timm selects them. That of BEiT's fine-tuning is `"rand-m9-mstd0.5-inc1"`. Sections are in any
    order:

    | section | meaning | default |
    |---|---|---|
    | `m9` | magnitude of the operations | 10 |
    | `n2` | operations for each image, drawn with replacement | 2 |
    | `p0.5` | probability that a drawn operation is applied | 0.5 |
    | `mstd0.5` | standard deviation of the magnitude; above 100 it is uniform from 0 to `m` | 0 |
    | `mmax10` | upper bound of the magnitude | 10 |
    | `inc1` | use the operations that change more the higher the magnitude is | 0 |
    | `tweights` | another set of operations: `weights`, `3a` or `3aw`; weighted sets draw without replacement | |

    Args:
        policy: The policy string.
        fill: RGB color of pixels outside the image.
        interpolation: Pillow's filter of rotations, shears and translations. `"random"` is bilinear or bicubic.

    Raises:
        TypeError, ValueError: If arguments do not fit; the error lists all of them.
    """

    def __init__(
        self, policy: str = "rand-m9-mstd0.5-inc1", *, fill: Color = GRAY, interpolation: str = "bicubic"
    ) -> None:
        values, set_name, errors = _parsed(policy)
        raise_errors(type(self).__name__, errors + interpolation_errors("interpolation", interpolation, ("random",)))
        self.policy, self.fill = policy, fill
        self.magnitude, self.probability = values.get("m", LEVELS), values.get("p", 0.5)
        self.count = int(values.get("n", 2))
        self.deviation = values.get("mstd", 0.0)
        self.most = values.get("mmax", LEVELS)
        names = _RANDOM_FILTERS if interpolation == "random" else (interpolation,)
        self.filters = [RESAMPLING_NAMES.index(name) for name in names]
        weights = _WEIGHTED_SETS.get(set_name)
        default = _INCREASING if values.get("inc", 0) else _FIXED
        self.names: tuple[str, ...] = _PLAIN_SETS.get(set_name, default) if weights is None else tuple(weights)
        self.weights = None if weights is None else torch.tensor(list(weights.values()), dtype=torch.float64)
        if weights is not None and self.count > len(weights):
            text = f"n{self.count} of {describe('policy', policy)} (expected at most {len(weights)}, the operations "
            raise_errors(type(self).__name__, [FieldError(f"{text}of {set_name!r}, which are drawn once)")])

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.policy!r}, fill={self.fill})"

    def __call__(self, image: PillowImage, generator: torch.Generator | None = None) -> PillowImage:
        """Augment an RGB image.

        Args:
            image: A Pillow image of mode RGB; it is not modified.
            generator: A CPU generator; None is torch's default one.
        """
        draw = uniform(generator)
        for name in self._drawn_names(generator):
            if draw(0, 1) >= self.probability:
                continue
            level = self._level(generator)
            image = OPERATIONS[name](image, level, Placement(one_of(self.filters, draw), self.fill), draw)
        return image

    def _drawn_names(self, generator: torch.Generator | None) -> list[str]:
        if self.weights is None:
            indices = torch.randint(len(self.names), (self.count,), generator=generator)
        else:
            indices = torch.multinomial(self.weights, self.count, generator=generator)
        return [self.names[index] for index in indices.tolist()]

    def _level(self, generator: torch.Generator | None) -> float:
        """Draw the magnitude and clip it."""
        level = float(self.magnitude)
        if self.deviation > _MANY:
            level = uniform(generator)(0, level)
        elif self.deviation > 0:
            noise = torch.randn((), dtype=torch.float64, generator=generator).item()
            level += self.deviation * noise
        return min(max(level, 0.0), self.most)


def _parsed(policy: Any) -> tuple[dict[str, float], str, list[FieldError]]:
    """Read a policy: the numbers of its sections, the name of its set of operations, and what does not fit."""
    if not isinstance(policy, str):
        return {}, "", [FieldError(f"{describe('policy', policy)} (expected a string: {_HELP})", wrong_type=True)]
    first, *sections = policy.split("-")
    values: dict[str, float] = {}
    set_name = ""
    errors = [] if first == "rand" else [FieldError(f"{describe('policy', policy)} (expected {_HELP})")]
    for section in sections if first == "rand" else ():
        match = _SECTION.fullmatch(section)
        if section.startswith("t"):
            set_name = section[1:]
            if set_name not in _SETS:
                errors.append(FieldError(f"section {section!r} of the policy (expected t and {join_choices(_SETS)})"))
        elif match is None:
            errors.append(FieldError(f"section {section!r} of {describe('policy', policy)} (expected {_HELP})"))
        elif not _fits(match[1], float(match[2])):
            errors.append(FieldError(f"section {section!r} of the policy (expected {_EXPECTED[match[1]]})"))
        else:
            values[match[1]] = float(match[2])
    return values, set_name, errors


def _fits(key: str, value: float) -> bool:
    if key in ("m", "n", "mmax", "inc") and value != math.floor(value):
        return False
    least = 1 if key in ("n", "mmax") else 0
    most = 1.0 if key in ("p", "inc") else math.inf
    return least <= value <= most
