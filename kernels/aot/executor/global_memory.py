"""Global memory: one address space for each pointer argument, valid at its elements and nowhere else."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from .dtypes import ITEMS, U8, UNINITIALIZED, Array, has_pattern, holds_pattern
from .errors import AccessError, RaceError
from .sites import Site

SPACING = 1 << 40
"""Bytes between the address spaces of arguments. An offset that leaves one cannot reach another."""
_FREE, _MANY = 0, -1
"""States of an element: no CTA accessed it, several did. Other states are 1 + the number of the CTA."""


class GlobalObserver(Protocol):
    """Counts accesses to global memory."""

    def count_global(self, site: Site, addresses: Array, size: int) -> None: ...


class Extent:
    """Host memory that one or several arguments share.

    `writer` and `reader` hold the CTAs that accessed its elements.
    """

    def __init__(self, start: int, end: int, granule: int) -> None:
        self.start = start
        self.end = end
        self.granule = granule  # bytes of the smallest element
        self.writer: Array | None = None  # of each granule, once something was written
        self.reader: Array | None = None
        self.is_written = False  # whether the kernel may store here, so that reads are tracked too

    def states(self) -> Array:
        return np.zeros((self.end - self.start) // self.granule + 2, np.int32)


class Buffer:
    """The elements that one pointer argument refers to.

    Args:
        number: Of its address space.
        pointer: Host address of the first element.
        shape, strides: In elements. Gaps between the elements of a strided tensor are not valid.
        item: Bytes of an element.
    """

    def __init__(
        self, name: str, number: int, pointer: int, shape: Sequence[int], strides: Sequence[int], item: int
    ) -> None:
        self.name = name
        self.item = item
        self.pointer = pointer
        reach = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        count = int(np.prod(shape, dtype=np.int64))
        # Addresses in the kernel have the alignment of the host address.
        self.first = pointer % 256
        self.end = self.first + (reach * item if count else 0)
        self.origin = number * SPACING + SPACING // 2
        self.bytes = _host_bytes(pointer - self.first, -(-self.end // 16) * 16)
        self.views = {size: self.bytes.view(dtype) for size, dtype in ITEMS.items()}
        self.gaps = None if count in (0, reach) else _gaps_before(self.first, shape, strides, item, len(self.bytes))
        self.extent = Extent(pointer, pointer + self.end - self.first, item)
        self.rewritten = 0  # elements that were written more than once

    @property
    def address(self) -> int:
        return self.origin + self.first

    def is_outside(self, offsets: Array, size: int) -> Array:
        """Return which accesses touch a byte outside the buffer's elements."""
        outside = (offsets < self.first) | (offsets > self.end - size)
        if self.gaps is not None:
            inside = np.where(outside, 0, offsets)
            outside |= self.gaps[inside + size] != self.gaps[inside]
        return np.asarray(outside)

    def granules(self, offsets: Array, size: int) -> Array:
        """Return the extent's granules that each access touches, `[accesses, granules of one]`."""
        granule = self.extent.granule
        start = offsets + (self.pointer - self.first - self.extent.start)
        return np.asarray(start[:, None] // granule + np.arange(max(1, size // granule)))


def _host_bytes(pointer: int, size: int) -> Array:
    if not size:
        return np.zeros(0, U8)
    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(pointer))


