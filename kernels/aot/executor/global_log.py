"""Find races in global memory, and elements that are written twice.

Each element has the stamp of its last write and of its last read. A stamp is one number: CTA, epoch, warp and
instruction. A barrier of a CTA begins its next epoch, so accesses of one epoch have no barrier between them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from .dtypes import S64, Array
from .errors import KernelError, RaceError, RewriteError
from .ptx import Instruction
from .sites import LANES, Layout, Site

_WARP, _EPOCH, _CTA, _END = 18, 24, 40, 63
"""First bit of each part of a stamp, and the first bit behind them. The instruction is in the lowest bits."""
_SEVERAL = (1 << _EPOCH) - (1 << _WARP)
"""In place of a warp: several warps of the CTA read the element, or wrote it with one value, in this epoch."""
_FREE, _MANY = 0, -1
"""In place of a stamp: no access, reads of several CTAs. The CTA in a stamp is 1 + its number."""


class Extent:
    """Host memory of one or several arguments, with stamps for its granules."""

    def __init__(self, start: int, end: int, granule: int) -> None:
        self.start = start
        self.end = end
        self.granule = granule  # bytes of the smallest element
        self.writer: Array | None = None  # once something was written
        self.reader: Array | None = None
        self.copies: Array | None = None  # bits of the warps that wrote one value, where the writer has _SEVERAL
        self.is_written = False  # whether the kernel may store here, so that reads are tracked too

    def zeros(self) -> Array:
        return np.zeros((self.end - self.start) // self.granule + 2, S64)

    def writers(self, granules: Array, own: Array) -> Array:
        """Return the stamps of the last writes. Of several warps that wrote copies, the own one counts."""
        if self.writer is None:
            return np.zeros(granules.shape, S64)
        found = self.writer[granules]
        if self.copies is None:
            return found
        is_own = (found & _SEVERAL == _SEVERAL) & (self.copies[granules] >> _warps(own) & 1 != 0)
        return np.where(is_own, found & ~_SEVERAL | own & _SEVERAL, found)

    def add_copies(self, granules: Array, own: Array, earlier: Array) -> None:
        """Note that several warps wrote one value. `earlier` are the stamps of writes before this instruction."""
        assert self.writer is not None
        if self.copies is None:
            self.copies = self.zeros()
        warps = np.where(earlier == _FREE, 0, 1 << (_warps(earlier) & LANES - 1))
        self.copies[granules] = np.where(earlier & _SEVERAL == _SEVERAL, self.copies[granules], warps)
        np.bitwise_or.at(self.copies, granules, 1 << _warps(own))
        self.writer[granules] |= _SEVERAL


class Conflict(NamedTuple):
    """An access that must not follow another one."""

    kind: type[KernelError]
    problem: str
    access: int  # among those of the instruction
    who: str  # CTA or warp of the other access
    others: list[str]  # the other instruction, if it is known


class GlobalLog:
    """The accesses of a launch."""

    def __init__(self) -> None:
        self._instructions: dict[int, Instruction] = {}
        self._base = np.zeros(0, S64)  # CTA and warp of each thread
        self._epochs = np.zeros(0, S64)  # of each CTA

    def begin(self, layout: Layout) -> None:
        """Continue with other CTAs."""
        lanes = np.arange(len(layout.ctas) * layout.threads)
        ctas = layout.ctas[lanes // layout.threads] + 1
        if ctas[-1] >> _END - _CTA:
            raise NotImplementedError(f"the grid has more than {(1 << _END - _CTA) - 1} CTAs")
        self._base = (ctas << _CTA) + (lanes % layout.threads // LANES << _WARP)
        self._epochs = np.zeros(len(layout.ctas), S64)

    def barrier(self, ctas: Array | None) -> None:
        """Handle a barrier of these CTAs; None for all."""
        self._epochs[slice(None) if ctas is None else ctas] += 1 << _EPOCH
        self._epochs %= 1 << _CTA

    def stamps(self, site: Site) -> Array:
        """Return the stamps of the site's threads."""
        number = site.instruction.number
        if number >> _WARP:
            raise site.instruction.unsupported(f"the kernel has more than {1 << _WARP} instructions")
        self._instructions[number] = site.instruction
        return np.asarray(self._base[site.numbers] + self._epochs[site.slots] + number)

    def read(self, extent: Extent, granules: Array, own: Array) -> list[Conflict]:
        """Note reads.

        Args:
            extent: Where.
            granules: `[accesses, granules of one]`.
            own: Stamps, `[accesses, 1]`.
        """
        written = extent.writers(granules, own)
        conflicts = self._order(written, own, "reads", "wrote")
        # What a warp wrote itself needs no note: the next write is compared with that one.
        foreign = (written ^ own) >> _WARP != 0
        own, granules = np.broadcast_to(own, granules.shape)[foreign], granules[foreign]
        if extent.reader is None:
            extent.reader = extent.zeros()
        before = extent.reader[granules]
        own = np.where(_is_of_other_warp(before, own), own | _SEVERAL, own)
        own = np.where(_is_of_other_cta(before, own), _MANY, own)
        extent.reader[granules] = own
        # Several threads may read one granule in this instruction; the last one was stored.
        again = extent.reader[granules]
        if (again != own).any():
            several = (again != own) & (own != _MANY) & (again != _MANY)
            extent.reader[granules[several]] = own[several] | _SEVERAL
            extent.reader[granules[_is_of_other_cta(again, own) | (own == _MANY)]] = _MANY
        return conflicts

    def write(
        self,
        extent: Extent,
        granules: Array,
        own: Array,
        store: Callable[[], None],
        holds: Callable[[], Array],
    ) -> list[Conflict]:
        """Note writes, see `read`.

        Several warps may hold copies of an element, which one instruction stores.

        Args:
            extent: Where.
            granules: `[accesses, granules of one]`.
            own: Stamps, `[accesses, 1]`.
            store: Writes the values.
            holds: Returns which granules hold the values.
        """
        conflicts = []
        if extent.reader is not None:
            conflicts = self._order(extent.reader[granules], own, "writes", "reads")
        if extent.writer is None:
            extent.writer = extent.zeros()
        before = extent.writers(granules, own)
        is_copy = np.zeros(before.shape, bool)
        if before.any():
            is_copy = _is_of_instruction(before, own) & holds()
            conflicts += self._second(np.where(is_copy, _FREE, before), own)
        earlier = np.where(is_copy, before, _FREE)
        extent.writer[granules] = own
        store()
        again = extent.writer[granules]
        if (again != own).any():
            is_copy |= _is_of_instruction(again, own) & holds()
            conflicts += self._order(np.where(is_copy, _FREE, again), own, "writes", "wrote")
        if is_copy.any():
            copied = np.isin(granules, granules[is_copy])
            extent.add_copies(granules[copied], np.broadcast_to(own, granules.shape)[copied], earlier[copied])
        return conflicts

    def _second(self, before: Array, own: Array) -> list[Conflict]:
        """Return what is wrong about writes of granules that were written before."""
        races = self._order(before, own, "writes", "wrote")
        ordered = (before != _FREE) & ~_is_of_other_cta(before, own) & ~_is_of_other_warp(before, own)
        problem = "writes what its CTA wrote before in the same launch"
        return races + self._first(ordered, before, RewriteError, problem, "written")

    def _order(self, found: Array, own: Array, verb: str, other: str) -> list[Conflict]:
        """Return accesses without order behind those that were found."""
        if not found.any():
            return []
        done = "written" if other == "wrote" else "read"
        problem = f"{verb} what another CTA {other} in the same launch"
        conflicts = self._first(_is_of_other_cta(found, own), found, RaceError, problem, done)
        problem = f"{verb} what another warp {other} without a barrier between them"
        return conflicts + self._first(_is_of_other_warp(found, own), found, RaceError, problem, done)

    def _first(self, wrong: Array, found: Array, kind: type[KernelError], problem: str, done: str) -> list[Conflict]:
        if not wrong.any():
            return []
        access, granule = (int(part) for part in np.argwhere(wrong)[0])
        stamp = int(found[access, granule])
        if stamp == _MANY:
            return [Conflict(kind, problem, access, "several CTAs", [])]
        cta = f"CTA {(stamp >> _CTA) - 1}"
        who = "several warps" if stamp & _SEVERAL == _SEVERAL else f"warp {(stamp & _SEVERAL) >> _WARP}"
        instruction = self._instructions[stamp & (1 << _WARP) - 1]
        return [Conflict(kind, problem, access, f"{who} of {cta}", [f"{done} by {instruction}"])]


def _warps(stamps: Array) -> Array:
    return np.asarray((stamps & _SEVERAL) >> _WARP)


def _is_of_other_cta(found: Array, own: Array) -> Array:
    return np.asarray((found != _FREE) & ((found ^ own) >> _CTA != 0))


def _is_of_other_warp(found: Array, own: Array) -> Array:
    """Return which accesses are of the CTA's other warps in this epoch."""
    parts = found ^ own
    return np.asarray((parts >> _EPOCH == 0) & (parts >> _WARP != 0))


def _is_of_instruction(found: Array, own: Array) -> Array:
    """Return which accesses are of this instruction and epoch in another warp."""
    parts = found ^ own
    return np.asarray((parts != 0) & (parts & ~_SEVERAL == 0))
