"""Two clocks: wall time from idle to idle on a CPU, and device time on CUDA. pytest-benchmark takes them as timers."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch

Step = Callable[[], object]

HEAD_START = 1.5  # times the seconds that the host needs to queue a round
HEAD_START_MARGIN = 5e-5  # seconds added to it
LONGEST_HEAD_START = 0.05  # seconds
SPIN_RATE = 2e9  # cycles a second, about the highest clock of today's GPUs


class Clock(Protocol):
    """A timer whose readings begin and end a round of calls."""

    def __call__(self) -> float: ...

    def plan(self, step: Step) -> tuple[int, int]:
        """Return calls per round, and rounds."""


def synchronize(device: torch.device | str) -> None:
    """Wait until `device` has finished its queued work; a no-op on the CPU."""
    device = torch.device(device)
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


class HostClock:
    """Wall time in seconds, read after the device has finished: from idle to idle."""

    __name__ = "HostClock"  # pytest-benchmark writes the name of its timer
    meaning = "idle to idle"
    queued_ahead: bool | None = None  # measured by a DeviceClock only

    def __init__(self, device: torch.device | str) -> None:
        self.device = device

    def __call__(self) -> float:
        synchronize(self.device)
        return time.perf_counter()

    def plan(self, step: Step) -> tuple[int, int]:
        """Return calls per round and rounds: at least 1 ms a round, 5 to 50 rounds in about 0.4 s."""
        once = _once(self, step)
        iterations = _clamp(math.ceil(1e-3 / once), 1, 1000)
        return iterations, _clamp(int(0.4 / (once * iterations)), 5, 50)


class DeviceClock:
    """Device time in seconds between the two readings of a round.

    The first reading makes the device spin while the host queues the whole round, so that the time excludes launches.
    This fails for a step that waits for the device, or that launches more kernels than the queue holds.
    """

    __name__ = "DeviceClock"
    meaning = "device time"

    def __init__(self, device: torch.device | str) -> None:
        self.device = device
        self.head_start = 0.0
        self._begin: torch.cuda.Event | None = None
        self._rounds = self._late = 0

    @property
    def queued_ahead(self) -> bool:
        """Whether the host was ahead in three of four rounds since `plan`: the median is device time alone."""
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
        """Return calls per round and rounds: about 0.15 s in 10 to 30 rounds of 0.5 ms or 16 calls."""
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


def clock_of(device: torch.device | str) -> HostClock | DeviceClock:
    """Return a new clock for one measurement; a DeviceClock holds the state of its round."""
    return DeviceClock(device) if torch.device(device).type == "cuda" else HostClock(device)


def single_call(step: Step, device: torch.device | str, repeats: int = 7) -> float:
    """Return the median seconds of one call from idle to idle. Launches are included."""
    clock = HostClock(device)
    return statistics.median(_once(clock, step) for _ in range(repeats))


def interleaved_medians(steps: Mapping[str, Step], clock: Clock, rounds: int) -> dict[str, float]:
    """Return the median seconds of a call of each step; see `interleaved_times`."""
    return {name: statistics.median(times) for name, times in interleaved_times(steps, clock, rounds).items()}


def interleaved_times(
    steps: Mapping[str, Step],
    clock: Clock,
    rounds: int,
    scope: Callable[[str], AbstractContextManager[None]] = lambda name: nullcontext(),
) -> dict[str, list[float]]:
    """Time several steps in turns.

    A change of the GPU's clock then reaches all of them.

    Args:
        steps: Functions by name, already called once.
        clock: The timer; it plans the calls of a round by the first step.
        rounds: Rounds of each step.
        scope: Returns the context in which a step is timed, by name.
    """
    first = next(iter(steps))
    with scope(first):
        calls, _ = clock.plan(steps[first])
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            with scope(name):
                begin = clock()
                for _ in range(calls):
                    step()
                times[name].append((clock() - begin) / calls)
    return times


def _once(clock: Callable[[], float], step: Step) -> float:
    started = clock()
    step()
    return clock() - started


def _clamp(value: int, least: int, most: int) -> int:
    return max(least, min(most, value))
