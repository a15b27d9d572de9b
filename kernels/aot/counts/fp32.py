"""Wavefronts of shared memory of kernels with fp32 products, in both precisions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from ....tuning.selftest import fp32_precision
from ..attention_variants import PRODUCTS
from ..verify.sources import kernel_name
from .executed import LaunchCounts, launch_counts
from .measure import count_attention, count_linear_gelu, execute

PRECISIONS = ("tf32", "ieee")
LANES = 64
"""Multiply-adds of an SM in a cycle on compute capability 8.0, which has the fewest."""


class Fp32Row(NamedTuple):
    """A whole launch of a kernel with fp32 products."""

    kernel: str
    capability: int
    precision: str
    counts: LaunchCounts
    multiply_adds: int  # of each lane, by all warps

    @property
    def multiply_add_cycles(self) -> float:
        """Least cycles of an SM of compute capability 8.0. Shared memory takes a cycle for each wavefront."""
        return self.multiply_adds * 32 / LANES


def fp32_rows(capability: int) -> Iterator[Fp32Row]:
    """Yield the kernels with products, launched with the shapes of `measure`."""
    for precision in PRECISIONS:
        for launch_all in (count_attention, count_linear_gelu):
            with fp32_precision(precision):
                counters, launches = execute(capability, lambda: launch_all(torch.float32))  # noqa: B023
            for launch in launches:
                name = kernel_name(launch.kernel)
                if name in PRODUCTS or name == "linear_gelu":
                    counts = launch_counts(launch.kernel, counters)
                    executed = launch.instructions()
                    multiply_adds = executed["fma.rn.f32"] + 2 * executed["fma.rn.f32x2"]
                    yield Fp32Row(name, capability, precision, counts, multiply_adds)
