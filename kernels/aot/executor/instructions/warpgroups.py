"""wgmma: asynchronous products of warpgroups."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from .. import descriptors, fragments
from ..dtypes import F32, PRED, U32, U64, Array
from ..ptx import Instruction, Vector
from ..sites import LANES
from ..slots import Slots

if TYPE_CHECKING:
    from ..machine import Machine

Step = Callable[["Machine"], None]

_WARPS = 4
"""Warps of a warpgroup."""
_ROWS = 64
"""Rows of A."""


def _warpgroup(instruction: Instruction, slots: Slots) -> Step:
    name = instruction.modifiers[0] if instruction.modifiers else ""
    if name in ("fence", "commit_group", "wait_group"):
        instruction.allow(name, "sync", "aligned")
        if name == "fence":
            return lambda machine: machine.products.fence()
        if name == "commit_group":
            return lambda machine: machine.products.commit(machine.is_active)
        allowed = instruction.integer(0)
        return lambda machine: machine.products.wait(allowed, machine.is_active)
    if instruction.modifiers[:3] != ("mma_async", "sync", "aligned") or len(instruction.modifiers) != 6 + 1:
        raise instruction.unsupported()
    return _multiply(instruction, slots)


def _multiply(instruction: Instruction, slots: Slots) -> Step:
    """wgmma.mma_async with fp32 sums. A is in registers or in shared memory."""
    shape, result, kind, other = instruction.modifiers[3:]
    columns_count, inner = (int(part) for part in shape.removeprefix("m64n").split("k"))
    element = fragments.ELEMENTS.get(kind)
    if element is None or (result, other) != ("f32", kind) or inner * element.size != 2 * descriptors.CHUNK:
        raise instruction.unsupported()
    flags = [instruction.integer(place) for place in range(4, len(instruction.operands))]
    if flags[:2] != [1, 1]:
        raise instruction.unsupported("operands are negated")
    in_registers = isinstance(instruction.operand(1), Vector)
    # An operand of 16 bits in shared memory has a flag that says whether it is transposed.
    if len(flags) != 2 + (0 if kind == "tf32" else 2 - in_registers):
        raise instruction.unsupported(f"it has {len(instruction.operands)} operands")
    transposed = [bool(flag) for flag in flags[2:]] or [False, False]
    sums = slots.operands(instruction, 0, F32)
    if len(sums) != columns_count // 2:
        raise instruction.unsupported(f"it has {len(sums)} sums")
    rows = slots.operands(instruction, 1, U32 if in_registers else U64)
    columns, adds = slots.operand(instruction, 2, U64), slots.operand(instruction, 3, PRED)

    def read_shared(machine: Machine, slot: int, leaders: Array, long_axis: int, is_transposed: bool) -> Array:
        """Return fp32 `[warpgroups, long axis, K]`."""
        values = machine.registers.full(slot, U64)[leaders]
        addresses = descriptors.operand_addresses(values, long_axis, element, is_transposed)
        lanes = np.broadcast_to(leaders[:, None, None], addresses.shape).reshape(-1)
        site = machine.site(instruction, lanes)
        places = machine.shared.place(addresses.reshape(-1), descriptors.CHUNK, site)
        chunks, _ = machine.shared.load_async(places, _WARPS * LANES, site, is_waited_by_thread=True)
        return descriptors.chunks_to_operand(chunks.reshape(addresses.shape), kind, is_transposed)

    def step(machine: Machine) -> None:
        registers = machine.registers
        warps = machine.whole_warps(instruction)
        leaders = warps[::_WARPS] * LANES
        if len(warps) % _WARPS or (warps.reshape(-1, _WARPS) != leaders[:, None] // LANES + np.arange(_WARPS)).any():
            raise instruction.unsupported("only some warps of a warpgroup execute it")
        machine.products.check_fence(rows if in_registers else [], sums, instruction)
        b = read_shared(machine, columns, leaders, columns_count, transposed[-1]).swapaxes(1, 2)
        if in_registers:
            a = fragments.rows_operand(registers.fragments(rows, U32, warps), kind).reshape(-1, _ROWS, inner)
        else:
            a = read_shared(machine, rows[0], leaders, _ROWS, transposed[0])
        values = fragments.matrix_to_sums(np.matmul(a, b).reshape(len(warps), 16, columns_count))
        accumulates = machine.site(instruction).active(registers.read(adds, PRED))
        if accumulates.any() != accumulates.all():
            raise instruction.unsupported("threads disagree whether it accumulates")
        if accumulates.all():
            values = values + registers.fragments(sums, F32, warps, in_flight=True)
        machine.products.start(sums, values, warps, machine.site(instruction))

    return step


BUILDERS: dict[str, Callable[[Instruction, Slots], Step]] = {"wgmma": _warpgroup}
