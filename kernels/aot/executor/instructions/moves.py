"""mov between registers, from addresses, and between a register and its parts; cvta."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from ..dtypes import DTYPES, PRED, U64, Array, Dtype
from ..ptx import Instruction, Register, Vector
from ..slots import Slots

if TYPE_CHECKING:
    from ..machine import Machine

Step = Callable[["Machine"], None]


def _move(instruction: Instruction, slots: Slots) -> Step:
    if len(instruction.modifiers) != 1 or instruction.modifiers[0] not in DTYPES:
        raise instruction.unsupported()
    dtype = DTYPES[instruction.modifiers[0]]
    source, target = instruction.operand(1), instruction.operand(0)
    if isinstance(source, Vector):
        parts = slots.operands(instruction, 1, _part(dtype, len(source.items), instruction))
        return _join(instruction, slots.target(instruction), parts, dtype)
    if isinstance(target, Vector):
        _part(dtype, len(target.items), instruction)
        return _split(slots.targets(instruction), slots.operand(instruction, 1, dtype), dtype)
    place, whole = slots.target(instruction), slots.operand(instruction, 1, dtype)
    if dtype == PRED or not isinstance(source, Register):
        return lambda machine: machine.registers.write(place, machine.registers.read(whole, dtype))

    def step(machine: Machine) -> None:
        registers = machine.registers
        if registers.flying and registers.is_flying(whole):
            machine.move_in_flight(place, [whole], registers.values[whole].view(slots.kinds[whole]), instruction)
        else:
            registers.write(place, registers.plain(whole))

    return step


def _part(dtype: Dtype, count: int, instruction: Instruction) -> Dtype:
    if count not in (2, 4) or dtype.itemsize % count:
        raise instruction.unsupported()
    return np.dtype(f"uint{8 * dtype.itemsize // count}")


def _join(instruction: Instruction, target: int, parts: list[int], dtype: Dtype) -> Step:
    """Make a register from its parts, the lowest first."""
    part_type: Dtype = np.dtype(f"uint{8 * dtype.itemsize // len(parts)}")

    def join(values: list[Array]) -> Array:
        joined = np.empty((max(map(len, values)), len(values)), part_type)
        for place, value in enumerate(values):
            joined[:, place] = value
        return joined.reshape(-1).view(dtype)

    def step(machine: Machine) -> None:
        registers = machine.registers
        if registers.flying and any(map(registers.is_flying, parts)):
            values = join([registers.values[part].view(part_type) for part in parts])
            machine.move_in_flight(target, parts, values, instruction)
        else:
            registers.write(target, join([registers.read(part, part_type) for part in parts]))

    return step


def _split(targets: list[int | None], source: int, dtype: Dtype) -> Step:
    """Take a register apart, the lowest part first."""
    part_type: Dtype = np.dtype(f"uint{8 * dtype.itemsize // len(targets)}")

    def step(machine: Machine) -> None:
        registers = machine.registers
        parts = np.ascontiguousarray(registers.read(source, dtype)).view(part_type).reshape(-1, len(targets))
        for place, target in enumerate(targets):
            if target is not None:
                registers.write(target, parts[:, place].copy())

    return step


def _convert_address(instruction: Instruction, slots: Slots) -> Step:
    """cvta: global and generic addresses are equal; addresses of other spaces are not implemented."""
    instruction.allow("to", "global", "u64")
    target, source = slots.target(instruction), slots.operand(instruction, 1, U64)
    return lambda machine: machine.registers.write(target, machine.registers.read(source, U64))


BUILDERS: dict[str, Callable[[Instruction, Slots], Step]] = {"mov": _move, "cvta": _convert_address}
