"""Instructions of a whole warp: shuffles, votes, reductions, elections and barriers."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from ..dtypes import DTYPES, PRED, U32, Array, Dtype
from ..ptx import Instruction
from ..sites import LANES
from ..slots import Slots

if TYPE_CHECKING:
    from ..machine import Machine

Step = Callable[["Machine"], None]

_ALL = 0xFFFFFFFF


def _require_all(machine: Machine, members: int, instruction: Instruction) -> Array:
    """Return the active warps; all their threads must be members."""
    warps = machine.whole_warps(instruction)
    values = machine.site(instruction).active(machine.registers.read(members, U32))
    if (values != _ALL).any():
        raise instruction.unsupported("only some threads of a warp are members")
    return warps


def _shuffle(instruction: Instruction, slots: Slots) -> Step:
    """shfl.sync; the optional second result says whether the source lane was in range."""
    instruction.allow("sync", "bfly", "idx", "up", "down", "b32")
    mode = instruction.modifiers[1]
    targets = slots.targets(instruction)
    value, other, clamp, members = (slots.operand(instruction, place, U32) for place in (1, 2, 3, 4))
    own = np.arange(LANES)

    def source_lanes(amount: Array, limit: Array) -> tuple[Array, Array]:
        """Return the source of each lane, and whether it is in range. The source is the lane to read."""
        segment = (limit >> 8) & 31
        last = (own & segment) | (limit & 31 & ~segment)
        first = own & segment
        amount = amount & 31
        if mode == "up":
            chosen = own - amount
            inside = chosen >= last
        elif mode == "down":
            chosen = own + amount
            inside = chosen <= last
        elif mode == "bfly":
            chosen = own ^ amount
            inside = chosen <= last
        else:
            chosen = first | (amount & ~segment)
            inside = chosen <= last
        return np.where(inside, chosen, own), inside

    def step(machine: Machine) -> None:
        registers = machine.registers
        _require_all(machine, members, instruction)
        values = registers.full(value, U32).reshape(-1, LANES)
        amount, limit = (registers.read(slot, U32).astype(np.int64) for slot in (other, clamp))
        if amount.size == limit.size == 1:
            chosen, inside = source_lanes(amount, limit)
            result = values[:, chosen]
        else:
            amount, limit = (np.broadcast_to(part, registers.lane_count).reshape(-1, LANES) for part in (amount, limit))
            chosen, inside = source_lanes(amount, limit)
            result = np.take_along_axis(values, chosen, 1)
        if targets[0] is not None:
            registers.write(targets[0], result.reshape(-1))
        if len(targets) > 1 and targets[1] is not None:
            registers.write(targets[1], np.broadcast_to(inside, values.shape).reshape(-1))

    return step


_REDUCTIONS: dict[tuple[str, str], np.ufunc] = {
    ("u32", "add"): np.add,
    ("s32", "add"): np.add,
    ("u32", "min"): np.minimum,
    ("u32", "max"): np.maximum,
    ("s32", "min"): np.minimum,
    ("s32", "max"): np.maximum,
    ("b32", "and"): np.bitwise_and,
    ("b32", "or"): np.bitwise_or,
    ("b32", "xor"): np.bitwise_xor,
    ("f32", "min"): np.fmin,
    ("f32", "max"): np.fmax,
}


def _reduction(instruction: Instruction, slots: Slots) -> Step:
    _, name, *others, kind = instruction.modifiers
    function = _REDUCTIONS.get((kind, name))
    if function is None or others not in ([], ["NaN"]):
        raise instruction.unsupported()
    if others:
        function = {"min": np.minimum, "max": np.maximum}[name]
    dtype: Dtype = DTYPES[kind]
    target, value = slots.target(instruction), slots.operand(instruction, 1, dtype)
    members = slots.operand(instruction, 2, U32)

    def step(machine: Machine) -> None:
        _require_all(machine, members, instruction)
        values = machine.registers.full(value, dtype).reshape(-1, LANES)
        machine.registers.write(target, function.reduce(values, axis=1, dtype=dtype).repeat(LANES))

    return step


def _vote(instruction: Instruction, slots: Slots) -> Step:
    instruction.allow("sync", "all", "any", "ballot", "pred", "b32")
    mode = instruction.modifiers[1]
    target, members = slots.target(instruction), slots.operand(instruction, 2, U32)
    value = slots.operand(instruction, 1, PRED)

    def step(machine: Machine) -> None:
        _require_all(machine, members, instruction)
        values = machine.registers.full(value, PRED).reshape(-1, LANES)
        if mode == "ballot":
            result = (values.astype(U32) << np.arange(LANES, dtype=U32)).sum(1, dtype=U32)
        else:
            result = values.all(1) if mode == "all" else values.any(1)
        machine.registers.write(target, result.repeat(LANES))

    return step


def _elect(instruction: Instruction, slots: Slots) -> Step:
    """elect.sync: the first thread."""
    instruction.allow("sync")
    targets, members = slots.targets(instruction), slots.operand(instruction, 1, U32)
    if len(targets) != 2:
        raise instruction.unsupported()

    def step(machine: Machine) -> None:
        _require_all(machine, members, instruction)
        for target, values in zip(targets, (np.zeros(1, U32), machine.all_lanes % LANES == 0), strict=True):
            if target is not None:
                machine.registers.write(target, values)

    return step


def _barrier(instruction: Instruction, slots: Slots) -> Step:
    """bar.warp.sync."""
    if instruction.modifiers != ("warp", "sync"):
        raise instruction.unsupported()
    members = slots.operand(instruction, 0, U32)

    def step(machine: Machine) -> None:
        _require_all(machine, members, instruction)

    return step


BUILDERS: dict[str, Callable[[Instruction, Slots], Step]] = {
    "shfl": _shuffle,
    "redux": _reduction,
    "vote": _vote,
    "elect": _elect,
    "bar": _barrier,
}
