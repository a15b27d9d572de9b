"""Matrix fragments of mma, ldmatrix, stmatrix and wgmma: which thread holds which element.

Registers are uint32 `[registers, warps, 32]`. In "Matrix Fragments for mma" of the PTX ISA a thread has the group
g = lane / 4 and the place t = lane % 4 in it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .dtypes import F16, F32, U16, U32, Array


class Element(NamedTuple):
    """A type of matrix elements."""

    kind: str
    size: int  # bytes

    @property
    def per_register(self) -> int:
        return 4 // self.size


ELEMENTS = {"bf16": Element("bf16", 2), "f16": Element("f16", 2), "tf32": Element("tf32", 4)}


def unpack(words: Array, kind: str) -> Array:
    """Return fp32 `[..., elements of a word]` of uint32 words."""
    if kind == "tf32":  # the hardware ignores the lower 13 bits
        return (words & U32.type(0xFFFFE000)).view(F32)[..., None]
    if kind == "f16":
        return np.ascontiguousarray(words)[..., None].view(F16).astype(F32)
    result = np.empty((*words.shape, 2), F32)
    bits = result.view(U32)
    np.left_shift(words, 16, out=bits[..., 0])
    np.bitwise_and(words, U32.type(0xFFFF0000), out=bits[..., 1])
    return result


def rows_operand(registers: Array, kind: str) -> Array:
    """Return A, fp32 `[warps, 16, K]`. Register i holds row g + 8 * (i % 2) of column half i // 2."""
    count, warps, _ = registers.shape
    values = unpack(registers, kind).reshape(count // 2, 2, warps, 8, 4, -1)  # half, row half, warp, g, t, element
    return values.transpose(2, 1, 3, 0, 4, 5).reshape(warps, 16, -1)


def columns_operand(registers: Array, kind: str) -> Array:
    """Return B, fp32 `[warps, K, 8]`. Register i holds column g of row half i."""
    halves, warps, _ = registers.shape
    values = unpack(registers, kind).reshape(halves, warps, 8, 4, -1)  # row half, warp, g, t, element
    return values.transpose(1, 0, 3, 4, 2).reshape(warps, -1, 8)


def sums_to_matrix(registers: Array) -> Array:
    """Return `[warps, 16, N]` of fp32 registers.

    Four registers hold eight columns: (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1).
    """
    count, warps, _ = registers.shape
    values = registers.reshape(count // 4, 2, 2, warps, 8, 4)  # column block, row half, element, warp, g, t
    return values.transpose(3, 1, 4, 0, 5, 2).reshape(warps, 16, -1)


def matrix_to_sums(matrix: Array) -> Array:
    """Return registers `[registers, warps, 32]` of fp32 `[warps, 16, N]`."""
    warps, _, columns = matrix.shape
    values = matrix.reshape(warps, 2, 8, columns // 8, 4, 2)  # warp, row half, g, column block, t, element
    return np.ascontiguousarray(values.transpose(3, 1, 5, 0, 2, 4)).reshape(columns // 2, warps, 32)


def rows_to_registers(rows: Array, transposed: bool) -> Array:
    """ldmatrix: uint16 `[warps, matrices, 8, 8]` rows to registers `[matrices, warps, 32]`."""
    if transposed:
        rows = np.ascontiguousarray(rows.swapaxes(-1, -2))
    warps, matrices = rows.shape[:2]
    return rows.view(U32).reshape(warps, matrices, 32).swapaxes(0, 1)


def registers_to_rows(registers: Array, transposed: bool) -> Array:
    """stmatrix: registers `[matrices, warps, 32]` to uint16 `[warps, matrices, 8, 8]` rows."""
    matrices, warps, _ = registers.shape
    rows = np.ascontiguousarray(registers.swapaxes(0, 1)).view(U16).reshape(warps, matrices, 8, 8)
    return np.ascontiguousarray(rows.swapaxes(-1, -2)) if transposed else rows
