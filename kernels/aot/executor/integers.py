"""Integer arithmetic on arrays of one dtype, as PTX defines it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .dtypes import U32, U64, WIDER, Array


def quotient(a: Array, b: Array) -> Array:
    """Divide and round to zero. All bits are set where b is 0, which PTX leaves undefined."""
    safe = np.where(b == 0, b.dtype.type(1), b)
    if a.dtype.kind == "u":
        return np.where(b == 0, ~a.dtype.type(0), a // safe)
    floor = a // safe
    result = floor + ((floor * safe != a) & ((a < 0) != (safe < 0))).astype(a.dtype)
    return np.where(b == 0, a.dtype.type(-1), result)


def remainder(a: Array, b: Array) -> Array:
    return np.asarray(a - quotient(a, b) * b)


def high_product(a: Array, b: Array) -> Array:
    """Return the upper half of the product."""
    bits = 8 * a.dtype.itemsize
    if bits < 64:
        return (np.multiply(a, b, dtype=WIDER[a.dtype]) >> bits).astype(a.dtype)
    low = U64.type(0xFFFFFFFF)
    x, y = a.view(U64), b.view(U64)
    x0, x1, y0, y1 = x & low, x >> 32, y & low, y >> 32
    middle = x1 * y0 + ((x0 * y0) >> 32)
    other = x0 * y1 + (middle & low)
    high = x1 * y1 + (middle >> 32) + (other >> 32)
    if a.dtype.kind == "i":
        high = high - np.where(a < 0, y, U64.type(0)) - np.where(b < 0, x, U64.type(0))
    return np.asarray(high).view(a.dtype)


def wide_product(a: Array, b: Array) -> Array:
    """Return the product in twice as many bits."""
    return np.multiply(a, b, dtype=WIDER[a.dtype])


def shift_left(a: Array, amount: Array) -> Array:
    bits = 8 * a.dtype.itemsize
    moved = a << np.minimum(amount, bits - 1).astype(a.dtype)
    return np.where(amount >= bits, a.dtype.type(0), moved)


def shift_right(a: Array, amount: Array) -> Array:
    """Shift; signed types are filled with the sign."""
    bits = 8 * a.dtype.itemsize
    moved = a >> np.minimum(amount, bits - 1).astype(a.dtype)
    return np.asarray(moved) if a.dtype.kind == "i" else np.where(amount >= bits, a.dtype.type(0), moved)


def extract_bits(a: Array, start: Array, length: Array) -> Array:
    """bfe: `length` bits from `start`, filled with the sign of the field if signed."""
    bits = 8 * a.dtype.itemsize
    start, length = (np.broadcast_to(part & 0xFF, a.shape).astype(np.int64) for part in (start, length))
    value = np.zeros(np.broadcast_shapes(a.shape, start.shape), a.dtype)
    # Beyond the upper end PTX repeats the sign bit of the field, or zeros.
    last = np.clip(start + length - 1, 0, bits - 1)
    signed = a.dtype.kind == "i"
    field = a >> np.minimum(start, bits - 1).astype(a.dtype)
    field = np.where(start >= bits, a.dtype.type(0), field)
    kept = np.clip(np.minimum(length, bits - start), 0, bits)
    up = (bits - kept).astype(a.dtype)
    safe = np.minimum(up, a.dtype.type(bits - 1))
    value = np.where(kept == 0, a.dtype.type(0), (field << safe) >> safe)
    if signed:
        sign = ((a >> last.astype(a.dtype)) & 1).astype(bool)
        value = np.where((kept == 0) & (length > 0), np.where(sign, a.dtype.type(-1), a.dtype.type(0)), value)
    return np.where(length == 0, a.dtype.type(0), value)


def insert_bits(a: Array, b: Array, start: Array, length: Array) -> Array:
    """bfi: `b` with `length` bits from `start` replaced by the low bits of `a`."""
    bits = 8 * a.dtype.itemsize
    start, length = start & 0xFF, length & 0xFF
    ones = shift_left(np.ones(1, a.dtype), np.minimum(length, bits)) - a.dtype.type(1)
    mask = shift_left(np.where(length >= bits, ~a.dtype.type(0), ones), start)
    return np.asarray((shift_left(a, start) & mask) | (b & ~mask))


def funnel_left(low: Array, high: Array, amount: Array, wraps: bool) -> Array:
    """shf.l: the upper word of `high:low` shifted left."""
    count = amount & 31 if wraps else np.minimum(amount, 32)
    both = (high.astype(U64) << 32) | low.astype(U64)
    return ((both << count.astype(U64)) >> 32).astype(U32)


def funnel_right(low: Array, high: Array, amount: Array, wraps: bool) -> Array:
    """shf.r: the lower word of `high:low` shifted right."""
    count = amount & 31 if wraps else np.minimum(amount, 32)
    both = (high.astype(U64) << 32) | low.astype(U64)
    return (both >> count.astype(U64)).astype(U32)


def permute_bytes(a: Array, b: Array, selector: Array) -> Array:
    """prmt: each nibble of the selector chooses a byte of `b:a`, or its sign repeated."""
    both = a.astype(U64) | (b.astype(U64) << 32)
    result = np.zeros(np.broadcast_shapes(a.shape, b.shape, selector.shape), U32)
    for place in range(4):
        nibble = (selector >> (4 * place)) & 0xF
        byte = ((both >> (8 * (nibble & 7)).astype(U64)) & 0xFF).astype(U32)
        sign = np.where(byte & 0x80, U32.type(0xFF), U32.type(0))
        result |= np.where(nibble & 8, sign, byte) << (8 * place)
    return result


def combine_logically(a: Array, b: Array, c: Array, table: Array) -> Array:
    """lop3: bit 4a + 2b + c of the table is the result for bits a, b and c."""
    entries = int(table[0])
    result = np.zeros(np.broadcast_shapes(a.shape, b.shape, c.shape), U32)
    for case in range(8):
        if entries >> case & 1:
            result |= (a if case & 4 else ~a) & (b if case & 2 else ~b) & (c if case & 1 else ~c)
    return result


def count_ones(a: Array) -> Array:
    result = np.zeros(a.shape, U32)
    for place in range(8 * a.dtype.itemsize):
        result += ((a >> place) & 1).astype(U32)
    return result


def count_leading_zeros(a: Array) -> Array:
    bits = 8 * a.dtype.itemsize
    result = np.full(a.shape, bits, U32)
    rest = a.copy()
    for _ in range(bits):
        result = np.where(rest != 0, result - 1, result).astype(U32)
        rest = rest >> 1
    return result


def reverse_bits(a: Array) -> Array:
    result = np.zeros_like(a)
    for place in range(8 * a.dtype.itemsize):
        result = (result << 1) | ((a >> place) & 1)
    return result


def add_absolute_difference(a: Array, b: Array, c: Array) -> Array:
    """sad: c + |a - b|."""
    return np.asarray(c + (np.maximum(a, b) - np.minimum(a, b)).view(c.dtype))


PLAIN: dict[str, Callable[..., Array]] = {
    "add": np.add,
    "sub": np.subtract,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "not": np.invert,
    "neg": np.negative,
    "abs": np.abs,
    "div": quotient,
    "rem": remainder,
    "sad": add_absolute_difference,
}
"""Operations whose operands and result have one type."""
