"""Accesses since the last barrier: find races between the warps of a CTA.

Each warp marks the granules that it reads and writes. A granule is as large as the smallest access of the kernel, so no
mark covers the bytes of two accesses. A barrier compares the marks of different warps and clears them. Several warps
may write the same value to the same byte, as they do if several threads hold copies of one element.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .dtypes import ITEMS, U8, U64, Array
from .errors import RaceError
from .sites import LANES, Site


class Access(NamedTuple):
    """What some threads accessed."""

    places: Array
    lanes: Array
    size: int
    values: Array | None  # that were written
    site: Site


class AccessLog:
    """Accesses to a memory of several CTAs that run together.

    Args:
        memory: Its name in messages.
        cta_count: Number of CTAs.
        stride: Bytes from one CTA's memory to the next, a multiple of 128. CTA `i` begins at `i * stride`.
        threads: Threads of a CTA.
        granule: Bytes of the smallest access.
    """

    def __init__(self, memory: str, cta_count: int, stride: int, threads: int, granule: int) -> None:
        self.memory = memory
        self.stride = stride
        self.granule = granule
        self.warps = threads // LANES
        self._cta_count = cta_count
        self._rest = cta_count * stride
        self._base = np.arange(cta_count * threads) // LANES % self.warps * self._rest
        shape = (self.warps, cta_count, stride // granule)
        self._reads, self._writes = np.zeros(shape, U8), np.zeros(shape, U8)
        self._marks = {
            size: (
                self._reads.reshape(-1).view(ITEMS[size // granule]),
                self._writes.reshape(-1).view(ITEMS[size // granule]),
                np.ones(size // granule, U8).view(ITEMS[size // granule])[0],
            )
            for size in ITEMS
            if size >= granule
        }
        self._read_span, self._write_span = _Span(stride), _Span(stride)
        self._accesses: list[Access] = []
        self._first = np.zeros(cta_count, np.int64)  # of each CTA, the first access since its last barrier

    def add(self, places: Array, size: int, lanes: Array, site: Site, values: Array | None = None) -> None:
        """Note accesses of `size` bytes at `places` by `lanes`. `values` are written; None for reads."""
        if self.warps == 1:
            return
        reads, writes, mark = self._marks[size]
        marks = reads if values is None else writes
        marks[(places + self._base[lanes]) // size] = mark
        (self._read_span if values is None else self._write_span).extend(places % self.stride, size)
        self._accesses.append(Access(places, lanes, size, values, site))

    def check_now(self, places: Array, size: int, lanes: Array, site: Site, is_write: bool) -> None:
        """Report an asynchronous access without a barrier after another warp's access. Both access the same bytes."""
        if self.warps == 1 or (self._write_span.is_empty and not (is_write and not self._read_span.is_empty)):
            return
        reads, writes, _ = self._marks[size]
        own = self._base[lanes]
        for warp in range(self.warps):
            index = (places + warp * self._rest) // size
            found = writes.take(index) != 0
            if is_write:
                found |= reads.take(index) != 0
            found &= own != warp * self._rest
            if found.any():
                first = int(np.argmax(found))
                place = int(places[first])
                site.report(
                    RaceError,
                    f"{'writes' if is_write else 'reads'} {self.memory} without a barrier after another warp's access",
                    first,
                    f"byte {place % self.stride}",
                    self._others(place),
                )
                return

    def barrier(self, ctas: Array | None) -> None:
        """Compare the accesses of the warps of these CTAs, and forget them; None for all CTAs."""
        chosen = slice(None) if ctas is None else ctas
        first, last = self._write_span.granules(self.granule)
        if last > first:
            writes, reads = self._writes[:, chosen, first:last], self._reads[:, chosen, first:last]
            races = self._races(writes, reads, first, chosen)
            if races is not None:
                self._report(races, first, chosen)
            self._writes[:, chosen, first:last] = 0
        first, last = self._read_span.granules(self.granule)
        if last > first:
            self._reads[:, chosen, first:last] = 0
        if ctas is None:
            self._read_span.clear()
            self._write_span.clear()
        self._forget(chosen)

    def _forget(self, chosen: slice | Array) -> None:
        """Drop the accesses of these CTAs, which have passed a barrier; others may not have."""
        self._first[chosen] = len(self._accesses)
        dropped = int(self._first.min())
        if dropped:
            del self._accesses[:dropped]
            self._first -= dropped

    def _since_barrier(self) -> list[tuple[Access, Array]]:
        """Return the accesses, each with a mask of its places.

        The mask is true where no barrier separates a place from what follows.
        """
        return [
            (access, self._first[access.places // self.stride] <= number)
            for number, access in enumerate(self._accesses)
        ]

    def _races(self, writes: Array, reads: Array, first: int, chosen: slice | Array) -> Array | None:
        """Return which granules one warp wrote and another accessed, `[CTAs, granules]`; None if there are none."""
        # Marks are 0 or 1, so eight of them are added or compared as one 64-bit number.
        writes, reads = (np.ascontiguousarray(part).view(U64) for part in (writes, reads))
        total = writes[0].copy()
        foreign = reads[0] & ~writes[0]
        for warp in range(1, self.warps):
            total += writes[warp]
            foreign |= reads[warp] & ~writes[warp]
        writers = total.view(U8)
        races = (writers != 0) & (foreign.view(U8) != 0)
        shared = writers > 1
        if shared.any():
            races |= self._disagreements(shared, first, chosen)
        return races if races.any() else None

    def _disagreements(self, shared: Array, first: int, chosen: slice | Array) -> Array:
        """Return which of the granules that several warps wrote got different values."""
        suspects = np.zeros(self._writes.shape[1:], bool)
        suspects[chosen, first : first + shared.shape[1]] = shared
        flat = suspects.reshape(-1)
        value, result = np.zeros(self._rest, U8), np.zeros(flat.shape, bool)
        written = []
        for access, is_current in self._since_barrier():
            if access.values is None:
                continue
            granules = access.places[:, None] // self.granule + np.arange(access.size // self.granule)
            if (hit := flat[granules].any(1) & is_current).any():
                places = (access.places[hit, None] + np.arange(access.size)).reshape(-1)
                written.append((places, np.ascontiguousarray(access.values[hit]).view(U8)))
                value[places] = written[-1][1]
        for places, values in written:
            result[places[value[places] != values] // self.granule] = True
        return result.reshape(suspects.shape)[chosen, first : first + shared.shape[1]] & shared

    def _report(self, races: Array, first: int, chosen: slice | Array) -> None:
        row, granule = (int(part) for part in np.argwhere(races)[0])
        cta = int(np.arange(self._cta_count)[chosen][row])
        offset = (first + granule) * self.granule
        place = cta * self.stride + offset
        touching = [(access, self._touches(access, place) & current) for access, current in self._since_barrier()]
        writer, hit = next((one, hit) for one, hit in reversed(touching) if one.values is not None and hit.any())
        index = int(np.argmax(hit))
        writer.site.among(writer.lanes).report(
            RaceError,
            f"writes {self.memory} without a barrier between it and another warp's access",
            index,
            f"byte {offset}",
            self._others(place),
        )

    def _touches(self, access: Access, place: int) -> Array:
        return np.asarray((access.places <= place + self.granule - 1) & (place < access.places + access.size))

    def _others(self, place: int) -> list[str]:
        """Describe the accesses to a byte."""
        found: dict[str, None] = {}
        for access, is_current in self._since_barrier():
            if (self._touches(access, place) & is_current).any():
                verb = "read" if access.values is None else "written"
                found[f"{verb} by {access.site.instruction}"] = None
        return list(found)[:6]


class _Span:
    """The part of each CTA's memory that was accessed."""

    def __init__(self, stride: int) -> None:
        self._stride = stride
        self.clear()

    def clear(self) -> None:
        self._first, self._last = self._stride, 0

    @property
    def is_empty(self) -> bool:
        return self._last <= self._first

    def extend(self, offsets: Array, size: int) -> None:
        self._first = min(self._first, int(offsets.min()))
        self._last = max(self._last, int(offsets.max()) + size)

    def granules(self, granule: int) -> tuple[int, int]:
        """Return the first and last granule, aligned to eight marks."""
        if self.is_empty:
            return 0, 0
        return self._first // granule // 8 * 8, -(-self._last // granule // 8) * 8
