"""Fragments and descriptors against the formulas of the PTX ISA, for one thread and one element after another."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from beit_fast.kernels.aot.executor import descriptors, fragments
from beit_fast.kernels.aot.executor.dtypes import F32, U16, U32, U64, Array
from beit_fast.kernels.aot.executor.errors import UnsupportedInstructionError


def matrix(shape: tuple[int, int], seed: int = 0) -> Array:
    """Return integers, which every type holds exactly."""
    return np.random.default_rng(seed).integers(-8, 8, shape).astype(F32)


def word(values: list[float], kind: str) -> int:
    """Pack one tf32 or two 16-bit numbers, the first one low."""
    if kind == "tf32":
        return int(np.array(values, F32).view(U32)[0]) | 0x1FFF  # the hardware ignores these bits
    dtype = torch.bfloat16 if kind == "bf16" else torch.float16
    low, high = torch.tensor(values).to(dtype).view(torch.int16).tolist()
    return (low & 0xFFFF) | (high & 0xFFFF) << 16


@pytest.mark.parametrize(("kind", "inner"), [("bf16", 16), ("f16", 16), ("tf32", 8), ("bf16", 8)])
def test_mma_fragments_follow_the_ptx_tables(kind: str, inner: int) -> None:
    per = 1 if kind == "tf32" else 2
    count = 16 * inner // 32 // per
    a, b = matrix((16, inner)), matrix((inner, 8), 1)
    rows, columns = np.zeros((count, 1, 32), U32), np.zeros((count // 2, 1, 32), U32)
    for lane, register in itertools.product(range(32), range(count)):
        group, place = divmod(lane, 4)
        k = place * per + register // 2 * 4 * per
        rows[register, 0, lane] = word([a[group + 8 * (register % 2), k + e] for e in range(per)], kind)
        if register < count // 2:
            k = place * per + register * 4 * per
            columns[register, 0, lane] = word([b[k + e, group] for e in range(per)], kind)
    assert (fragments.rows_operand(rows, kind)[0] == a).all()
    assert (fragments.columns_operand(columns, kind)[0] == b).all()


@pytest.mark.parametrize("columns", [8, 64])
def test_sums_follow_the_ptx_tables(columns: int) -> None:
    values = matrix((16, columns))
    registers = fragments.matrix_to_sums(values[None])
    for lane, register in itertools.product(range(32), range(columns // 2)):
        row = lane // 4 + 8 * (register // 2 % 2)
        column = register // 4 * 8 + lane % 4 * 2 + register % 2
        assert registers[register, 0, lane] == values[row, column]
    assert (fragments.sums_to_matrix(registers)[0] == values).all()


@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix_and_stmatrix_follow_the_ptx_tables(transposed: bool) -> None:
    rows = np.arange(2 * 4 * 64, dtype=U16).reshape(2, 4, 8, 8)
    registers = fragments.rows_to_registers(rows, transposed)
    for warp, number, lane in itertools.product(range(2), range(4), range(32)):
        row, columns = lane // 4, (lane % 4 * 2, lane % 4 * 2 + 1)
        low, high = (int(rows[warp, number][(c, row) if transposed else (row, c)]) for c in columns)
        assert registers[number, warp, lane] == low | high << 16
    assert (fragments.registers_to_rows(registers, transposed) == rows).all()


def descriptor(start: int, leading: int, stride: int, mode: int) -> Array:
    return np.array([start >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | mode << 62], U64)


@pytest.mark.parametrize(("mode", "swizzle"), [(1, 128), (2, 64), (3, 32)])
def test_operand_along_k_with_swizzle(mode: int, swizzle: int) -> None:
    start, stride = 2048, 8 * swizzle
    found = descriptors.operand_addresses(descriptor(start, 16, stride, mode), 64, fragments.ELEMENTS["bf16"], False)
    assert found.shape == (1, 64, 2)
    for row, chunk in itertools.product(range(64), range(2)):
        place = start + row // 8 * stride + row % 8 * swizzle + chunk * 16
        # A swizzle of 128, 64 or 32 bytes exchanges 8, 4 or 2 chunks by address bits 7 and above.
        expected = place ^ ((place >> 7) & (swizzle // 16 - 1)) << 4
        assert found[0, row, chunk] == expected


def test_operand_along_k_without_swizzle() -> None:
    found = descriptors.operand_addresses(descriptor(1024, 256, 512, 0), 16, fragments.ELEMENTS["f16"], False)
    for row, chunk in itertools.product(range(16), range(2)):
        assert found[0, row, chunk] == 1024 + row // 8 * 512 + row % 8 * 16 + chunk * 256


@pytest.mark.parametrize(("mode", "swizzle"), [(1, 128), (2, 64), (3, 32)])
def test_operand_along_the_long_axis(mode: int, swizzle: int) -> None:
    leading, stride = 4096, 8 * swizzle
    found = descriptors.operand_addresses(descriptor(1024, leading, stride, mode), 128, fragments.ELEMENTS["f16"], True)
    assert found.shape == (1, 16, 16)
    per_row = swizzle // 16
    for k, chunk in itertools.product(range(16), range(16)):
        place = 1024 + k // 8 * stride + k % 8 * swizzle + chunk % per_row * 16 + chunk // per_row * leading
        assert found[0, k, chunk] == place ^ ((place >> 7) & (per_row - 1)) << 4


@pytest.mark.parametrize("transposed", [False, True])
def test_chunks_become_the_operand(transposed: bool) -> None:
    values = matrix((16, 16))  # [long axis, K]
    stored = torch.from_numpy(values.T.copy() if transposed else values).half().numpy()
    chunks = stored.reshape(-1).view(np.complex128).reshape(1, 16, 2)
    assert (descriptors.chunks_to_operand(chunks, "f16", transposed)[0] == values).all()


def test_descriptor_with_unknown_bits_is_an_error() -> None:
    element = fragments.ELEMENTS["bf16"]
    with pytest.raises(UnsupportedInstructionError, match="descriptor"):
        descriptors.operand_addresses(descriptor(0, 16, 16, 1) | U64.type(1 << 49), 64, element, False)
    with pytest.raises(UnsupportedInstructionError, match="swizzle"):
        descriptors.operand_addresses(descriptor(0, 16, 16, 0), 64, element, True)


def test_instruction_descriptor_fields() -> None:
    bits = 1 << 4 | 1 << 7 | 1 << 10 | 1 << 16 | 64 // 8 << 17 | 128 // 16 << 24
    assert descriptors.instruction_shape(bits, "f16") == descriptors.Shape(128, 64, "bf16", (False, True))
    tf32 = 1 << 4 | 2 << 7 | 2 << 10 | 32 // 8 << 17 | 64 // 16 << 24
    assert descriptors.instruction_shape(tf32, "tf32") == descriptors.Shape(64, 32, "tf32", (False, False))
    for unknown in (bits | 1 << 13, bits | 1 << 2, bits & ~(3 << 4), bits ^ 1 << 7):
        with pytest.raises(UnsupportedInstructionError):
            descriptors.instruction_shape(unknown, "f16")
