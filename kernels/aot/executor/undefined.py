"""Follow values that were never written to what they decide."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from .dtypes import PRED, Array
from .errors import UninitializedError
from .instructions import BUILDERS
from .ptx import Address, Instruction, Operand, Register, Vector

if TYPE_CHECKING:
    from .machine import Machine

_NONE = np.zeros(1, bool)


def follow(machine: Machine) -> None:
    """Report undefined operands of the last instruction, or mark its result.

    The mark ends in shuffles, products, stores, and moves between a register and its parts.
    """
    instruction, registers = machine.instruction, machine.registers
    undefined = registers.take_undefined()
    for slot, purpose in _decisive(machine, instruction).items():
        if slot in undefined:
            report(machine, instruction, purpose, undefined[slot])
    if not _is_scalar(instruction):
        return
    lanes = _result(machine, instruction, undefined)
    if lanes.any():
        for target in machine.code.slots.targets(instruction):
            if target is not None:
                registers.forget(target, lanes)


def report(machine: Machine, instruction: Instruction, purpose: str, lanes: Array) -> None:
    """Report an undefined value of the threads in the mask `lanes`."""
    first = np.array([int(np.argmax(lanes & machine.is_active))])
    machine.site(instruction, first).report(UninitializedError, f"{purpose} depends on a value that was not written", 0)


def _is_scalar(instruction: Instruction) -> bool:
    """Return whether a result depends on all bits of its operands."""
    if instruction.opcode == "mov":
        # LLVM joins a value with an undefined half, and takes the value out later.
        return not any(isinstance(operand, Vector) for operand in instruction.operands)
    return instruction.opcode not in BUILDERS or instruction.opcode == "cvta"


def _decisive(machine: Machine, instruction: Instruction) -> dict[int, str]:
    """Return the registers that decide what an instruction does."""
    slots = machine.code.slots
    found = {}
    if instruction.predicate is not None:
        found[slots.register(instruction.predicate)] = "the execution of an instruction"
    is_asynchronous = instruction.opcode in ("cp", "mbarrier", "wgmma", "tcgen05")  # sizes, phases and descriptors
    for operand in instruction.operands:
        if isinstance(operand, Address) and isinstance(operand.base, Register):
            found[slots.register(operand.base.name)] = "an address"
        elif isinstance(operand, Register) and is_asynchronous:
            found[slots.register(operand.name)] = "an asynchronous operation"
    return found


def _result(machine: Machine, instruction: Instruction, undefined: Mapping[int, Array]) -> Array:
    """Return the threads whose result is undefined: one element or all."""
    slots, registers = machine.code.slots, machine.registers

    def is_undefined(operand: Operand) -> Array:
        return undefined.get(slots.register(operand.name), _NONE) if isinstance(operand, Register) else _NONE

    sources = instruction.operands[1:]
    if instruction.opcode == "selp":
        first, second, condition = sources
        chosen = registers.bits(slots.operand(instruction, 3, PRED)).view(PRED)
        return np.asarray(np.where(chosen, is_undefined(first), is_undefined(second)) | is_undefined(condition))
    lanes = np.asarray(np.logical_or.reduce(np.broadcast_arrays(*undefined.values())))
    if instruction.opcode in ("and", "or"):
        # A defined operand may decide the result alone.
        for operand in sources:
            if isinstance(operand, Register):
                bits = registers.bits(slots.register(operand.name))
                decides = bits == 0 if instruction.opcode == "and" else ~bits == 0
                lanes = lanes & ~(decides & ~is_undefined(operand))
    return lanes
