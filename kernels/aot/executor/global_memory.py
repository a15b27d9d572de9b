"""Global memory: one address space for each pointer argument, valid at its elements and nowhere else."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from .dtypes import ITEMS, U8, UNINITIALIZED, Array, has_pattern, holds_pattern
from .errors import AccessError
from .global_log import Conflict, Extent, GlobalLog
from .sites import Layout, Site

SPACING = 1 << 40
"""Bytes between the address spaces of arguments. An offset that leaves one cannot reach another."""


class GlobalObserver(Protocol):
    """Counts accesses to global memory."""

    def count_global(self, site: Site, addresses: Array, size: int) -> None: ...


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

    def write(self, values: Array) -> None:
        size = values.dtype.itemsize
        self.buffer.views[size][self.offsets // size] = values

    def holds(self, values: Array) -> Array:
        """Return for each granule of each access whether memory holds its value."""
        size = values.dtype.itemsize
        current = self.buffer.views[size].take(self.offsets // size)
        granule = min(size, self.buffer.extent.granule)
        return np.asarray((current.view(U8) == values.view(U8)).reshape(len(values), -1, granule).all(2))

    def number_of(self, place: int) -> int:
        """Return the number of an access among all threads of the site."""
        return place if self.chosen is None else int(self.chosen[place])


class GlobalMemory:
    """The buffers of one launch."""

    def __init__(self) -> None:
        self.buffers: dict[int, Buffer] = {}
        self.observer: GlobalObserver | None = None
        self.written: set[str] = set()  # arguments that the kernel may store to
        self._log = GlobalLog()

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
                granules = buffer.granules(part.offsets, size)
                self._report(self._log.read(buffer.extent, granules, self._stamps(part, site)), part, site)
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
            own, granules = part.of(values), part.buffer.granules(part.offsets, size)
            write, holds = functools.partial(part.write, own), functools.partial(part.holds, own)
            conflicts = self._log.write(part.buffer.extent, granules, self._stamps(part, site), write, holds)
            self._report(conflicts, part, site)

    # Order of accesses

    def begin(self, layout: Layout) -> None:
        """Continue with other CTAs of the launch."""
        self._log.begin(layout)

    def barrier(self, ctas: Array | None) -> None:
        """Handle a barrier of these CTAs; None for all."""
        self._log.barrier(ctas)

    def _stamps(self, part: Part, site: Site) -> Array:
        return np.asarray(part.of(self._log.stamps(site))[:, None])

    def _report(self, conflicts: list[Conflict], part: Part, site: Site) -> None:
        for found in conflicts:
            where = self.describe(part.buffer.origin + int(part.offsets[found.access]))
            problem, number = f"{found.problem}, in {part.buffer.name}", part.number_of(found.access)
            site.report(found.kind, problem, number, f"{where}, {found.who}", found.others)

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
