"""Latency and peak CUDA memory of a call.

Benchmarks, examples and tests use this folder; the package does not.
"""

from ..tuning.timer import synchronize
from .memory import peak_memory
from .timing import latency

__all__ = ["latency", "peak_memory", "synchronize"]
