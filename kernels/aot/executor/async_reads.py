"""Chunks of shared memory that matrix instructions read asynchronously.

They must not be written until the instructions end.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .dtypes import Array
from .sites import LANES, Site

CHUNK = 16
"""Bytes of a chunk."""
OPEN = -1
"""Group of a read that its threads did not commit yet."""


class Reader(NamedTuple):
    """A matrix instruction that may still read; one element of each array for every chunk."""

    places: Array
    lanes: Array  # the first thread of those that issued it
    group: Array  # groups that the thread had committed before, or OPEN
    site: Site
    is_waited_by_thread: bool  # as wgmma is; tcgen05.mma ends with an mbarrier

    def part(self, chosen: Array) -> Reader:
        return self._replace(places=self.places[chosen], lanes=self.lanes[chosen], group=self.group[chosen])


class AsyncReads:
    """The matrix instructions in flight of all CTAs that run together."""

    def __init__(self, lane_count: int, size: int) -> None:
        self.readers: list[Reader] = []
        self._committed = np.zeros(lane_count, np.int32)
        self._count = np.zeros(size // CHUNK, np.int32)  # readers of each chunk

    def __bool__(self) -> bool:
        return bool(self.readers)

    def start(self, places: Array, lanes: Array, site: Site, is_waited_by_thread: bool) -> Reader:
        reader = Reader(places, lanes, np.full(len(lanes), OPEN, np.int32), site, is_waited_by_thread)
        self.readers.append(reader)
        self._count[places // CHUNK] += 1
        return reader

    def commit(self, is_active: Array) -> None:
        """Handle wgmma.commit_group of the active threads."""
        for number, reader in enumerate(self.readers):
            joins = (reader.group == OPEN) & is_active[reader.lanes]
            if reader.is_waited_by_thread and joins.any():
                group = np.where(joins, self._committed[reader.lanes], reader.group)
                self.readers[number] = reader._replace(group=group)
        self._committed += is_active

    def wait(self, allowed: int, is_active: Array) -> None:
        """Handle wgmma.wait_group: forget what all but the latest groups of the active threads read."""
        left = []
        for reader in self.readers:
            done = is_active[reader.lanes] & (reader.group != OPEN)
            done &= reader.group < self._committed[reader.lanes] - allowed
            if not reader.is_waited_by_thread or not done.any():
                left.append(reader)
                continue
            self._count[reader.places[done] // CHUNK] -= 1
            if not done.all():
                left.append(reader.part(~done))
        self.readers = left

    def finish(self, readers: list[Reader]) -> None:
        """Forget these readers."""
        ended = set(map(id, readers))
        for reader in readers:
            self._count[reader.places // CHUNK] -= 1
        self.readers = [reader for reader in self.readers if id(reader) not in ended]

    def find(self, places: Array) -> tuple[int, Reader] | None:
        """Return the first byte that may still be read, and its reader. The reader is a matrix instruction."""
        busy = self._count[places // CHUNK] > 0
        if not busy.any():
            return None
        index = int(np.argmax(busy))
        chunk = places[index] // CHUNK
        return index, next(reader for reader in self.readers if (reader.places // CHUNK == chunk).any())


class Guard:
    """Units of memory reserved for some warps until the next barrier.

    A product of tcgen05.mma ends when a thread observes it at an mbarrier. Warps that did not observe it need a barrier
    before they touch its operands or its result.
    """

    def __init__(self, cta_count: int, units: int, threads: int) -> None:
        self._all = np.uint32((1 << threads // LANES) - 1)
        self._allowed = np.full((cta_count, units), self._all, np.uint32)  # bits of warps
        self._flat = self._allowed.reshape(-1)
        self._is_closed = np.zeros(cta_count, bool)
        self._warp = np.arange(cta_count * threads) // LANES % (threads // LANES)

    def close(self, units: Array, cta: int, warp: int) -> None:
        """Allow `units` to one warp only."""
        self._flat[units] = np.uint32(1 << warp)
        self._is_closed[cta] = True

    def allow(self, units: Array, warp: int) -> None:
        """Allow `units` to another warp too."""
        self._flat[units] |= np.uint32(1 << warp)

    def barrier(self, ctas: Array | None) -> None:
        """Allow everything to all warps of these CTAs; None for all CTAs."""
        chosen = self._is_closed if ctas is None else np.intersect1d(ctas, np.flatnonzero(self._is_closed))
        if self._is_closed.any():
            self._allowed[chosen] = self._all
            self._is_closed[chosen] = False

    def find(self, units: Array, lanes: Array) -> int | None:
        """Return the first access that is not allowed."""
        if not self._is_closed.any():
            return None
        wrong = (self._flat[units] >> self._warp[lanes].astype(np.uint32)) & 1 == 0
        return int(np.argmax(wrong)) if wrong.any() else None
