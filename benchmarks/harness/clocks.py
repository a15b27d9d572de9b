"""Two clocks for pytest-benchmark: idle to idle on a CPU, and the device's own time on CUDA."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable

import torch

from beit_fast.testing.timing import synchronize

Step = Callable[[], object]

HEAD_START = 1.5  # times what the host needs to queue a round, and
HEAD_START_MARGIN = 5e-5  # seconds
LONGEST_HEAD_START = 0.05  # seconds
SPIN_RATE = 2e9  # cycles a second, about the highest clock of today's GPUs


class HostClock:
    """Seconds, read once the device has done its work: a round is timed from idle to idle."""

    __name__ = "HostClock"  # pytest-benchmark writes the name of its timer
    meaning = "idle to idle"
    queued_ahead: bool | None = None  # only a DeviceClock knows

    def __init__(self, device: str) -> None:
        self.device = device

    def __call__(self) -> float:
        synchronize(self.device)
        return time.perf_counter()

    def plan(self, step: Step) -> tuple[int, int]:
        """Calls a round and rounds: a millisecond a round at least, 5 to 50 rounds in about 0.4 seconds."""
        once = _once(self, step)
        iterations = _clamp(math.ceil(1e-3 / once), 1, 1000)
        return iterations, _clamp(int(0.4 / (once * iterations)), 5, 50)


class DeviceClock:
    """Seconds on the device, between the two readings of a round.

    The first reading lets the device spin for a while, so that the host has queued the whole round before the device
    begins with it, and what launching costs the host is not in the time. That cannot hold for a step that waits for the
    device, or that launches more than a queue holds.
    """

    __name__ = "DeviceClock"
    meaning = "device time"

    def __init__(self, device: str) -> None:
        self.device = device
        self.head_start = 0.0
        self._begin: torch.cuda.Event | None = None
        self._rounds = self._late = 0

    @property
    def queued_ahead(self) -> bool:
        """Whether the host was ahead in three rounds of four since `plan`, so that the median is the device's alone."""
        return 4 * self._late <= self._rounds

    def __call__(self) -> float:
        if self._begin is None:
            synchronize(self.device)
            if self.head_start > 0:
                torch.cuda._sleep(int(min(self.head_start, LONGEST_HEAD_START) * SPIN_RATE))
            self._begin = self._record()
            return 0.0
        begin, self._begin = self._begin, None
        end = self._record()
        self._rounds += 1
        self._late += begin.query()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    def plan(self, step: Step) -> tuple[int, int]:
        """Calls a round and rounds: half a millisecond a round or 16 calls, 10 to 30 rounds in about 0.15 seconds."""
        queueing = HEAD_START * min(self._queueing(step) for _ in range(3))
        self.head_start = queueing + HEAD_START_MARGIN
        once = _once(self, step)
        iterations = _clamp(math.ceil(5e-4 / once), 1, 16)
        self.head_start = queueing * iterations + HEAD_START_MARGIN
        self._rounds = self._late = 0
        return iterations, _clamp(int(0.15 / (iterations * (once + queueing))), 10, 30)

    def _queueing(self, step: Step) -> float:
        synchronize(self.device)
        started = time.perf_counter()
        step()
        return time.perf_counter() - started

    def _record(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event


def clock_of(device: str) -> HostClock | DeviceClock:
    """A clock of its own for each test: a DeviceClock holds the round that it is in."""
    return DeviceClock(device) if device == "cuda" else HostClock(device)


def single_call(step: Step, device: str, repeats: int = 7) -> float:
    """Seconds of one call from idle to idle, the host's part included: the median of `repeats`."""
    clock = HostClock(device)
    return statistics.median(_once(clock, step) for _ in range(repeats))


def _once(clock: Callable[[], float], step: Step) -> float:
    started = clock()
    step()
    return clock() - started


def _clamp(value: int, least: int, most: int) -> int:
    return max(least, min(most, value))
