"""Peak memory of a call on a CUDA device."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch

from ..tuning.timer import synchronize


def peak_memory(function: Callable[[], Any], device: torch.device | str = "cuda") -> int:
    """Measure the peak of torch's allocator during one call.

    Call `function` once before, so that libraries, compiled code and caches are not counted. Memory that the driver
    holds is not counted either.

    Args:
        function: The call to measure.
        device: The CUDA device that `function` runs on.

    Returns:
        Bytes above the level before the call.

    Raises:
        ValueError: If `device` is not a CUDA device.
    """
    device = torch.device(device)
    if device.type != "cuda":
        raise ValueError(f"peak memory on device type {device.type!r} is not supported (expected cuda)")
    gc.collect()
    synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    function()
    synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before
