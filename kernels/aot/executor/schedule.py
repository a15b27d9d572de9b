"""The order in which the warps of a CTA take turns."""

from __future__ import annotations

import dataclasses

import numpy as np

from .dtypes import Array
from .sites import LANES

LOCKSTEP, REVERSED, RANDOM = "lockstep", "reversed", "random"


@dataclasses.dataclass(frozen=True)
class Schedule:
    """An order of warps.

    `lockstep` runs all warps together. The other orders run one warp (or warpgroup, if the kernel multiplies by
    warpgroups) until it waits for others: `reversed` takes the last one that can run, `random` draws one.
    """

    order: str = LOCKSTEP
    seed: int = 0

    def __post_init__(self) -> None:
        if self.order not in (LOCKSTEP, REVERSED, RANDOM):
            raise ValueError(f"order {self.order!r} is not supported (expected lockstep, reversed or random)")

    def __str__(self) -> str:
        return f"random {self.seed}" if self.order == RANDOM else self.order


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
        self._current = np.zeros(cta_count, np.int64)
        self._gives_way = np.ones(cta_count, bool)

    def choose(self, may_run: Array) -> Array:
        """Return which of the threads that may run do so."""
        if self.is_lockstep:
            return may_run
        by_turn = may_run.reshape(len(self._current), self._count, self._size)
        ready = np.asarray(by_turn.any(2))  # [CTAs, turns]
        stays = ready[np.arange(len(ready)), self._current] & ~self._gives_way
        self._current = np.where(stays, self._current, self._next(ready))
        self._gives_way[:] = False
        chosen = (np.arange(self._count) == self._current[:, None]).repeat(self._size, 1)
        return may_run & chosen.reshape(-1)

    def _next(self, ready: Array) -> Array:
        if not self._is_reversed:
            return np.asarray(np.where(ready, self._random.random(ready.shape), -1).argmax(1))
        # The next one below the current turn, then from the last one on.
        distance = (self._current[:, None] - 1 - np.arange(self._count)) % self._count
        return np.asarray(np.where(ready, distance, self._count).argmin(1))

    def give_way(self, ctas: Array) -> None:
        """End the turns of these CTAs: their threads wait for another warp."""
        self._gives_way[ctas] = True