def _gaps_before(first: int, shape: Sequence[int], strides: Sequence[int], item: int, size: int) -> Array:
    """Count the gap bytes before each byte. A gap byte does not belong to an element."""
    inside = np.zeros(size + 1, bool)
    elements = inside[first : first + (size - first) // item * item].reshape(-1, item)
    steps = tuple(stride * item for stride in strides)
    for byte in range(item):
        np.lib.stride_tricks.as_strided(elements[:, byte], shape, steps)[...] = True
    return np.concatenate(([0], np.cumsum(~inside)))


class Part(NamedTuple):
    """The accesses of an instruction that go to one buffer."""

    buffer: Buffer
    offsets: Array  # bytes from the buffer's origin
    chosen: Array | None  # which of the threads; None for all

    def of(self, values: Array) -> Array:
        return values if self.chosen is None else values[self.chosen]

    def number_of(self, place: int) -> int:
        """Return the number of an access among all threads of the site."""
        return place if self.chosen is None else int(self.chosen[place])


class GlobalMemory:
    """The buffers of one launch."""

    def __init__(self) -> None:
        self.buffers: dict[int, Buffer] = {}
        self.observer: GlobalObserver | None = None
        self.written: set[str] = set()  # arguments that the kernel may store to

    def add(self, name: str, pointer: int, shape: Sequence[int], strides: Sequence[int], item: int) -> int:
        """Add the elements of an argument; return the address to pass to the kernel."""
        number = len(self.buffers) + 1
        self.buffers[number] = Buffer(name, number, pointer, shape, strides, item)
        return self.buffers[number].address

    def share_extents(self) -> None:
        """Join the extents of buffers that overlap. Also note which extents the kernel may store to."""
        ordered = sorted(self.buffers.values(), key=lambda buffer: buffer.extent.start)
        last: Extent | None = None
        for buffer in ordered:
            extent = buffer.extent
            if last is not None and extent.start < last.end and extent.end > extent.start:
                last.end = max(last.end, extent.end)
                last.granule = min(last.granule, extent.granule)
                buffer.extent = last
            elif extent.end > extent.start:
                last = extent
            buffer.extent.is_written |= buffer.name in self.written

    def load(self, addresses: Array, size: int, site: Site) -> Array:
        """Return one item of `size` bytes for each thread of the site."""
        if self.observer is not None:
            self.observer.count_global(site, addresses, size)
        result = np.empty(len(addresses), ITEMS[size])
        for part in self._parts(addresses, size, site):
            buffer = part.buffer
            values = buffer.views[size].take(part.offsets // size)
            if buffer.extent.is_written:
                self._note_read(part, size, site)
            if size > 1 and has_pattern(values, UNINITIALIZED):
                unwritten = holds_pattern(values, UNINITIALIZED)
                site.note_unwritten(f"memory of {buffer.name}", unwritten, part.chosen)
            if part.chosen is None:
                return values
            result[part.chosen] = values
        return result

    def store(self, addresses: Array, values: Array, site: Site) -> None:
        size = values.dtype.itemsize
        if self.observer is not None:
            self.observer.count_global(site, addresses, size)
        for part in self._parts(addresses, size, site):
            self._note_write(part, size, site)
            part.buffer.views[size][part.offsets // size] = part.of(values)

    # Accesses of other CTAs

    def _note_read(self, part: Part, size: int, site: Site) -> None:
        extent, granules = part.buffer.extent, part.buffer.granules(part.offsets, size)
        states = part.of(site.ctas)[:, None].astype(np.int32) + 1
        if extent.writer is not None:
            self._check(extent.writer[granules], states, part, "reads what another CTA wrote in the same launch", site)
        if extent.reader is None:
            extent.reader = extent.states()
        before = extent.reader[granules]
        extent.reader[granules] = np.where((before == _FREE) | (before == states), states, _MANY)
        # Several CTAs may read one granule in this instruction; the last one was stored.
        again = extent.reader[granules]
        if (differs := (again != states) & (again != _MANY)).any():
            extent.reader[granules[differs]] = _MANY

    def _note_write(self, part: Part, size: int, site: Site) -> None:
        buffer, extent = part.buffer, part.buffer.extent
        granules = buffer.granules(part.offsets, size)
        states = part.of(site.ctas)[:, None].astype(np.int32) + 1
        if extent.reader is not None:
            self._check(extent.reader[granules], states, part, "writes what another CTA reads in the same launch", site)
        if extent.writer is None:
            extent.writer = extent.states()
        problem = "writes what another CTA wrote in the same launch"
        before = extent.writer[granules]
        buffer.rewritten += int(np.count_nonzero(before))
        self._check(before, states, part, problem, site)
        extent.writer[granules] = states
        self._check(extent.writer[granules], states, part, problem, site)

    def _check(self, found: Array, states: Array, part: Part, problem: str, site: Site) -> None:
        foreign = ((found != _FREE) & (found != states)).any(1)
        if not foreign.any():
            return
        place = int(np.argmax(foreign))
        row = found[place]
        other = int(row[(row != _FREE) & (row != states[place])][0])
        where = self.describe(part.buffer.origin + int(part.offsets[place]))
        who = "several CTAs" if other == _MANY else f"CTA {other - 1}"
        site.report(RaceError, f"{problem}, in {part.buffer.name}", part.number_of(place), f"{where}, {who}")

    # Addresses

    def _parts(self, addresses: Array, size: int, site: Site) -> list[Part]:
        """Divide accesses by buffer, and check alignment and bounds."""
        crooked = addresses & np.uint64(size - 1)
        if crooked.any():
            index = int(np.flatnonzero(crooked)[0])
            raise self._outside(f"an access of {size} bytes is not aligned", addresses, index, site)
        numbers = addresses // np.uint64(SPACING)
        first = int(numbers[0]) if len(numbers) else 0
        alone = bool((numbers == first).all())
        parts = []
        for number in [first] if alone else np.unique(numbers).tolist():
            chosen = None if alone else np.flatnonzero(numbers == number)
            buffer = self.buffers.get(number)
            if buffer is None:
                index = 0 if chosen is None else int(chosen[0])
                raise self._outside(f"an access of {size} bytes is outside all arguments", addresses, index, site)
            own = addresses if chosen is None else addresses[chosen]
            part = Part(buffer, (own - np.uint64(buffer.origin)).view(np.int64), chosen)
            outside = buffer.is_outside(part.offsets, size)
            if outside.any():
                index = part.number_of(int(np.argmax(outside)))
                raise self._outside(f"an access of {size} bytes is outside {buffer.name}", addresses, index, site)
            parts.append(part)
        return parts

    def _outside(self, problem: str, addresses: Array, index: int, site: Site) -> Exception:
        return site.fault(AccessError, problem, index, self.describe(int(addresses[index])))

    def describe(self, address: int) -> str:
        """Return an address as argument and offset."""
        buffer = self.buffers.get(address // SPACING)
        if buffer is None:
            return f"address {address:#x}"
        return f"{buffer.name} {address - buffer.address:+d} bytes (it has {buffer.end - buffer.first})"
