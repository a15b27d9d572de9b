"""PTX types as NumPy dtypes, and the bit patterns of undefined values."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
Dtype = np.dtype[Any]

PRED: Dtype = np.dtype(np.bool_)
U8, U16, U32, U64 = (np.dtype(f"uint{bits}") for bits in (8, 16, 32, 64))
S8, S16, S32, S64 = (np.dtype(f"int{bits}") for bits in (8, 16, 32, 64))
F16, F32, F64 = (np.dtype(f"float{bits}") for bits in (16, 32, 64))
C128: Dtype = np.dtype("complex128")

DTYPES: dict[str, Dtype] = {
    "pred": PRED,
    **{f"{letter}{8 * dtype.itemsize}": dtype for letter in "bu" for dtype in (U8, U16, U32, U64)},
    **{f"s{8 * dtype.itemsize}": dtype for dtype in (S8, S16, S32, S64)},
    **{f"f{8 * dtype.itemsize}": dtype for dtype in (F16, F32, F64)},
    "bf16": U16,
    "bf16x2": U32,
    "f16x2": U32,
    "f32x2": U64,
}
"""Of PTX's types; NumPy has no bf16, so its bits are uint16."""

ITEMS: dict[int, Dtype] = {1: U8, 2: U16, 4: U32, 8: U64, 16: C128}
"""Memory accesses by size in bytes. A complex number stands for 16 bytes that are only copied."""

SIGNED = {U8: S8, U16: S16, U32: S32, U64: S64}
WIDER = {U8: U16, S8: S16, U16: U32, S16: S32, U32: U64, S32: S64}

UNINITIALIZED = 0x7FDB
IN_FLIGHT = 0x7FAD
"""16-bit halves of values that were never written, or whose asynchronous write was not waited for: NaN in all types."""


def unsigned(dtype: Dtype) -> Dtype:
    """Return the unsigned type of the same size; predicates stay predicates."""
    return dtype if dtype == PRED else np.dtype(f"uint{8 * dtype.itemsize}")


@functools.cache
def pattern(half: int, dtype: Dtype) -> Array:
    """Return an array of one element whose 16-bit halves are `half`."""
    if dtype == PRED:
        return np.zeros(1, PRED)
    return np.full(max(1, dtype.itemsize // 2), half, U16).view(U8)[: dtype.itemsize].view(dtype)


_WORDS = {(half, size): pattern(half, ITEMS[size]) for half in (UNINITIALIZED, IN_FLIGHT) for size in (1, 2, 4)}


def holds_pattern(values: Array, half: int) -> Array:
    """Return which items hold the pattern.

    An item holds it if one of its 32-bit words, or all of it, is the pattern.
    """
    size = min(values.dtype.itemsize, 4)
    words = values.view(ITEMS[size]).reshape(len(values), -1)
    return np.asarray((words == _WORDS[half, size]).any(1))


def has_pattern(values: Array, half: int) -> bool:
    """Return whether `holds_pattern` is true for any item."""
    size = min(values.dtype.itemsize, 4)
    return bool((values.view(ITEMS[size]) == _WORDS[half, size]).any())
