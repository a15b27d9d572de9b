"""Shared memory of the CTAs that run together: bounds, initialization, races, asynchronous copies and reads."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from .access_log import AccessLog
from .async_copies import AsyncCopies, Copy
from .async_reads import CHUNK, AsyncReads, Guard, Reader
from .dtypes import IN_FLIGHT, ITEMS, U8, U16, UNINITIALIZED, Array, has_pattern, holds_pattern, pattern
from .errors import AccessError, KernelError, PipelineError, RaceError
from .live_barriers import BYTES, LiveBarriers
from .proxies import GenericWrites
from .sites import Layout, Site

BASE = 1024
"""Address of the first byte. Kernels expect the alignment of the largest swizzle, and 0 would hide null pointers."""


class SharedObserver(Protocol):
    """Counts accesses to shared memory."""

    def count_shared(self, site: Site, lanes: Array, places: Array, size: int, is_matrix: bool) -> None: ...


class SharedMemory:
    """One array that holds the memory of one CTA after another.

    Places are bytes in this array. Addresses are what a kernel uses: they begin at BASE in each CTA.

    Args:
        layout: The CTAs.
        size: Bytes of a CTA.
        granule: Bytes of the smallest access of the kernel.
        has_async_proxy: Whether the kernel has instructions that read through the asynchronous proxy.
    """

    def __init__(self, layout: Layout, size: int, granule: int, has_async_proxy: bool) -> None:
        cta_count, threads = len(layout.ctas), layout.threads
        lane_count = cta_count * threads
        self.size = size
        self.stride = max(-(-size // 128) * 128, 128)
        self.observer: SharedObserver | None = None
        self._bytes = np.full(cta_count * self.stride // 2, UNINITIALIZED, U16).view(U8)
        self._views = {item: self._bytes.view(dtype) for item, dtype in ITEMS.items()}
        self._cta_base = np.arange(lane_count) // threads * self.stride
        self._log = AccessLog("shared memory", cta_count, self.stride, threads, granule)
        self._copies = AsyncCopies(lane_count)
        self.reads = AsyncReads(lane_count, len(self._bytes))
        self._generic = GenericWrites(cta_count, self.stride, threads) if has_async_proxy else None
        self.guard = Guard(cta_count, self.stride // CHUNK, threads)
        self.barriers = LiveBarriers(len(self._bytes), self.stride)

    def place(self, addresses: Array, size: int, site: Site) -> Array:
        """Return the places of addresses after a check of bounds and alignment.

        There is one address for each thread of the site.
        """
        offsets = addresses.astype(np.int64) - BASE
        wrong = (offsets < 0) | (offsets > self.size - size) | (offsets & (size - 1) != 0)
        if wrong.any():
            index = int(np.argmax(wrong))
            offset = int(offsets[index])
            aligned = offset % size == 0
            problem = "is outside shared memory" if aligned else "to shared memory is not aligned"
            where = f"byte {offset} of {self.size} bytes of shared memory"
            raise site.fault(AccessError, f"an access of {size} bytes {problem}", index, where)
        return np.asarray(offsets + self._cta_base[site.numbers])

    def load(self, places: Array, size: int, site: Site, is_matrix: bool = False) -> Array:
        """Return one item of `size` bytes for each thread of the site."""
        if self.observer is not None:
            self.observer.count_shared(site, site.numbers, places, size, is_matrix)
        self._log.add(places, size, site.numbers, site)
        self.barriers.check("reads", places, size, site)
        values = self._views[size].take(places // size)
        self._check_loaded(values, places, site)
        return values

    def store(self, places: Array, values: Array, site: Site, is_matrix: bool = False) -> None:
        self.barriers.check("writes", places, values.dtype.itemsize, site)
        self._store(places, values, site, is_matrix)

    def store_barriers(self, places: Array, site: Site) -> None:
        """Handle mbarrier.init and mbarrier.inval. What the bytes hold is not defined."""
        self._store(places, pattern(UNINITIALIZED, ITEMS[BYTES]).repeat(len(places)), site)

    def _store(self, places: Array, values: Array, site: Site, is_matrix: bool = False) -> None:
        size = values.dtype.itemsize
        if self.observer is not None:
            self.observer.count_shared(site, site.numbers, places, size, is_matrix)
        self._write(places, values, site.numbers, site)
        self._views[size][places // size] = values

    def touch(self, places: Array, size: int, site: Site) -> None:
        """Note a read by an instruction that keeps its data elsewhere. An example is an mbarrier."""
        self._log.add(places, size, site.numbers, site)

    def _write(self, places: Array, values: Array, lanes: Array, site: Site) -> None:
        """Check and note a write."""
        size = values.dtype.itemsize
        self._log.add(places, size, lanes, site, values)
        if self._copies or self.reads:
            self._check_overwritten(places, size, site)
        if self._generic is not None:
            self._generic.add(places, lanes)
            index = self.guard.find(places // CHUNK, lanes)
            if index is not None:
                problem = "writes an operand of a product that this warp did not wait for"
                site.report(RaceError, problem, index, self._byte(places[index]))

    def _byte(self, place: int) -> str:
        return f"byte {int(place) % self.stride} of shared memory"

    def _check_loaded(self, values: Array, places: Array, site: Site) -> None:
        size = values.dtype.itemsize
        if self._copies and has_pattern(values, IN_FLIGHT) and (found := self._copies.find(values, places, size)):
            raise self._in_flight("reads", found, places, site)
        checked = values if size > 1 else self._views[2].take(places // 2)  # a byte counts with its neighbor
        if has_pattern(checked, UNINITIALIZED):
            site.note_unwritten("shared memory", holds_pattern(checked, UNINITIALIZED))

    def _in_flight(self, verb: str, found: tuple[int, Copy], places: Array, site: Site) -> KernelError:
        index, copy = found
        problem = f"{verb} shared memory that an asynchronous copy did not deliver yet"
        others = [f"the copy is {copy.site.instruction}"]
        return site.fault(PipelineError, problem, index, self._byte(places[index]), others)

    def _check_overwritten(self, places: Array, size: int, site: Site) -> None:
        """Raise for a write to bytes that are still in use.

        A copy will write them, or a matrix instruction may still read them.
        """
        if self._copies:
            current = self._views[size].take(places // size)
            if has_pattern(current, IN_FLIGHT) and (found := self._copies.find(current, places, size)):
                raise self._in_flight("writes", found, places, site)
        if self.reads and (read := self.reads.find(places)):
            index, reader = read
            problem = "writes shared memory that a matrix instruction may still read"
            others = [f"read by {reader.site.instruction}"]
            site.report(PipelineError, problem, index, self._byte(places[index]), others)

    # Asynchronous copies

    def copy_async(self, places: Array, values: Array, site: Site) -> None:
        """Start a copy. Its bytes are undefined until its threads wait for it."""
        size = values.dtype.itemsize
        if self.observer is not None:
            self.observer.count_shared(site, site.numbers, places, size, False)
        self._log.add(places, size, site.numbers, site, values)
        self.barriers.check("copies to", places, size, site)
        if self._copies or self.reads:
            self._check_overwritten(places, size, site)
        self._views[size][places // size] = pattern(IN_FLIGHT, values.dtype)
        self._copies.start(places, values, site.numbers, site)

    def commit_copies(self, is_active: Array) -> None:
        self._copies.commit(is_active)

    def wait_for_copies(self, allowed: int | None, is_active: Array) -> None:
        """Land copies. Other threads may read them after a barrier only."""
        for copy in self._copies.wait(allowed, is_active):
            size = copy.values.dtype.itemsize
            self._log.add(copy.places, size, copy.lanes, copy.site, copy.values)
            if self._generic is not None:
                self._generic.add(copy.places, copy.lanes)
            self._views[size][copy.places // size] = copy.values

    # Asynchronous reads of matrix instructions

    def load_async(self, places: Array, group: int, site: Site, is_waited_by_thread: bool) -> tuple[Array, Reader]:
        """Return 16-byte chunks that a matrix instruction reads, and its record.

        Args:
            places: Of the chunks.
            group: Threads that issue the instruction together.
            site: Has for each chunk the first of these threads.
            is_waited_by_thread: Whether the issuing threads wait for the end, as for wgmma.
        """
        if is_waited_by_thread:
            self._log.add(places, CHUNK, site.numbers, site)
        else:
            self._log.check_now(places, CHUNK, site.numbers, site, is_write=False)
        self.barriers.check("multiplies", places, CHUNK, site)
        assert self._generic is not None
        self._generic.check(places, site.numbers, group, site)
        reader = self.reads.start(places, site.numbers, site, is_waited_by_thread)
        values = self._views[CHUNK].take(places // CHUNK)
        self._check_loaded(values, places, site)
        return values, reader

    def fence_proxy(self, is_active: Array) -> None:
        """Handle fence.proxy.async."""
        if self._generic is not None:
            self._generic.fence(is_active)

    # Barriers

    def barrier(self, ctas: Array | None) -> None:
        """Handle a barrier of these CTAs; None for all."""
        self._log.barrier(ctas)
        self.guard.barrier(ctas)
        if self._generic is not None:
            self._generic.barrier(ctas)
        for reader in self.reads.readers:  # they may continue to read behind the barrier
            if reader.is_waited_by_thread:
                self._log.add(reader.places, CHUNK, reader.lanes, reader.site)

    def finish(self) -> None:
        """Check the end of the CTAs."""
        self._log.barrier(None)
        if self._copies:
            site = self._copies.copies[0].site
            raise site.fault(PipelineError, "a CTA ends without waiting for an asynchronous copy", 0)
        if self.reads:
            site = self.reads.readers[0].site
            raise site.fault(PipelineError, "a CTA ends without waiting for a matrix instruction", 0)
