"""Timing, memory and conditions of measurements, for benchmarks, examples and tests."""

from ..cli.collect_env import environment, installed_version
from .memory import loaded_memory, memory_unsupported_reason, peak_memory
from .timing import latency, synchronize

__all__ = [
    "environment",
    "installed_version",
    "latency",
    "loaded_memory",
    "memory_unsupported_reason",
    "peak_memory",
    "synchronize",
]
