"""Descriptors of wgmma and tcgen05.mma: where their operands lie in shared memory, and their shapes."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .dtypes import U32, U64, Array
from .errors import UnsupportedInstructionError
from .fragments import Element, unpack

CHUNK = 16
"""Bytes that a swizzle keeps together."""
_SWIZZLES = {0: 0, 1: 128, 2: 64, 3: 32}
"""Bytes of a swizzle by bits 62-63 of a matrix descriptor."""
_KNOWN_BITS = (3 << 62) | (0x3FFF << 32) | (0x3FFF << 16) | 0x3FFF | (1 << 46)
"""Fields that are implemented, and bit 46, which tcgen05 sets."""


def operand_addresses(descriptors: Array, long_axis: int, element: Element, transposed: bool) -> Array:
    """Return the shared addresses of the 16-byte chunks of an operand.

    Args:
        descriptors: Matrix descriptors, uint64 `[n]`, with one swizzle.
        long_axis: Rows of A or columns of B. The other axis, K, has 32 bytes.
        element: Type of the elements.
        transposed: Whether neighbors in memory are neighbors along the long axis and not along K.

    Returns:
        int64 `[n, long_axis, 2]`, or `[n, K, chunks of the long axis]` if transposed.
    """
    if (descriptors & U64.type(~_KNOWN_BITS & (1 << 64) - 1)).any():
        raise UnsupportedInstructionError(f"unsupported matrix descriptor: {int(descriptors[0]):#018x}")
    modes = np.unique(descriptors >> U64.type(62))
    if len(modes) > 1:
        raise UnsupportedInstructionError("matrix descriptors with different swizzles in one instruction")
    swizzle = _SWIZZLES[int(modes[0])]
    start, leading, stride = (
        (((descriptors >> U64.type(shift)) & U64.type(0x3FFF)) << U64.type(4)).astype(np.int64)[:, None, None]
        for shift in (0, 16, 32)
    )
    if transposed:
        if not swizzle:
            raise UnsupportedInstructionError("a transposed operand without a swizzle")
        k = np.arange(2 * CHUNK // element.size)[None, :, None]
        chunk = np.arange(long_axis * element.size // CHUNK)[None, None, :]
        width = swizzle // CHUNK
        places = start + k % 8 * swizzle + k // 8 * stride + chunk % width * CHUNK + chunk // width * leading
    else:
        row = np.arange(long_axis)[None, :, None]
        chunk = np.arange(2)[None, None, :]
        within = row % 8 * (swizzle or CHUNK) + chunk * (CHUNK if swizzle else leading)
        places = start + row // 8 * stride + within
    # A swizzle exchanges chunks of a row by the number of the row among eight.
    return np.asarray(places ^ ((places >> 7 & (swizzle // CHUNK - 1 if swizzle else 0)) << 4))


def chunks_to_operand(chunks: Array, kind: str, transposed: bool) -> Array:
    """Return 16-byte items as fp32 `[n, long axis, K]`. The items are in the shape of `operand_addresses`."""
    words = np.ascontiguousarray(chunks).view(U32).reshape(*chunks.shape[:2], -1)
    values = unpack(words, kind).reshape(*chunks.shape[:2], -1)
    return values.swapaxes(1, 2) if transposed else values


class Shape(NamedTuple):
    """The product that an instruction descriptor of tcgen05.mma describes."""

    rows: int
    columns: int
    kind: str
    transposed: tuple[bool, bool]  # A and B


def instruction_shape(descriptor: int, kind: str) -> Shape:
    """Decode the instruction descriptor of kind::f16 or kind::tf32 with fp32 sums."""
    formats = {("f16", 0): "f16", ("f16", 1): "bf16", ("tf32", 2): "tf32"}
    operands = [formats.get((kind, descriptor >> shift & 7)) for shift in (7, 10)]
    sums, others = descriptor >> 4 & 3, descriptor & 0b0110_0000_0000_1111 | descriptor >> 29
    if operands[0] is None or operands[0] != operands[1] or sums != 1 or others:
        raise UnsupportedInstructionError(f"unsupported instruction descriptor {descriptor:#x} of kind::{kind}")
    rows, columns = (descriptor >> 24 & 31) * 16, (descriptor >> 17 & 63) * 8
    if rows not in (64, 128) or not columns:
        raise UnsupportedInstructionError(f"a tcgen05.mma of {rows} rows and {columns} columns")
    return Shape(rows, columns, operands[0], (bool(descriptor >> 15 & 1), bool(descriptor >> 16 & 1)))
