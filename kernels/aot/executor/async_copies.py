"""cp.async: copies whose bytes land in shared memory when their thread waits for them, and not before."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .dtypes import IN_FLIGHT, Array, holds_pattern
from .sites import Site

OPEN = -1
"""Group of a copy that its thread did not commit yet."""


class Copy(NamedTuple):
    """A copy in flight; one element of each array for every thread that made it."""

    lanes: Array
    places: Array  # bytes of shared memory
    values: Array
    group: Array  # groups that the thread had committed before, or OPEN
    site: Site

    def part(self, chosen: Array) -> Copy:
        return Copy(self.lanes[chosen], self.places[chosen], self.values[chosen], self.group[chosen], self.site)


class AsyncCopies:
    """The copies in flight of all threads that run together."""

    def __init__(self, lane_count: int) -> None:
        self.copies: list[Copy] = []
        self._committed = np.zeros(lane_count, np.int32)  # groups of each thread

    def __bool__(self) -> bool:
        return bool(self.copies)

    def start(self, places: Array, values: Array, lanes: Array, site: Site) -> None:
        self.copies.append(Copy(lanes, places, values, np.full(len(lanes), OPEN, np.int32), site))

    def commit(self, is_active: Array) -> None:
        """Make the open copies of each active thread one group."""
        for number, copy in enumerate(self.copies):
            joins = (copy.group == OPEN) & is_active[copy.lanes]
            if joins.any():
                group = np.where(joins, self._committed[copy.lanes], copy.group)
                self.copies[number] = copy._replace(group=group)
        self._committed += is_active

    def wait(self, allowed: int | None, is_active: Array) -> list[Copy]:
        """Return the copies that landed, and forget them.

        Args:
            allowed: Number of the latest groups of each thread that may stay in flight; None waits for open copies too.
            is_active: The threads that wait. Copies of other threads stay in flight.
        """
        landed, left = [], []
        for copy in self.copies:
            if allowed is None:
                done = is_active[copy.lanes]
            else:
                done = is_active[copy.lanes] & (copy.group != OPEN)
                done &= copy.group < self._committed[copy.lanes] - allowed
            if done.all():
                landed.append(copy)
            elif not done.any():
                left.append(copy)
            else:
                landed.append(copy.part(done))
                left.append(copy.part(~done))
        self.copies = left
        return landed

    def find(self, values: Array, places: Array, size: int) -> tuple[int, Copy] | None:
        """Return the first item in flight, and its copy.

        The item holds the pattern of bytes in flight, and the copy will write it.
        """
        # The pattern alone may be a number.
        marked = np.flatnonzero(holds_pattern(values, IN_FLIGHT))
        for copy in self.copies:
            copied = copy.values.dtype.itemsize
            unit = max(size, copied)
            covered = np.isin(places[marked] // unit, copy.places // unit)
            if covered.any():
                return int(marked[np.argmax(covered)]), copy
        return None
