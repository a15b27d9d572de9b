"""Local memory: bytes that belong to one thread."""

from __future__ import annotations

import numpy as np

from .dtypes import ITEMS, U8, U16, UNINITIALIZED, Array, has_pattern, holds_pattern
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
        self._stride = -(-size // 16) * 16
        self._bytes = np.full(lane_count * self._stride // 2, UNINITIALIZED, U16).view(U8)
        self._views = {item: self._bytes.view(dtype) for item, dtype in ITEMS.items()}

    def _places(self, addresses: Array, size: int, site: Site) -> Array:
        offsets = addresses.astype(np.int64)
        wrong = (offsets < 0) | (offsets > self.size - size) | (offsets % size != 0)
        if wrong.any():
            index = int(np.argmax(wrong))
            where = f"byte {int(offsets[index])} of {self.size} bytes of local memory"
            raise site.fault(AccessError, f"an access of {size} bytes is outside local memory", index, where)
        return np.asarray(site.numbers * self._stride + offsets)

    def load(self, addresses: Array, size: int, site: Site) -> Array:
        places = self._places(addresses, size, site)
        values = self._views[size].take(places // size)
        checked = values if size > 1 else self._views[2].take(places // 2)  # a byte counts with its neighbor
        if has_pattern(checked, UNINITIALIZED):
            site.note_unwritten("local memory", holds_pattern(checked, UNINITIALIZED))
        return values

    def store(self, addresses: Array, values: Array, site: Site) -> None:
        size = values.dtype.itemsize
        self._views[size][self._places(addresses, size, site) // size] = values
