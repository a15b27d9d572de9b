"""The order in which the warps of a CTA take turns."""

from __future__ import annotations

import dataclasses

import numpy as np

from .dtypes import Array
from .sites import LANES

LOCKSTEP, REVERSED, RANDOM, HALVES = "lockstep", "reversed", "random", "halves"
ORDERS = (LOCKSTEP, REVERSED, RANDOM, HALVES)


@dataclasses.dataclass(frozen=True)
class Schedule:
    """An order of warps.

    `lockstep` runs all warps together. `reversed` and `random` run one warp (or warpgroup, if the kernel multiplies by
    warpgroups) until it waits for others. `reversed` takes the last one that can run, and `random` draws one. `halves`
    draws half of the warps and runs these together until they wait, then the others. It draws again at each barrier, so
    any two warps are apart half of the time. It takes two to three times the CPU time of lockstep, one warp alone as
    many as there are.
    """

    order: str = LOCKSTEP
    seed: int = 0

    def __post_init__(self) -> None:
        if self.order not in ORDERS:
            raise ValueError(f"order {self.order!r} is not supported (expected {', '.join(ORDERS)})")

    def __str__(self) -> str:
        return f"{self.order} {self.seed}" if self.order in (RANDOM, HALVES) else self.order


class Turns:
    """The warps that run now, for several CTAs that run together.

    Args:
        schedule: The order.
        stream: Distinguishes the CTAs of a launch from those before and behind them.
        cta_count: Number of CTAs.
        threads: Threads of a CTA.
        group: Warps that run together.
    """

    def __init__(self, schedule: Schedule, stream: int, cta_count: int, threads: int, group: int) -> None:
        self.is_lockstep = schedule.order == LOCKSTEP
        self._is_reversed = schedule.order == REVERSED
        self._random = np.random.default_rng((schedule.seed, stream))
        self._size = group * LANES
        self._count = threads // self._size
        self._at_once = -(-self._count // 2) if schedule.order == HALVES else 1
        self._current = np.zeros((cta_count, self._count), bool)
        self._last = np.zeros(cta_count, np.int64)
        self._ends = np.ones(cta_count, bool)

    def choose(self, may_run: Array) -> Array:
        """Return which of the threads that may run do so."""
        if self.is_lockstep:
            return may_run
        ready = np.asarray(may_run.reshape(-1, self._count, self._size).any(2))  # [CTAs, turns]
        ends = self._ends | ~(ready & self._current).any(1)
        if ends.any():
            following = self._behind(ready, ends) if self._is_reversed else self._drawn(ready)
            self._current = np.where(ends[:, None], following, self._current)
            self._ends[:] = False
        return may_run & self._current.repeat(self._size, 1).reshape(-1)

    def _drawn(self, ready: Array) -> Array:
        """Return some of the turns that are ready, `[CTAs, turns]`."""
        rank = np.where(ready, self._random.random(ready.shape), 2).argsort(1).argsort(1)
        return np.asarray(ready & (rank < self._at_once))

    def _behind(self, ready: Array, ends: Array) -> Array:
        """Return the next turn below the last one. After the lowest turn, the highest one follows."""
        distance = (self._last[:, None] - 1 - np.arange(self._count)) % self._count
        self._last = np.where(ends, np.where(ready, distance, self._count).argmin(1), self._last)
        return np.asarray(np.arange(self._count) == self._last[:, None])

    def end(self, ctas: Array | None) -> None:
        """End the turns of these CTAs, or of all if None.

        A turn ends at a barrier, or because its threads wait for other warps.
        """
        self._ends[slice(None) if ctas is None else ctas] = True
