"""Latency of a call on a device."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.benchmark import Measurement
from torch.utils.benchmark.utils.common import TaskSpec

from ..tuning.timer import synchronize


def latency(
    function: Callable[[], Any], device: torch.device | str = "cpu", repeats: int = 20, warmup: int = 3
) -> Measurement:
    """Time `repeats` calls of `function` one by one.

    The device is idle before and after each call.

    Args:
        function: The call to time.
        device: The device that `function` runs on.
        repeats: The number of timed calls.
        warmup: The number of calls before that are not timed.

    Returns:
        The seconds of each call, as `torch.utils.benchmark.Timer` returns them.

    Raises:
        ValueError: If `repeats` is less than 1 or `warmup` is negative.
    """
    if repeats < 1 or warmup < 0:
        raise ValueError(f"latency needs repeats >= 1 and warmup >= 0, got repeats={repeats}, warmup={warmup}")
    # Timer cannot time single calls: timeit(1) adds two calls of warm-up to each, blocked_autorange takes their mean.
    for _ in range(warmup):
        function()
    synchronize(device)
    times = [_time_one(function, device) for _ in range(repeats)]
    return Measurement(1, times, TaskSpec("function()", setup="pass", num_threads=torch.get_num_threads()))


def _time_one(function: Callable[[], Any], device: torch.device | str) -> float:
    start = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - start
