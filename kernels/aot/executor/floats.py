"""Floating-point arithmetic on arrays, and conversions between float types.

fp32 rounds as IEEE does. fma rounds once. The approximations (ex2, lg2, rcp, rsqrt, sqrt, div.full, tanh) are as exact
as fp32 allows, which is within the bounds of PTX.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .dtypes import F16, F32, F64, U16, U32, U64, Array

_TINY = np.finfo(F32).tiny
_FMA_TIE, _FMA_LOW = U64.type(1 << 28), U64.type((1 << 29) - 1)


def bf16_to_f32(bits: Array) -> Array:
    return (bits.astype(U32) << 16).view(F32)


def f16_to_f32(bits: Array) -> Array:
    return bits.view(F16).astype(F32)


def f32_to_bf16(values: Array) -> Array:
    """Round to nearest even; every NaN becomes 0x7FFF."""
    bits = values.view(U32)
    rounded = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(U16)
    return np.where(np.isnan(values), U16.type(0x7FFF), rounded)


def f32_to_f16(values: Array) -> Array:
    """Round to nearest even; every NaN becomes 0x7FFF."""
    return np.where(np.isnan(values), U16.type(0x7FFF), values.astype(F16).view(U16))


def f64_to_odd_f32(values: Array) -> Array:
    """Round so that a second rounding to fewer bits is right: inexact results get an odd last bit."""
    nearest = values.astype(F32)
    exact = nearest.astype(F64) == values
    toward = np.nextafter(nearest, np.where(nearest.astype(F64) < values, F32.type(np.inf), F32.type(-np.inf)))
    odd = np.where(nearest.view(U32) & 1, nearest, toward)
    return np.where(exact | ~np.isfinite(nearest), nearest, odd)


def f64_to_bf16(values: Array) -> Array:
    return f32_to_bf16(f64_to_odd_f32(values))


def f64_to_f16(values: Array) -> Array:
    return np.where(np.isnan(values), U16.type(0x7FFF), values.astype(F16).view(U16))


def f32_to_tf32(values: Array) -> Array:
    """Round to 10 fraction bits, to nearest (cvt.rna). Ties round away from zero."""
    bits = values.view(U32)
    rounded = (bits + U32.type(0x1000)) & U32.type(0xFFFFE000)
    return np.where(np.isfinite(values), rounded, bits & U32.type(0xFFFFE000))


def low_and_high(bits: Array) -> tuple[Array, Array]:
    """Return the two 16-bit halves of uint32."""
    return bits.astype(U16), (bits >> 16).astype(U16)


def join_halves(low: Array, high: Array) -> Array:
    return np.asarray(low.astype(U32) | (high.astype(U32) << 16))


def flush(values: Array) -> Array:
    """Replace subnormal fp32 numbers by zeros of their sign (.ftz)."""
    subnormal = np.abs(values) < _TINY
    return np.where(subnormal, np.copysign(F32.type(0), values), values) if subnormal.any() else values


def saturate(values: Array) -> Array:
    """Clamp to 0 ... 1; NaN becomes 0 (.sat)."""
    return np.where(np.isnan(values), values.dtype.type(0), np.clip(values, 0, 1))


def fused_multiply_add(a: Array, b: Array, c: Array) -> Array:
    """Return a * b + c of fp32, rounded once."""
    product = np.multiply(a, b, dtype=F64)  # exact
    total = product + c
    ties = (total.view(U64) & _FMA_LOW) == _FMA_TIE
    if ties.any():
        total = _resolve_ties(product, np.broadcast_to(c.astype(F64), total.shape), total, ties)
    return total.astype(F32)


def _resolve_ties(product: Array, addend: Array, total: Array, ties: Array) -> Array:
    """Move sums off the middle between two fp32 numbers. Only sums that the fp64 addition rounded onto it move."""
    # The error of the sum is exact (Knuth's TwoSum); it says on which side of the middle the true sum is.
    product = np.broadcast_to(product, total.shape)
    virtual = total - product
    error = (product - (total - virtual)) + (addend - virtual)
    inexact = ties & (error != 0) & np.isfinite(total)
    return np.where(inexact, np.nextafter(total, np.where(error > 0, np.inf, -np.inf)), total)


def reciprocal_root(x: Array) -> Array:
    return (1 / np.sqrt(x.astype(F64))).astype(x.dtype)


def not_equal_ordered(a: Array, b: Array) -> Array:
    return np.asarray((a < b) | (a > b))


def is_unordered(a: Array, b: Array) -> Array:
    return np.asarray(np.isnan(a) | np.isnan(b))


PLAIN: dict[str, Callable[..., Array]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "fma": fused_multiply_add,
    "min": np.fmin,
    "max": np.fmax,
    "neg": np.negative,
    "abs": np.abs,
    "div": np.divide,
    "ex2": np.exp2,
    "lg2": np.log2,
    "sqrt": np.sqrt,
    "rcp": np.reciprocal,
    "rsqrt": reciprocal_root,
    "tanh": np.tanh,
}
"""Operations on fp32, by opcode."""
OPERANDS = {"neg": 1, "abs": 1, "ex2": 1, "lg2": 1, "sqrt": 1, "rcp": 1, "rsqrt": 1, "tanh": 1, "fma": 3}
"""Numbers of operands that are not 2."""
HALF: dict[str, Callable[..., Array]] = {
    **{name: PLAIN[name] for name in ("add", "sub", "mul", "min", "max", "ex2", "tanh")},
    "fma": lambda a, b, c: a * b + c,
}
"""Operations on 16-bit floats, computed in fp64 and rounded to 16 bits."""
SIGN_BITS: dict[str, Callable[[Array], Array]] = {
    "neg": lambda bits: bits ^ bits.dtype.type(0x8000 if bits.dtype == U16 else 0x80008000),
    "abs": lambda bits: bits & bits.dtype.type(0x7FFF if bits.dtype == U16 else 0x7FFF7FFF),
}
"""Operations on the bits of 16-bit floats, one or two of them."""

ORDERED: dict[str, Callable[[Array, Array], Array]] = {
    "eq": np.equal,
    "ne": not_equal_ordered,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "num": lambda a, b: ~is_unordered(a, b),
}
UNORDERED: dict[str, Callable[[Array, Array], Array]] = {
    "equ": lambda a, b: ~not_equal_ordered(a, b),
    "neu": np.not_equal,
    "ltu": lambda a, b: ~(a >= b),
    "leu": lambda a, b: ~(a > b),
    "gtu": lambda a, b: ~(a <= b),
    "geu": lambda a, b: ~(a < b),
    "nan": is_unordered,
}
COMPARISONS = ORDERED | UNORDERED
"""Of floats. The first group is false if an operand is NaN, the second true."""
