"""Matrix instructions of one warp: ldmatrix, stmatrix and mma.sync."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from .. import fragments
from ..dtypes import F32, ITEMS, U16, U32, Array
from ..ptx import Instruction
from ..slots import Slots
from .memory import address_of

if TYPE_CHECKING:
    from ..machine import Machine

Step = Callable[["Machine"], None]

_ROW = 16
"""Bytes of a row of an 8x8 matrix."""


def _check(instruction: Instruction, position: int, slots: Slots) -> tuple[list[int], bool]:
    """Return the registers of ldmatrix or stmatrix, and whether it transposes."""
    instruction.allow("sync", "aligned", "m8n8", "x1", "x2", "x4", "trans", "shared", "b16")
    registers = slots.operands(instruction, position, U32)
    if "m8n8" not in instruction.modifiers or f"x{len(registers)}" not in instruction.modifiers:
        raise instruction.unsupported()
    return registers, "trans" in instruction.modifiers


def _load(instruction: Instruction, slots: Slots) -> Step:
    targets, transposed = _check(instruction, 0, slots)
    address, count = address_of(instruction, 1, slots, U32), len(targets)

    def step(machine: Machine) -> None:
        warps = machine.whole_warps(instruction)
        site = machine.site(instruction, machine.lanes_of(warps, 8 * count))
        addresses = np.broadcast_to(address(machine), machine.lane_count)[site.numbers]
        places = machine.shared.place(addresses, _ROW, site)
        rows = machine.shared.load(places, _ROW, site, is_matrix=True).view(U16).reshape(-1, count, 8, 8)
        machine.registers.write_fragments(targets, warps, fragments.rows_to_registers(rows, transposed))

    return step


def _store(instruction: Instruction, slots: Slots) -> Step:
    sources, transposed = _check(instruction, 1, slots)
    address, count = address_of(instruction, 0, slots, U32), len(sources)

    def step(machine: Machine) -> None:
        warps = machine.whole_warps(instruction)
        site = machine.site(instruction, machine.lanes_of(warps, 8 * count))
        addresses = np.broadcast_to(address(machine), machine.lane_count)[site.numbers]
        places = machine.shared.place(addresses, _ROW, site)
        rows = fragments.registers_to_rows(machine.registers.fragments(sources, U32, warps), transposed)
        machine.shared.store(places, rows.reshape(-1).view(ITEMS[_ROW]), site, is_matrix=True)

    return step


_SHAPES = {("m16n8k16", "bf16"): 4, ("m16n8k16", "f16"): 4, ("m16n8k8", "tf32"): 4}
_SHAPES |= {("m16n8k8", "bf16"): 2, ("m16n8k8", "f16"): 2, ("m16n8k4", "tf32"): 2}
"""Registers of A by shape and type; B has half as many."""


class _Operands:
    """The last operands as matrices. Products in a row share A or B, and registers are replaced when written."""

    def __init__(self, convert: Callable[[Array, str], Array], slots: list[int], kind: str) -> None:
        self._convert = convert
        self._slots = slots
        self._kind = kind

    def read(self, machine: Machine, warps: Array) -> Array:
        registers = machine.registers
        if registers.mask is not None:
            return self._convert(registers.fragments(self._slots, U32, warps), self._kind)
        values = registers.values
        key = (self._convert, *self._slots)
        arrays = [values[slot] for slot in self._slots]
        cached = machine.operand_cache.get(key)
        if cached is not None and all(old is new for old, new in zip(cached[0], arrays, strict=True)):
            return cached[1]
        matrix = self._convert(registers.fragments(self._slots, U32, warps), self._kind)
        machine.operand_cache[key] = (arrays, matrix)
        return matrix


def _multiply(instruction: Instruction, slots: Slots) -> Step:
    """mma.sync with fp32 sums."""
    if instruction.modifiers[:2] != ("sync", "aligned") or instruction.modifiers[3:5] != ("row", "col"):
        raise instruction.unsupported()
    shape, kinds = instruction.modifiers[2], instruction.modifiers[5:]
    kind = kinds[1] if len(kinds) == 4 else ""
    count = _SHAPES.get((shape, kind))
    if count is None or kinds != ("f32", kind, kind, "f32"):
        raise instruction.unsupported()
    target, sums = (slots.operands(instruction, position, F32) for position in (0, 3))
    rows, columns = (slots.operands(instruction, position, U32) for position in (1, 2))
    if (len(rows), len(columns), len(sums), len(target)) != (count, count // 2, 4, 4):
        raise instruction.unsupported()
    a_operand = _Operands(fragments.rows_operand, rows, kind)
    b_operand = _Operands(fragments.columns_operand, columns, kind)

    def step(machine: Machine) -> None:
        warps = machine.whole_warps(instruction)
        a, b = a_operand.read(machine, warps), b_operand.read(machine, warps)
        products = fragments.matrix_to_sums(np.matmul(a, b))
        start = machine.registers.fragments(sums, F32, warps)
        machine.registers.write_fragments(target, warps, products + start)

    return step


BUILDERS: dict[str, Callable[[Instruction, Slots], Step]] = {"ldmatrix": _load, "stmatrix": _store, "mma": _multiply}
