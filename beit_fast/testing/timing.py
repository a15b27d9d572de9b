"""Latency of a call on a device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Timing:
    """Seconds per call: the median, the first and third quartile, and all times in order of measurement."""

    median: float
    quartiles: tuple[float, float]
    times: tuple[float, ...]


def synchronize(device: torch.device | str) -> None:
    """Wait until `device` has finished its queued work; a no-op on the CPU."""
    device = torch.device(device)
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def latency(
    function: Callable[[], Any], device: torch.device | str = "cpu", repeats: int = 20, warmup: int = 3
) -> Timing:
    """Time `repeats` calls of `function`, one by one.

    On CUDA a pair of events around each call measures the time on the device. On other devices the clock is read when
    the device is idle.

    Args:
        function: The call to time.
        device: The device that `function` runs on.
        repeats: The number of timed calls.
        warmup: The number of calls before that are not timed.

    Raises:
        ValueError: If `repeats` is less than 1 or `warmup` is negative.
    """
    if repeats < 1 or warmup < 0:
        raise ValueError(f"latency needs repeats >= 1 and warmup >= 0, got repeats={repeats}, warmup={warmup}")
    device = torch.device(device)
    for _ in range(warmup):
        function()
    synchronize(device)
    time_one = _time_on_cuda if device.type == "cuda" else _time_by_clock
    times = tuple(time_one(function, device) for _ in range(repeats))
    return Timing(statistics.median(times), _quartiles(times), times)


def _time_by_clock(function: Callable[[], Any], device: torch.device) -> float:
    start = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - start


def _time_on_cuda(function: Callable[[], Any], device: torch.device) -> float:
    with torch.cuda.device(device):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        end.synchronize()
    return start.elapsed_time(end) / 1e3


def _quartiles(times: tuple[float, ...]) -> tuple[float, float]:
    if len(times) == 1:
        return times[0], times[0]
    first, _, third = statistics.quantiles(times, n=4, method="inclusive")
    return first, third
