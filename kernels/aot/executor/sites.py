"""Threads at an instruction, for memory accesses and for messages."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from .dtypes import Array
from .errors import Hazard, KernelError
from .ptx import Instruction

LANES = 32
"""Threads of a warp."""


class Reporter:
    """Raise the first fault, or count hazards and continue.

    Args:
        kernel: Name of the kernel.
        hazards: Counts by hazard, or None to raise.
    """

    def __init__(self, kernel: str, hazards: Counter[Hazard] | None) -> None:
        self.kernel = kernel
        self.hazards = hazards
        self.notes: Counter[Hazard] = Counter()  # what PTX leaves to ptxas, and reads of undefined values

    def hazard(self, kind: str, problem: str, instruction: Instruction, others: Sequence[str] = ()) -> Hazard:
        return Hazard(
            kind, self.kernel, problem, instruction.text, instruction.source, instruction.number, tuple(others)
        )

    def fault(
        self, kind: type[KernelError], problem: str, instruction: Instruction, detail: str, others: Sequence[str] = ()
    ) -> KernelError:
        """Return the error to raise where execution cannot continue."""
        return kind(self.hazard(kind.__name__, problem, instruction, others), detail)

    def report(
        self, kind: type[KernelError], problem: str, instruction: Instruction, detail: str, others: Sequence[str] = ()
    ) -> None:
        """Raise or count a fault after which execution can continue."""
        fault = self.fault(kind, problem, instruction, detail, others)
        if self.hazards is None:
            raise fault
        self.hazards[fault.hazard] += 1

    def note(self, problem: str, instruction: Instruction, count: int = 1) -> None:
        """Count something that is not an error."""
        self.notes[self.hazard("Note", problem, instruction)] += count


class Layout(NamedTuple):
    """Which CTAs run together, and their threads."""

    ctas: Array  # numbers in the grid
    block: tuple[int, int, int]  # threads of a CTA, by axis
    grid: tuple[int, int, int]

    @property
    def threads(self) -> int:
        return self.block[0] * self.block[1] * self.block[2]

    @property
    def warps(self) -> int:
        """Warps of a CTA."""
        return self.threads // LANES


class Site:
    """The active threads at an instruction. `lanes` number the threads of all CTAs that run together."""

    __slots__ = ("all_lanes", "instruction", "lanes", "layout", "reporter", "unwritten")

    def __init__(
        self, layout: Layout, reporter: Reporter, instruction: Instruction, lanes: Array | None, all_lanes: Array
    ) -> None:
        self.layout = layout
        self.reporter = reporter
        self.instruction = instruction
        self.lanes = lanes  # None for all
        self.all_lanes = all_lanes
        self.unwritten: Array | None = None  # which threads loaded memory that was not written

    @property
    def numbers(self) -> Array:
        return self.all_lanes if self.lanes is None else self.lanes

    @property
    def slots(self) -> Array:
        """The place of each thread's CTA among those that run together."""
        return self.numbers // self.layout.threads

    @property
    def ctas(self) -> Array:
        """For each thread, the number of its CTA in the grid."""
        return self.layout.ctas[self.slots]

    def active(self, values: Array) -> Array:
        """Select one value for each of the threads."""
        if len(values) == 1:
            return np.broadcast_to(values, len(self.numbers))
        return values if self.lanes is None else values[self.lanes]

    def among(self, lanes: Array) -> Site:
        """Return the same instruction for other threads or another order of threads."""
        return Site(self.layout, self.reporter, self.instruction, lanes, self.all_lanes)

    def thread(self, index: int) -> str:
        """Name one of the threads."""
        return self.thread_of(int(self.numbers[index]))

    def thread_of(self, lane: int) -> str:
        threads = self.layout.threads
        return f"thread {lane % threads} of CTA {int(self.layout.ctas[lane // threads])}"

    def fault(
        self, kind: type[KernelError], problem: str, index: int, where: str = "", others: Sequence[str] = ()
    ) -> KernelError:
        """Return the error to raise for one of the threads."""
        return self.reporter.fault(kind, problem, self.instruction, self._detail(index, where), others)

    def report(
        self, kind: type[KernelError], problem: str, index: int, where: str = "", others: Sequence[str] = ()
    ) -> None:
        """Raise or count a fault of one of the threads."""
        self.reporter.report(kind, problem, self.instruction, self._detail(index, where), others)

    def note(self, problem: str, count: int = 1) -> None:
        self.reporter.note(problem, self.instruction, count)

    def note_unwritten(self, memory: str, items: Array, chosen: Array | None = None) -> None:
        """Note loads of memory that was not written.

        Args:
            memory: Its name.
            items: Says for each access whether its memory was not written.
            chosen: The accesses among those of all threads; None for all.
        """
        self.note(f"reads uninitialized {memory}", int(items.sum()))
        if chosen is None:
            self.unwritten = items
            return
        if self.unwritten is None:
            self.unwritten = np.zeros(len(self.numbers), bool)
        self.unwritten[chosen] = items

    def _detail(self, index: int, where: str) -> str:
        return f"{self.thread(index)}, {where}" if where else self.thread(index)
