"""Run a kernel for a whole grid."""

from __future__ import annotations

import dataclasses
import math
import time
from collections import Counter
from typing import NamedTuple

import numpy as np

from .counters import Counters
from .dtypes import Array
from .errors import Hazard
from .global_memory import GlobalMemory
from .kernel_code import Code
from .machine import Machine
from .schedule import Schedule
from .sites import LANES, Layout

LANES_TOGETHER = 4096
"""Threads of CTAs that run together."""


class Options(NamedTuple):
    """How kernels are executed.

    Args:
        schedule: The order of warps.
        collect: Count hazards and continue, instead of raising the first fault.
        counters: Collects accesses to memory; None to save the time.
        lanes_together: Number of threads of CTAs that run together.
    """

    schedule: Schedule = Schedule()
    collect: bool = False
    counters: Counters | None = None
    lanes_together: int = LANES_TOGETHER


@dataclasses.dataclass
class Launch:
    """The record of one launch."""

    kernel: str
    grid: tuple[int, int, int]
    code: Code
    seconds: float  # of CPU time
    executed: Counter[int]  # warps by basic block
    hazards: Counter[Hazard]  # empty unless they are collected
    notes: Counter[Hazard]  # what PTX leaves to ptxas, and reads of undefined values

    def instructions(self) -> Counter[str]:
        """Count how often a warp executed each instruction, by name."""
        counts: Counter[str] = Counter()
        for number, warps in self.executed.items():
            block = self.code.blocks[number]
            for instruction in self.code.instructions[block.first : block.last + 1]:
                counts[instruction.name] += warps
        return counts

    def source_lines(self) -> Counter[str]:
        """Count how often a warp executed an instruction of each source line."""
        counts: Counter[str] = Counter()
        for number, warps in self.executed.items():
            block = self.code.blocks[number]
            for instruction in self.code.instructions[block.first : block.last + 1]:
                counts[instruction.source] += warps
        return counts


def run(
    code: Code,
    memory: GlobalMemory,
    parameters: Array,
    grid: tuple[int, int, int],
    block: tuple[int, int, int],
    dynamic_shared: int,
    options: Options = Options(),  # noqa: B008  immutable
) -> Launch:
    """Execute a kernel.

    Args:
        code: The kernel.
        memory: Holds the arguments.
        parameters: The block of parameters as bytes, see `code.parameter_offsets`.
        grid: CTAs by axis.
        block: Threads of a CTA by axis.
        dynamic_shared: Bytes of shared memory besides the variables of fixed size.
        options: How to execute it.

    Raises:
        KernelError: If the kernel does what PTX does not allow.
        UnsupportedInstructionError: If it has an instruction that is not known.
    """
    threads = math.prod(block)
    _check_block(code, block, threads)
    memory.share_extents()
    memory.observer = options.counters
    start = time.process_time()
    count, at_once = math.prod(grid), max(1, options.lanes_together // threads)
    executed: Counter[int] = Counter()
    notes: Counter[Hazard] = Counter()
    hazards: Counter[Hazard] = Counter()
    for first in range(0, count, at_once):
        layout = Layout(np.arange(first, min(count, first + at_once)), block, grid)
        collected = hazards if options.collect else None
        machine = Machine(code, layout, memory, parameters, dynamic_shared, options.schedule, collected)
        machine.shared.observer = options.counters
        machine.run()
        executed.update(machine.executed)
        notes.update(machine.reporter.notes)
    seconds = time.process_time() - start
    launch = Launch(code.function.name, grid, code, seconds, executed, hazards, notes)
    if options.counters is not None:
        options.counters.count_launch(launch)
    return launch


def _check_block(code: Code, block: tuple[int, int, int], threads: int) -> None:
    required, maximum = code.function.required_threads, code.function.maximum_threads
    if required is not None and math.prod(required) != threads:
        raise ValueError(f"{code.function.name} is launched with {block} threads (expected {required})")
    if maximum is not None and math.prod(maximum) < threads:
        raise ValueError(f"{code.function.name} is launched with {block} threads (expected at most {maximum})")
    if threads % (LANES * code.group):
        raise NotImplementedError(f"{threads} threads are not a multiple of {LANES * code.group}")
