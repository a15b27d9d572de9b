"""mbarriers in shared memory. Only mbarrier instructions may access their bytes until `mbarrier.inval`."""

from __future__ import annotations

import numpy as np

from .dtypes import ITEMS, U8, Array
from .errors import BarrierError
from .sites import Site

BYTES = 8
"""Size of an mbarrier."""


class LiveBarriers:
    """The mbarriers in use of all CTAs that run together.

    Args:
        size: Bytes of shared memory of all CTAs.
        stride: Bytes from one CTA's memory to the next.
    """

    def __init__(self, size: int, stride: int) -> None:
        self._stride = stride
        self._sites: dict[int, Site] = {}  # of the initialization, by place
        marks = np.zeros(size // BYTES, U8)  # 1 for each mbarrier
        self._marks = {item: marks.view(ITEMS[max(1, item // BYTES)]) for item in ITEMS}

    def begin(self, place: int, site: Site) -> None:
        """Handle mbarrier.init."""
        if place in self._sites:
            problem = "initializes an mbarrier again without mbarrier.inval"
            site.report(BarrierError, problem, 0, self._byte(place), self._others(place))
        self._sites[place] = site
        self._marks[BYTES][place // BYTES] = 1

    def end(self, place: int) -> None:
        """Handle mbarrier.inval."""
        del self._sites[place]
        self._marks[BYTES][place // BYTES] = 0

    def check(self, verb: str, places: Array, size: int, site: Site) -> None:
        """Report accesses of `size` bytes to mbarriers. Each thread of the site has one access."""
        if not self._sites:
            return
        found = self._marks[size].take(places // max(size, BYTES)) != 0
        if found.any():
            index = int(np.argmax(found))
            place = int(places[index])
            barrier = next(start for start in self._sites if start < place + size and place < start + BYTES)
            problem = f"{verb} bytes of an mbarrier before mbarrier.inval"
            site.report(BarrierError, problem, index, self._byte(place), self._others(barrier))

    def _byte(self, place: int) -> str:
        return f"byte {place % self._stride} of shared memory"

    def _others(self, place: int) -> list[str]:
        return [f"initialized by {self._sites[place].instruction}"]
