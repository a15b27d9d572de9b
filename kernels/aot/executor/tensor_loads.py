"""Results of tcgen05.ld, which PTX does not allow to use before tcgen05.wait::ld."""

from __future__ import annotations

from collections.abc import Sequence

from .dtypes import Array
from .registers import LOADED, RegisterFile


class TensorLoads:
    """Registers that loads wrote and for which a thread did not wait.

    Triton moves uses before the wait, and the hardware tracks these registers. So uses are noted and are not an error.
    """

    def __init__(self, registers: RegisterFile) -> None:
        self._registers = registers
        self._slots: set[int] = set()

    def start(self, slots: Sequence[int], warps: Array, values: Array) -> None:
        """Load `[registers, warps, 32]`."""
        self._registers.launch_fragments(slots, warps, values, LOADED)
        self._slots.update(slots)

    def wait(self) -> None:
        """Handle tcgen05.wait::ld of the active threads."""
        for slot in self._slots:
            self._registers.land(slot, LOADED)
        states = self._registers.states
        self._slots = {slot for slot in self._slots if slot in states and (states[slot] == LOADED).any()}
