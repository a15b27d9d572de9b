"""Order between the generic proxy and the asynchronous proxy.

Loads and stores use the generic proxy. wgmma and tcgen05.mma read shared memory through the asynchronous proxy. They
see what the generic proxy wrote only if `fence.proxy.async` stands on the path of barriers and program order between
both. So a fence of the writing warp covers its earlier writes for every thread behind the next barrier. A fence behind
a barrier covers all writes before that barrier for its own thread.
"""

from __future__ import annotations

import numpy as np

from .dtypes import Array
from .errors import ProxyError
from .sites import LANES, Site

CHUNK = 16
"""Bytes for which one state is kept."""


class GenericWrites:
    """Chunks of shared memory with unfenced writes of the generic proxy.

    Args:
        cta_count: Number of CTAs.
        stride: Bytes from one CTA's memory to the next.
        threads: Threads of a CTA.
    """

    def __init__(self, cta_count: int, stride: int, threads: int) -> None:
        chunks = stride // CHUNK
        warps = threads // LANES
        self._threads = threads
        self._warp = np.arange(cta_count * threads) // LANES % warps
        self._pending = np.zeros((warps, cta_count, chunks), bool)  # written by the warp since the barrier, not fenced
        self._flat = self._pending.reshape(warps, -1)
        self._touched = np.zeros((warps, cta_count), bool)
        self._before = np.zeros((cta_count, chunks), bool)  # written before the barrier, not fenced
        self._fenced = np.zeros(cta_count * threads, bool)  # threads with a fence since the barrier

    def add(self, places: Array, lanes: Array) -> None:
        """Note writes of at most 16 aligned bytes at `places`."""
        self._flat[self._warp[lanes], places // CHUNK] = True
        self._touched[self._warp[lanes], lanes // self._threads] = True

    def fence(self, is_active: Array) -> None:
        """Handle `fence.proxy.async` of the active threads."""
        self._fenced |= is_active
        # A fence of some threads of a warp does not cover what the others wrote.
        whole = np.asarray(is_active.reshape(-1, LANES).all(1))  # [CTAs * warps]
        fenced: Array = whole.reshape(self._before.shape[0], -1).T & self._touched
        if fenced.any():
            self._pending[fenced] = False
            self._touched[fenced] = False

    def check(self, places: Array, lanes: Array, group: int, site: Site) -> None:
        """Report asynchronous reads at `places` that no fence covers.

        Args:
            places: Chunks, as bytes.
            lanes: For each chunk, the first of the threads that issue the read.
            group: Number of threads that issue it together.
            site: Has the threads `lanes`.
        """
        chunks = places // CHUNK
        missing = self._flat[:, chunks].any(0)
        fenced = np.asarray(self._fenced.reshape(-1, group).all(1))[lanes // group]
        missing |= self._before.reshape(-1)[chunks] & ~fenced
        if missing.any():
            index = int(np.argmax(missing))
            offset = int(places[index]) % (self._before.shape[1] * CHUNK)
            site.report(
                ProxyError,
                "reads through the asynchronous proxy what was written without fence.proxy.async after it",
                index,
                f"byte {offset} of shared memory",
            )

    def barrier(self, ctas: Array | None) -> None:
        """Handle a barrier of these CTAs; None for all."""
        chosen = slice(None) if ctas is None else ctas
        fenced = self._fenced.reshape(-1, self._threads)
        covered = np.asarray(fenced[chosen].any(1))
        if covered.any():
            self._before[np.arange(len(self._before))[chosen][covered]] = False
            fenced[chosen] = False
        if self._touched[:, chosen].any():
            self._before[chosen] |= self._pending[:, chosen].any(0)
            self._pending[:, chosen] = False
            self._touched[:, chosen] = False
