"""Registers of all threads that run together, and the active threads."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from .dtypes import PRED, U16, U32, U64, UNINITIALIZED, Array, Dtype, pattern
from .sites import LANES

DEFINED, UNDEFINED, FLYING, LOADED = 0, 1, 3, 5
"""States of a register of one thread; bit 0 is set in states in which reads are errors or noted.

FLYING: an asynchronous instruction will write it. LOADED: tcgen05.ld wrote it, and no wait followed.
"""
_MARKED: dict[int, Dtype] = {size: np.dtype(f"V{size}") for size in (1, 2, 4, 8)}
_UNSIGNED: dict[int, Dtype] = {2: U16, 4: U32, 8: U64}


class RegisterFile:
    """One array for each register: an element for each thread, or one element for all.

    An array keeps the dtype of the instruction that wrote it. Arrays are replaced and never changed. An array with a
    void dtype is marked: the state of its threads is in `states`.

    Args:
        kinds: Dtype of each register.
        lane_count: Number of threads.
        note: Called when an active thread reads an undefined register.
        fault: Returns the error for the use of a register in flight.
    """

    def __init__(
        self,
        kinds: Sequence[Dtype],
        lane_count: int,
        note: Callable[[str], None],
        fault: Callable[[int, str], Exception],
    ) -> None:
        self.lane_count = lane_count
        self.warp_count = lane_count // LANES
        self.mask: Array | None = None  # the active threads; None for all
        self.values: list[Array] = [pattern(UNINITIALIZED, kind).view(_MARKED[kind.itemsize]) for kind in kinds]
        self.states: dict[int, Array] = dict.fromkeys(range(len(kinds)), np.full(1, UNDEFINED, np.uint8))
        self.flying = 0  # number of registers in flight
        self.undefined: dict[int, Array] = {}  # threads of undefined registers that the instruction read
        self._kinds = kinds
        self._note = note
        self._fault = fault

    def set(self, slot: int, values: Array) -> None:
        """Set a register of all threads before the first instruction."""
        self.values[slot] = values
        self.states.pop(slot, None)

    # Reads

    def read(self, slot: int, dtype: Dtype) -> Array:
        """Return a register as `dtype`: a view, or the lower bits of a wider register."""
        values = self.values[slot]
        if values.dtype is dtype:
            return values
        if values.dtype.kind == "V":
            values = self._marked(slot)
        size = values.dtype.itemsize
        if size == dtype.itemsize:
            return values.view(dtype)
        if size < dtype.itemsize or dtype == PRED:
            raise TypeError(f"a register of {size} bytes is read as {dtype}")
        narrow: Dtype = np.dtype(f"uint{8 * dtype.itemsize}")
        return values.view(_UNSIGNED[size]).astype(narrow).view(dtype)

    def plain(self, slot: int) -> Array:
        """Return a register in the dtype that it was written in."""
        values = self.values[slot]
        return self._marked(slot) if values.dtype.kind == "V" else values

    def _marked(self, slot: int) -> Array:
        """Check the active threads of a marked register, and return its values."""
        states = self.states[slot]
        active = states if self.mask is None else states & self.mask  # DEFINED is 0
        if active.any():
            self._check_states(slot)
        return self.bits(slot)

    def _check_states(self, slot: int) -> None:
        """Raise for a read in flight. Note a read of an undefined register."""
        if self._has_state(slot, FLYING):
            raise self._fault(slot, "is read before the kernel waited for the instruction that writes it")
        if self._has_state(slot, UNDEFINED):
            states = self.states[slot]
            self.undefined[slot] = (states == UNDEFINED) if self.mask is None else (states == UNDEFINED) & self.mask
            self._note("a register is read whose value was not written")
        if self._has_state(slot, LOADED):
            self._note("a result of tcgen05.ld is used before tcgen05.wait::ld")

    def _has_state(self, slot: int, state: int) -> bool:
        """Return whether the register of an active thread is in a state."""
        states = self.states.get(slot)
        if states is None:
            return False
        active = states if self.mask is None or states.size == 1 else states[self.mask]
        return bool((active == state).any())

    def take_undefined(self) -> dict[int, Array]:
        """Return the undefined registers that were read since the last call.

        Each has a mask of the threads.
        """
        found, self.undefined = self.undefined, {}
        return found

    def bits(self, slot: int) -> Array:
        """Return a register without a check. Its type is unsigned."""
        return self.values[slot].view(self._kinds[slot])

    def full(self, slot: int, dtype: Dtype) -> Array:
        """Return one element for each thread."""
        return np.broadcast_to(self.read(slot, dtype), self.lane_count)

    def fragments(self, slots: Sequence[int], dtype: Dtype, warps: Array, in_flight: bool = False) -> Array:
        """Return registers of some warps, `[registers, warps, 32]`."""
        result = np.empty((len(slots), self.warp_count, LANES), dtype)
        for place, slot in enumerate(slots):
            values = self.values[slot].view(dtype) if in_flight else self.read(slot, dtype)
            result[place] = values if values.size == 1 else values.reshape(-1, LANES)
        return result if len(warps) == self.warp_count else result[:, warps]

    # Writes

    def write(self, slot: int, values: Array) -> None:
        """Set a register of the active threads."""
        mask = self.mask
        old = self.values[slot]
        if old.dtype.kind == "V":
            self._write_marked(slot, values)
        elif mask is None:
            self.values[slot] = values
        else:
            self.values[slot] = np.where(mask, values, old if old.dtype is values.dtype else old.view(values.dtype))

    def _write_marked(self, slot: int, values: Array) -> None:
        if self.flying and self._has_state(slot, FLYING):
            raise self._fault(slot, "is written before the kernel waited for the instruction that writes it")
        mask = self.mask
        if mask is None:
            self.set(slot, values)
            return
        merged = np.where(mask, values, self.values[slot].view(values.dtype))
        self._mark(slot, merged, self.states[slot] * ~mask)

    def write_lanes(self, slot: int, lanes: Array | None, values: Array) -> None:
        """Set a register of the active threads `lanes` to one value each."""
        if lanes is None:
            self.write(slot, values)
            return
        spread = np.zeros(self.lane_count, values.dtype)
        spread[lanes] = values
        self.write(slot, spread)

    def write_fragments(self, slots: Sequence[int], warps: Array, values: Array) -> None:
        """Set registers of some warps from `[registers, warps, 32]`."""
        whole = len(warps) == self.warp_count
        lanes = None if whole else (warps[:, None] * LANES + np.arange(LANES)).reshape(-1)
        for slot, part in zip(slots, values, strict=True):
            self.write_lanes(slot, lanes, part.reshape(-1))

    def forget(self, slot: int, lanes: Array) -> None:
        """Mark a register of some threads as undefined. `lanes` is a mask."""
        self._mark(
            slot, self.bits(slot), np.where(lanes, np.uint8(UNDEFINED), self.states.get(slot, np.uint8(DEFINED)))
        )

    def _mark(self, slot: int, values: Array, states: Array) -> None:
        """Store values with the state of each thread."""
        if not states.any():
            self.set(slot, values)
            return
        if len(values) < len(states):
            values = np.repeat(values, len(states))
        self.values[slot] = values.view(_MARKED[values.dtype.itemsize])
        self.states[slot] = states

    # Registers in flight

    def is_flying(self, slot: int) -> bool:
        """Return whether a register of an active thread is in flight."""
        return self.flying > 0 and self._has_state(slot, FLYING)

    def launch(self, slot: int, values: Array, state: int = FLYING) -> None:
        """Set a register to what an asynchronous instruction will leave in it. It is set for active threads only."""
        states = self.states.get(slot)
        was_flying = states is not None and bool((states == FLYING).any())
        if self.mask is None:
            self._mark(slot, values, np.full(1, state, np.uint8))
        else:
            old = self.values[slot]
            merged = np.where(self.mask, values, old.view(values.dtype))
            before = np.zeros(1, np.uint8) if states is None else states
            self._mark(slot, merged, np.where(self.mask, np.uint8(state), before))
        self.flying += bool((self.states[slot] == FLYING).any()) - was_flying

    def launch_fragments(self, slots: Sequence[int], warps: Array, values: Array, state: int = FLYING) -> None:
        """Set registers of the active warps as `launch` does. `values` is `[registers, warps, 32]`."""
        for slot, part in zip(slots, values, strict=True):
            flat = np.ascontiguousarray(part).reshape(-1)
            if len(flat) < self.lane_count:
                spread = np.zeros((self.warp_count, LANES), flat.dtype)
                spread[warps] = part
                flat = spread.reshape(-1)
            self.launch(slot, flat, state)

    def land(self, slot: int, state: int = FLYING) -> None:
        """Let the active threads use a register in this state."""
        states = self.states.get(slot)
        if states is None:
            return
        ends = states == state
        if self.mask is not None:
            ends = ends & self.mask
        if not ends.any():
            return
        was_flying = bool((states == FLYING).any())
        after = np.where(ends, np.uint8(DEFINED), states)
        self.flying += bool((after == FLYING).any()) - was_flying
        self._mark(slot, self.bits(slot), after)
