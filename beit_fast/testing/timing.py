"""Environment, latency and peak memory, for the benchmarks, the demo and the command line: torch only."""

from __future__ import annotations

import gc
import importlib.metadata
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .._version import __version__
from .memory import idle_resident, peak_resident, why_unmeasurable


@dataclass(frozen=True)
class Timing:
    """Seconds per call: the median, the first and third quartile, and all times in the order taken."""

    median: float
    quartiles: tuple[float, float]
    times: tuple[float, ...]


def synchronize(device: torch.device | str) -> None:
    """Wait until `device` has done all the work it was given; a CPU always has."""
    device = torch.device(device)
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def latency(
    function: Callable[[], Any], device: torch.device | str = "cpu", repeats: int = 20, warmup: int = 3
) -> Timing:
    """Time `repeats` calls of `function`, one by one, after `warmup` calls that are not timed.

    On CUDA a pair of events around each call gives the time on the device; elsewhere the clock is read once
    the device is idle. Raises ValueError unless `repeats` is at least 1 and `warmup` at least 0.
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


def peak_memory(function: Callable[[], Any], device: torch.device | str = "cpu") -> int | None:
    """Bytes that one call of `function` needs at its peak, above the level before it; None where unknown.

    Call `function` once beforehand, so that libraries, compiled code and caches are not counted.
    CUDA: the peak of torch's allocator; what kernels keep in the driver is not in it.
    CPU on Linux: the growth of the process's resident set, which counts the pages that any library or thread
    touches meanwhile, good to one huge page (2 MiB). Memory reserved but never touched is not in it.
    `why_no_peak_memory` tells the reason for a None.
    """
    device = torch.device(device)
    if why_no_peak_memory(device) is not None:
        return None
    return _peak_on_cuda(function, device) if device.type == "cuda" else peak_resident(function)


def loaded_memory(device: torch.device | str = "cpu") -> int | None:
    """Bytes that this process holds between calls, libraries included; None where `peak_memory` is unknown.

    CUDA: what torch's allocator has taken from the device, memory of CUDA graphs included, after it gave back what is
    free. CPU on Linux: the resident set, after glibc gave back what is free.
    """
    device = torch.device(device)
    if why_no_peak_memory(device) is not None:
        return None
    gc.collect()
    if device.type == "cpu":
        return idle_resident()
    synchronize(device)
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved(device)


def why_no_peak_memory(device: torch.device | str = "cpu") -> str | None:
    """The reason why `peak_memory` gives None for `device`, or None where it can measure."""
    device = torch.device(device)
    if device.type == "cuda":
        return None
    if device.type == "cpu":
        return why_unmeasurable()
    return f"device type {device.type!r} has no counter of peak memory here (cuda has one, and cpu on Linux)"


def _peak_on_cuda(function: Callable[[], Any], device: torch.device) -> int:
    gc.collect()
    synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    function()
    synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def environment(device: torch.device | str | None = None) -> dict[str, Any]:
    """The conditions of a measurement on `device` (default: the current CUDA device, else the CPU), for JSON.

    Values that do not apply are None. Names no folder, user or host.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return {
        "device": device.type,
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda,
        "triton": installed_version("triton"),
        "transformers": installed_version("transformers"),
        "beit_fast": __version__,
        "commit": _commit(),
        "default_dtype": str(torch.get_default_dtype()).removeprefix("torch."),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "triton_interpret": os.environ.get("TRITON_INTERPRET") == "1",
        "gpu": _gpu_facts(device) if device.type == "cuda" else None,
    }


def _gpu_facts(device: torch.device) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(device)
    return {
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
        "cudnn": torch.backends.cudnn.version(),
        **gpu_readings(device, ("driver_version", "clocks.max.sm", "clocks.max.memory", "power.limit")),
    }


def gpu_readings(device: torch.device | str, fields: Sequence[str]) -> dict[str, str | None]:
    """What nvidia-smi says of a CUDA device, by the names of `nvidia-smi --help-query-gpu`; None where it says nothing.

    Clocks are in MHz, the power limit in watts.
    """
    return _ask_nvidia_smi(f"GPU-{torch.cuda.get_device_properties(device).uuid}", fields)


def _ask_nvidia_smi(gpu: str, fields: Sequence[str]) -> dict[str, str | None]:
    query = ",".join(fields)
    command = ["nvidia-smi", f"--id={gpu}", f"--query-gpu={query}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return dict.fromkeys(fields)
    values = [value.strip() for value in done.stdout.strip().split(",")]
    if done.returncode != 0 or len(values) != len(fields):
        return dict.fromkeys(fields)
    return {field: None if value.startswith("[") else value for field, value in zip(fields, values, strict=True)}


def installed_version(distribution: str) -> str | None:
    """The version of an installed distribution, read without importing it; None where it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def cpu_name() -> str:
    """The CPU's model name as the system gives it, or its architecture."""
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def _commit() -> str | None:
    """Short commit of the checkout that this package runs from, `-dirty` where files differ, or None."""
    root = Path(__file__).resolve().parents[2]
    if not ((root / ".git").exists() and (root / "pyproject.toml").exists()):
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
