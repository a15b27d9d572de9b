"""Latency and peak CUDA memory of a call, for benchmarks, examples and tests."""

from ..tuning.timer import synchronize
from .memory import peak_memory
from .timing import latency

__all__ = ["latency", "peak_memory", "synchronize"]
