"""Latency and peak CUDA memory of a call, for benchmarks, examples and tests."""

from .memory import peak_memory
from .timing import latency, synchronize

__all__ = ["latency", "peak_memory", "synchronize"]
