"""Checks that the classes of this folder share."""

from __future__ import annotations

from typing import Any

from ..configuration.fields import is_integer, to_integer
from ..utils.messages import FieldError, describe


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
