"""Local memory: bytes that belong to one thread."""

from __future__ import annotations

import numpy as np

from .dtypes import ITEMS, U8, U16, UNINITIALIZED, Array, has_pattern
from .errors import AccessError
from .sites import Site


class LocalMemory:
    """Local memory of all threads that run together, one after another.

    Args:
        lane_count: Number of threads.
        size: Bytes of a thread.
    """

    def __init__(self, lane_count: int, size: int) -> None:
        self.size = size
        self._pitch = -(-size // 16) * 16
        self._bytes = np.full(lane_count * self._pitch // 2, UNINITIALIZED, U16).view(U8)
        self._views = {item: self._bytes.view(dtype) for item, dtype in ITEMS.items()}

    def _places(self, addresses: Array, size: int, site: Site) -> Array:
        offsets = addresses.astype(np.int64)
        wrong = (offsets < 0) | (offsets > self.size - size) | (offsets % size != 0)
        if wrong.any():
            index = int(np.argmax(wrong))
            where = f"byte {int(offsets[index])} of {self.size} bytes of local memory"
            raise site.fault(AccessError, f"an access of {size} bytes is outside local memory", index, where)
        return np.asarray(site.numbers * self._pitch + offsets)

    def load(self, addresses: Array, size: int, site: Site) -> Array:
        values = self._views[size].take(self._places(addresses, size, site) // size)
        if size > 1 and has_pattern(values, UNINITIALIZED):
            site.note("reads uninitialized local memory")
        return values

    def store(self, addresses: Array, values: Array, site: Site) -> None:
        size = values.dtype.itemsize
        self._views[size][self._places(addresses, size, site) // size] = values
