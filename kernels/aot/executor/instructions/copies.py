"""cp.async with commit and wait groups."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from ..dtypes import ITEMS, U32, U64
from ..ptx import Instruction
from ..slots import Slots
from .memory import address_of

if TYPE_CHECKING:
    from ..machine import Machine

Step = Callable[["Machine"], None]


def _copy(instruction: Instruction, slots: Slots) -> Step:
    if instruction.modifiers == ("async", "commit_group"):
        return lambda machine: machine.shared.commit_copies(machine.is_active)
    if instruction.modifiers == ("async", "wait_all"):
        return lambda machine: machine.shared.wait_for_copies(None, machine.is_active)
    if instruction.modifiers == ("async", "wait_group"):
        allowed = instruction.integer(0)
        return lambda machine: machine.shared.wait_for_copies(allowed, machine.is_active)
    instruction.allow("async", "ca", "cg", "shared", "global", "L2_64B", "L2_128B", "L2_256B")
    if instruction.modifiers[2:4] != ("shared", "global"):
        raise instruction.unsupported()
    return _copy_bytes(instruction, slots)


def _copy_bytes(instruction: Instruction, slots: Slots) -> Step:
    """Copy 4, 8 or 16 bytes for each thread; bytes behind the source size are zeros."""
    size = instruction.integer(2)
    if size not in (4, 8, 16) or (size != 16 and "cg" in instruction.modifiers):
        raise instruction.unsupported()
    target, source = address_of(instruction, 0, slots, U32), address_of(instruction, 1, slots, U64)
    whole = slots.constant(np.array([size], U32))
    source_size = slots.operand(instruction, 3, U32) if len(instruction.operands) > 3 else whole

    def step(machine: Machine) -> None:
        site = machine.site(instruction)
        places = machine.shared.place(site.active(target(machine)), size, site)
        if not len(places):
            return
        wanted = site.active(machine.registers.read(source_size, U32))
        if (wanted > size).any():
            raise instruction.unsupported("the source is larger than the copy")
        values = np.zeros(len(places), ITEMS[size])
        reads = wanted != 0
        if reads.any():
            addresses = site.active(source(machine))
            reader = site if reads.all() else site.among(site.numbers[reads])
            if (wanted[reads] != size).any():
                raise instruction.unsupported("the source is smaller than the copy")
            values[reads] = machine.memory.load(addresses[reads], size, reader)
        machine.shared.copy_async(places, values, site)

    return step


BUILDERS: dict[str, Callable[[Instruction, Slots], Step]] = {"cp": _copy}
