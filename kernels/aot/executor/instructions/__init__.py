"""Translate instructions into steps, one module for each family."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ..errors import UnsupportedInstructionError
from ..ptx import Instruction
from ..slots import Slots
from . import arithmetic, barriers, copies, matrices, memory, moves, tensor, warpgroups, warps
from .forms import check_form

if TYPE_CHECKING:
    from ..machine import Machine

Step = Callable[["Machine"], None]
Builder = Callable[[Instruction, Slots], Step]

BUILDERS: dict[str, Builder] = {
    **moves.BUILDERS,
    **memory.BUILDERS,
    **copies.BUILDERS,
    **warps.BUILDERS,
    **matrices.BUILDERS,
    **warpgroups.BUILDERS,
    **barriers.BUILDERS,
    **tensor.BUILDERS,
}
"""By opcode. All other instructions are arithmetic."""


def named(error: UnsupportedInstructionError, instruction: Instruction) -> UnsupportedInstructionError:
    """Return the error with the instruction, if it does not name it."""
    return error if str(instruction) in str(error) else instruction.unsupported(str(error))


def step_of(instruction: Instruction, slots: Slots) -> Step:
    """Return the step of an instruction that does not end a block.

    Raises:
        UnsupportedInstructionError: If the instruction is not known.
    """
    try:
        step = BUILDERS.get(instruction.opcode, arithmetic.build)(instruction, slots)
        check_form(instruction)  # last: a builder may name what it does not implement
    except UnsupportedInstructionError as error:
        raise named(error, instruction) from error
    if instruction.predicate is None:
        return step
    predicate, wanted = slots.register(instruction.predicate), not instruction.negated

    def predicated(machine: Machine) -> None:
        registers = machine.registers
        before = registers.mask
        if machine.narrow(predicate, wanted):
            step(machine)
        registers.mask = before

    return predicated
