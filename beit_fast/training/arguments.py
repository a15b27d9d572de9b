"""Checks that the classes of this folder share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ..configuration.fields import is_integer, is_number, to_integer
from ..image_processing.options import RESAMPLING_NAMES
from ..utils.messages import FieldError, describe, join_choices


def sides_of(size: Any) -> tuple[Any, ...]:
    """Return the sides of a size: one number for both, or (height, width). They are not checked."""
    return tuple(map(to_integer, size if isinstance(size, (tuple, list)) else (size, size)))


def size_errors(name: str, size: Any, least: int, expected: str) -> list[FieldError]:
    """Return why a size is not two integers from `least` on."""
    sides = sides_of(size)
    has_type = all(map(is_integer, sides))
    if has_type and len(sides) == 2 and min(sides) >= least:
        return []
    return [FieldError(f"{describe(name, size)} (expected {expected})", not has_type)]


def interpolation_errors(name: str, value: Any, others: tuple[str, ...] = ()) -> list[FieldError]:
    """Return why a value is neither a filter nor in `others`."""
    accepted = (*RESAMPLING_NAMES, *others)
    return [] if value in accepted else [FieldError(f"{describe(name, value)} (expected {join_choices(accepted)})")]


def three_numbers(value: Any) -> list[float]:
    """Return the numbers of three channels.

    A number is for all of them. The length of a sequence is not checked.
    """
    numbers = value.tolist() if hasattr(value, "tolist") else value
    return [float(number) for number in (numbers if isinstance(numbers, Sequence) else [numbers] * 3)]


def normalization_errors(image_mean: Any, image_std: Any) -> list[FieldError]:
    """Return why mean and standard deviation are not of three channels."""
    errors = []
    deviations = three_numbers(image_std)
    if len(three_numbers(image_mean)) != 3:
        errors.append(FieldError(f"{describe('image_mean', image_mean)} (expected a number or 3 numbers)"))
    if len(deviations) != 3 or min(deviations) <= 0:
        errors.append(FieldError(f"{describe('image_std', image_std)} (expected a positive number or 3 of them)"))
    return errors


def range_errors(name: str, limits: Any, most: float) -> list[FieldError]:
    """Return why limits are not two ordered positive numbers up to `most`."""
    has_type = isinstance(limits, (tuple, list)) and all(map(is_number, limits))
    if has_type and len(limits) == 2 and 0 < limits[0] <= limits[1] <= most and limits[1] < math.inf:
        return []
    upper = "" if most == math.inf else f", at most {most:g}"
    expected = f"a pair of positive numbers, the smaller one first{upper}"
    return [FieldError(f"{describe(name, limits)} (expected {expected})", not has_type)]


def fraction_errors(name: str, value: Any) -> list[FieldError]:
    """Return why a value is not a number from 0 to 1."""
    fits = is_number(value) and 0 <= value <= 1
    expected = "a number from 0 to 1"
    return [] if fits else [FieldError(f"{describe(name, value)} (expected {expected})", not is_number(value))]
