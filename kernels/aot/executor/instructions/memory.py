"""ld and st."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from ..dtypes import DTYPES, ITEMS, S64, SIGNED, U32, U64, UNINITIALIZED, Array, Dtype, holds_pattern, unsigned
from ..errors import AccessError
from ..ptx import Instruction
from ..sites import Site
from ..slots import Slots

if TYPE_CHECKING:
    from ..machine import Machine

Step = Callable[["Machine"], None]

_SPACES = ("param", "global", "shared", "local")
_HINTS = ("nc", "volatile", "weak", "v2", "v4")
"""Modifiers that change neither the value nor the order of accesses of one thread."""


def address_of(instruction: Instruction, position: int, slots: Slots, dtype: Dtype) -> Callable[[Machine], Array]:
    """Return a function that computes an address operand. Its result has one element per thread, or one for all."""
    address = instruction.address(position)
    base = slots.base(address, dtype)
    if not address.offset:
        return lambda machine: machine.registers.read(base, dtype)
    offset = dtype.type(address.offset % (1 << 8 * dtype.itemsize))
    return lambda machine: machine.registers.read(base, dtype) + offset


def _space_of(instruction: Instruction) -> str:
    instruction.allow(*_SPACES, *_HINTS, instruction.modifiers[-1])
    space = next((name for name in instruction.modifiers if name in _SPACES), None)
    if space is None:
        raise instruction.unsupported("generic addresses are not implemented")
    if instruction.modifiers[-1] not in DTYPES:
        raise instruction.unsupported("its type is not known")
    return space


def _load(instruction: Instruction, slots: Slots) -> Step:
    space, dtype = _space_of(instruction), DTYPES[instruction.modifiers[-1]]
    targets = slots.targets(instruction)
    size = instruction.access_bytes
    if len(targets) * dtype.itemsize != size or size not in ITEMS:
        raise instruction.unsupported(f"it has {len(targets)} results")
    kinds = [dtype if target is None else _register_type(slots.kinds[target], dtype) for target in targets]
    if space == "param":
        return _load_parameter(instruction, slots, targets, dtype, kinds)
    load = _LOADS[space]
    address = address_of(instruction, 1, slots, U32 if space == "shared" else U64)

    def step(machine: Machine) -> None:
        site = machine.site(instruction)
        addresses = site.active(address(machine))
        if not len(addresses):
            return
        values = load(machine, addresses, size, site)
        columns = np.ascontiguousarray(values.view(dtype).reshape(-1, len(targets)).T)
        for target, kind, column in zip(targets, kinds, columns, strict=True):
            if target is not None:
                machine.registers.write_lanes(target, site.lanes, column if kind == dtype else column.astype(kind))
                if site.unwritten is not None:
                    _mark_unwritten(machine, target, column, site)

    return step


def _mark_unwritten(machine: Machine, target: int, column: Array, site: Site) -> None:
    """Mark what was loaded from memory that was not written. A vector may have other parts."""
    assert site.unwritten is not None
    unwritten = site.unwritten
    if column.dtype.itemsize > 1:
        unwritten = unwritten & holds_pattern(column, UNINITIALIZED)
    lanes = np.zeros(machine.lane_count, bool)
    lanes[site.numbers] = unwritten
    machine.registers.forget(target, lanes)


def _load_global(machine: Machine, addresses: Array, size: int, site: Site) -> Array:
    return machine.memory.load(addresses, size, site)


def _load_shared(machine: Machine, addresses: Array, size: int, site: Site) -> Array:
    return machine.shared.load(machine.shared.place(addresses, size, site), size, site)


def _load_local(machine: Machine, addresses: Array, size: int, site: Site) -> Array:
    return machine.local.load(addresses, size, site)


_LOADS = {"global": _load_global, "shared": _load_shared, "local": _load_local}


def _register_type(kind: Dtype, dtype: Dtype) -> Dtype:
    """Return the type in which a loaded value is kept: registers may be wider than memory."""
    if kind.itemsize == dtype.itemsize:
        return dtype
    return SIGNED[kind] if dtype.kind == "i" else kind


def _load_parameter(
    instruction: Instruction, slots: Slots, targets: list[int | None], dtype: Dtype, kinds: list[Dtype]
) -> Step:
    """ld.param of one value or of a vector."""
    address = address_of(instruction, 1, slots, U64)
    size = dtype.itemsize * len(targets)

    def step(machine: Machine) -> None:
        site, places = machine.site(instruction), address(machine)
        checked = site.active(places).view(S64)
        wrong = (checked < 0) | (checked > machine.code.parameter_bytes - size) | (checked % size != 0)
        if wrong.any():
            index = int(np.argmax(wrong))
            where = f"byte {int(checked[index])} of {machine.code.parameter_bytes}"
            raise site.fault(AccessError, f"an access of {size} bytes is outside the parameters", index, where)
        # Threads that are not active may have any address.
        rows = places.view(S64) if len(places) == 1 or site.lanes is None else np.where(machine.is_active, places, 0)
        found = machine.parameters[rows.astype(S64)[:, None] + np.arange(size)]
        values = np.ascontiguousarray(found).view(dtype)
        for place, (target, kind) in enumerate(zip(targets, kinds, strict=True)):
            if target is not None:
                machine.registers.write(target, values[:, place].astype(kind))

    return step


def _store(instruction: Instruction, slots: Slots) -> Step:
    space, dtype = _space_of(instruction), unsigned(DTYPES[instruction.modifiers[-1]])
    if space == "param":
        raise instruction.unsupported()
    sources = slots.operands(instruction, 1, dtype)
    size = instruction.access_bytes
    if len(sources) * dtype.itemsize != size or size not in ITEMS:
        raise instruction.unsupported(f"it has {len(sources)} values")
    store, item = _STORES[space], ITEMS[size]
    address = address_of(instruction, 0, slots, U32 if space == "shared" else U64)

    def step(machine: Machine) -> None:
        site = machine.site(instruction)
        addresses = site.active(address(machine))
        if not len(addresses):
            return
        columns = np.empty((len(addresses), len(sources)), dtype)
        for place, source in enumerate(sources):
            columns[:, place] = site.active(machine.registers.read(source, dtype))
        store(machine, addresses, columns.reshape(-1).view(item), site)

    return step


def _store_global(machine: Machine, addresses: Array, values: Array, site: Site) -> None:
    machine.memory.store(addresses, values, site)


def _store_shared(machine: Machine, addresses: Array, values: Array, site: Site) -> None:
    machine.shared.store(machine.shared.place(addresses, values.dtype.itemsize, site), values, site)


def _store_local(machine: Machine, addresses: Array, values: Array, site: Site) -> None:
    machine.local.store(addresses, values, site)


_STORES = {"global": _store_global, "shared": _store_shared, "local": _store_local}

BUILDERS: dict[str, Callable[[Instruction, Slots], Step]] = {"ld": _load, "st": _store}
