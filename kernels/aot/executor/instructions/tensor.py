"""tcgen05: tensor memory and its products, for one CTA each."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from ..dtypes import U32, Array
from ..ptx import Instruction
from ..sites import LANES, Site
from ..slots import Slots
from . import tensor_products
from .barriers import tensor_of
from .memory import address_of

if TYPE_CHECKING:
    from ..machine import Machine

Step = Callable[["Machine"], None]


def _tcgen05(instruction: Instruction, slots: Slots) -> Step:
    action = instruction.modifiers[0] if instruction.modifiers else ""
    builder = _ACTIONS.get(action)
    if builder is None or "cta_group_2" in instruction.modifiers:
        raise instruction.unsupported()
    return builder(instruction, slots)


def _allocate(instruction: Instruction, slots: Slots) -> Step:
    """tcgen05.alloc: one warp stores the address of new columns to shared memory."""
    instruction.allow("alloc", "cta_group_1", "sync", "aligned", "shared", "b32")
    address, columns = address_of(instruction, 0, slots, U32), instruction.integer(1)

    def step(machine: Machine) -> None:
        tensor = tensor_of(machine, instruction)
        lanes = machine.whole_warps(instruction) * LANES
        site = machine.site(instruction, lanes)
        places = machine.shared.place(np.broadcast_to(address(machine), machine.lane_count)[lanes], 4, site)
        found = [
            tensor.allocate(lane // machine.layout.threads, columns, site.among(np.array([lane])))
            for lane in lanes.tolist()
        ]
        machine.shared.store(places, np.array(found, U32), site)

    return step


def _free(instruction: Instruction, slots: Slots) -> Step:
    instruction.allow("dealloc", "cta_group_1", "sync", "aligned", "b32")
    columns = instruction.integer(1)

    def step(machine: Machine) -> None:
        for lane in (machine.whole_warps(instruction) * LANES).tolist():
            site = machine.site(instruction, np.array([lane]))
            tensor_of(machine, instruction).free(lane // machine.layout.threads, columns, site)

    return step


def _give_up_permit(instruction: Instruction, slots: Slots) -> Step:
    """tcgen05.relinquish_alloc_permit only concerns other CTAs of the multiprocessor."""
    instruction.allow("relinquish_alloc_permit", "cta_group_1", "sync", "aligned")
    return lambda machine: None


def _wait(instruction: Instruction, slots: Slots) -> Step:
    instruction.allow("wait_ld", "wait_st", "sync", "aligned")
    is_load = instruction.modifiers[0] == "wait_ld"

    def step(machine: Machine) -> None:
        tensor = tensor_of(machine, instruction)
        if is_load:
            tensor.wait_for_loads(machine.is_active)
            machine.loads.wait()
        else:
            tensor.wait_for_stores(machine.is_active)

    return step


def _transfer(instruction: Instruction, slots: Slots) -> Step:
    """tcgen05.ld and tcgen05.st of whole warps, each with its 32 rows."""
    is_load = instruction.modifiers[0] == "ld"
    if instruction.modifiers[1:3] != ("sync", "aligned") or instruction.modifiers[5:] != ("b32",):
        raise instruction.unsupported()
    shape, repeat = instruction.modifiers[3:5]
    # Operands: ld registers, address, split; st address, split, registers.
    count_position = 0 if is_load else len(instruction.operands) - 1
    moved = slots.operands(instruction, count_position, U32)
    has_split = shape == "16x32bx2"
    known = shape in ("32x32b", "16x32bx2") and repeat == f"x{len(moved)}"
    if not known or len(instruction.operands) != 2 + has_split:
        raise instruction.unsupported()
    base = address_of(instruction, 1 if is_load else 0, slots, U32)
    split = instruction.integer(2 if is_load else 1) if has_split else None

    def step(machine: Machine) -> None:
        tensor, registers = tensor_of(machine, instruction), machine.registers
        warps = machine.whole_warps(instruction)
        site = machine.site(instruction, machine.lanes_of(warps))
        cells = _cells(machine, site, base(machine), split, len(moved), instruction)
        if is_load:
            loaded = np.ascontiguousarray(tensor.load(cells, site).T)
            machine.loads.start(moved, warps, loaded.reshape(len(moved), -1, LANES))
        else:
            values = registers.fragments(moved, U32, warps).reshape(len(moved), -1)
            tensor.store(cells, np.ascontiguousarray(values.T), site)

    return step


def _cells(
    machine: Machine, site: Site, addresses: Array, split: int | None, count: int, instruction: Instruction
) -> Array:
    """Return the cells that each thread moves, `[threads, count]`.

    32x32b: a thread has a row. 16x32bx2: threads 16-31 have the rows of threads 0-15, `split` columns further.
    """
    lanes = site.numbers
    start = np.broadcast_to(addresses, machine.lane_count)[lanes].astype(np.int64)
    rows, columns, thread = start >> 16, start & 0xFFFF, lanes % LANES
    if (rows // 32 != lanes // LANES % 4).any():
        raise instruction.unsupported("a warp accesses the rows of another warp")
    if split is None:
        rows = rows + thread
    else:
        rows, columns = rows + thread % 16, columns + thread // 16 * split
    ctas = lanes // machine.layout.threads
    return tensor_of(machine, instruction).cells(
        ctas[:, None], rows[:, None], columns[:, None] + np.arange(count), site
    )


def _commit(instruction: Instruction, slots: Slots) -> Step:
    """tcgen05.commit: an mbarrier observes the end of the thread's products."""
    instruction.allow("commit", "cta_group_1", "mbarrier_arrive_one", "shared", "shared_cluster", "b64")
    address = address_of(instruction, 0, slots, U32)

    def step(machine: Machine) -> None:
        site = machine.site(instruction)
        addresses = site.active(address(machine))
        machine.shared.touch(machine.shared.place(addresses, 8, site), 8, site)
        for lane, place in zip(site.numbers.tolist(), addresses.tolist(), strict=True):
            one = site.among(np.array([lane]))
            tensor_of(machine, instruction).commit(lane // machine.layout.threads, place, one)

    return step


_ACTIONS: dict[str, Callable[[Instruction, Slots], Step]] = {
    "alloc": _allocate,
    "dealloc": _free,
    "relinquish_alloc_permit": _give_up_permit,
    "wait_ld": _wait,
    "wait_st": _wait,
    "ld": _transfer,
    "st": _transfer,
    "mma": tensor_products.build,
    "commit": _commit,
}
BUILDERS: dict[str, Callable[[Instruction, Slots], Step]] = {"tcgen05": _tcgen05}
