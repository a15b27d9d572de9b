"""Fences and mbarriers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from ..dtypes import U32
from ..live_barriers import BYTES
from ..ptx import Instruction
from ..sites import LANES
from ..slots import Slots
from .memory import address_of

if TYPE_CHECKING:
    from ..machine import Machine
    from ..tensor_memory import TensorMemory

Step = Callable[["Machine"], None]


def _fence(instruction: Instruction, slots: Slots) -> Step:
    """fence.proxy.async of shared memory."""
    if instruction.modifiers not in (("proxy", "async"), ("proxy", "async", "shared")):
        raise instruction.unsupported()
    return lambda machine: machine.shared.fence_proxy(machine.is_active)


def _mbarrier(instruction: Instruction, slots: Slots) -> Step:
    """init, inval and try_wait.parity."""
    action = instruction.modifiers[0]
    if action == "try_wait":
        return _try_wait(instruction, slots)
    instruction.allow("init", "inval", "shared", "b64")
    if action == "init" and instruction.integer(1) != 1:
        raise instruction.unsupported("more than one arrival")
    address = address_of(instruction, 0, slots, U32)

    def step(machine: Machine) -> None:
        tensor = tensor_of(machine, instruction)
        site = machine.site(instruction)
        addresses = site.active(address(machine))
        machine.shared.store_barriers(machine.shared.place(addresses, BYTES, site), site)
        change = tensor.initialize if action == "init" else tensor.invalidate
        for lane, place in zip(site.numbers.tolist(), addresses.tolist(), strict=True):
            change(lane // machine.layout.threads, place, site.among(np.array([lane])))

    return step


def tensor_of(machine: Machine, instruction: Instruction) -> TensorMemory:
    """Return the tensor memory, which also has the mbarriers."""
    if machine.tensor is None:
        raise instruction.unsupported("the kernel does not allocate tensor memory")
    return machine.tensor


def _try_wait(instruction: Instruction, slots: Slots) -> Step:
    instruction.allow("try_wait", "parity", "shared", "b64")
    if "parity" not in instruction.modifiers or len(instruction.operands) != 3:
        raise instruction.unsupported()
    target, address = slots.target(instruction), address_of(instruction, 1, slots, U32)
    phase = slots.operand(instruction, 2, U32)

    def step(machine: Machine) -> None:
        tensor, threads = tensor_of(machine, instruction), machine.layout.threads
        site = machine.site(instruction)
        addresses, parities = site.active(address(machine)), site.active(machine.registers.read(phase, U32))
        machine.shared.touch(machine.shared.place(addresses, BYTES, site), BYTES, site)
        lanes_by_key: dict[tuple[int, int, int], list[int]] = defaultdict(list)
        for lane, place, parity in zip(site.numbers.tolist(), addresses.tolist(), parities.tolist(), strict=True):
            lanes_by_key[lane // threads, place, parity].append(lane)
        complete = np.zeros(machine.lane_count, bool)
        for (cta, place, parity), lanes in lanes_by_key.items():
            warps = sorted({lane % threads // LANES for lane in lanes})
            complete[lanes] = tensor.try_wait(cta, place, parity & 1, warps, site.among(np.array(lanes[:1])))
        machine.registers.write(target, complete)
        machine.poll(instruction, complete)

    return step


BUILDERS: dict[str, Callable[[Instruction, Slots], Step]] = {"fence": _fence, "mbarrier": _mbarrier}
