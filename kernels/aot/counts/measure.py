"""Launch every kernel of a GPU in the executor, and count."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import NamedTuple
from unittest import mock

import torch

from ...attention import launch as attention
from ...common import gpu
from ...linear_gelu import configs as linear_configs
from ...linear_gelu import launch as linear_gelu
from ...residual_norm import launch as residual_norm
from .. import attention_variants, linear_gelu_variants, sass
from ..attention_variants import PRODUCTS, Variant
from ..compile import Compiled, compile_variant
from ..executor.counters import Counters
from ..executor.launch import Launch, Options
from ..executor.launchers import on_gpu
from ..linear_gelu_variants import LinearVariant
from ..verify.sources import kernel_name, source_hash
from .executed import LaunchCounts, LoopCounts, launch_counts, loop_counts
from .schedule import LoopCycles, loop_cycles, main_loop

WINDOW = (16, 16)
"""256 patches, which every tile divides: there are no ragged steps."""
SAMPLES = 2
HEAD_DIM = 64
DTYPE = torch.bfloat16
LINEAR_ROWS = LINEAR_OUTPUTS = 128
LINEAR_INPUTS = 384
NORM_ROWS = (2, 32)
NORM_SIZE = 768

SM_REGISTERS = 65536
SM_SHARED = {80: 164, 86: 100, 89: 100, 90: 228, 100: 228, 120: 100}
"""KiB of shared memory of an SM, by compute capability."""
SM_WARPS = {80: 64, 86: 48, 89: 48, 90: 64, 100: 64, 120: 48}
PROGRAM_SHARED = 1024
"""Bytes of shared memory that the system takes for each program."""


class MachineCounts(NamedTuple):
    """What the machine code of a main loop says."""

    registers: int
    shared: int  # bytes of a program
    programs: int  # that fit an SM
    cycles: LoopCycles  # of an iteration of one warp
    pipes: dict[str, float]  # least cycles of an SM for 64 x 64 scores, by pipe
    tiles: float  # of 64 x 64 scores in an iteration

    def bound(self, programs: int) -> float:
        """Return the least cycles of an SM for 64 x 64 scores."""
        return max(*self.pipes.values(), self.cycles.total / self.tiles / programs)


class LoopRow(NamedTuple):
    """A kernel with a main loop."""

    kernel: str
    capability: int
    tile: tuple[int, ...]
    executed: LoopCounts
    machine: MachineCounts


class LaunchRow(NamedTuple):
    """A whole launch of a kernel."""

    kernel: str
    capability: int
    counts: LaunchCounts

    @property
    def source(self) -> str:
        """The hash of the source that was counted."""
        return source_hash(self.kernel)


def measure(capability: int) -> tuple[list[LoopRow], list[LaunchRow]]:
    """Count all kernels of a GPU: bf16, heads of 64, the bias of an even window."""
    loops, launches = [], []
    for launch_all in (count_attention, count_linear_gelu, _residual_norm):
        counters, records = execute(capability, launch_all)
        # A kernel without a main loop may be launched several times; its counts are the sum.
        for record in {record.kernel: record for record in records}.values():
            name = kernel_name(record.kernel)
            launches.append(LaunchRow(name, capability, launch_counts(record.kernel, counters)))
            if name in PRODUCTS or name == "linear_gelu":
                if sum(record.kernel == one.kernel for one in records) != 1:
                    raise ValueError(f"{name} was launched several times, and its loop cannot be counted")
                loops.append(_loop_row(name, capability, record, counters))
    return loops, launches


def execute(capability: int, launch_all: Callable[[], None]) -> tuple[Counters, list[Launch]]:
    """Run launches in the executor; return their counts and records."""
    counters = Counters()
    # Hazards are counted elsewhere, and do not change what is counted here.
    options = Options(counters=counters, collect=True)
    with on_gpu(capability, 1, options) as driver:
        launch_all()
    return counters, driver.launches


def count_attention(dtype: torch.dtype = DTYPE) -> None:
    """Launch forward and backward of attention."""
    tokens = WINDOW[0] * WINDOW[1] + 1
    table = torch.randn((2 * WINDOW[0] - 1) * (2 * WINDOW[1] - 1) + 3, 1)
    q, k, v, grad_out = torch.randn(4, SAMPLES, tokens, 1, HEAD_DIM).to(dtype)
    numbers = HEAD_DIM**-0.5, 0.0, 0
    out, lse = attention.attention_forward(q, k, v, table, None, WINDOW, *numbers)
    attention.attention_backward(grad_out, q, k, v, table, None, out, lse, WINDOW, *numbers, (True, True, True, True))


def count_linear_gelu(dtype: torch.dtype = DTYPE) -> None:
    """Launch the linear layer with GELU."""
    x = torch.randn(LINEAR_ROWS, LINEAR_INPUTS).to(dtype)
    weight, bias = torch.randn(LINEAR_OUTPUTS, LINEAR_INPUTS).to(dtype), torch.randn(LINEAR_OUTPUTS).to(dtype)
    # Choose the tile for many rows, without the time that they take.
    with mock.patch.dict(linear_configs.LARGEST_ROWS, clear=True):
        linear_gelu.linear_gelu(x, weight, bias)


def _residual_norm() -> None:
    shape = (*NORM_ROWS, NORM_SIZE)
    residual, branch, grad_sum, grad_normalized = torch.randn(4, *shape).to(DTYPE)
    scale, weight, bias = torch.randn(3, NORM_SIZE).to(DTYPE)
    total, normalized, grad_residual, grad_branch = torch.empty(4, *shape, dtype=DTYPE)
    grad_scale, grad_weight, grad_bias = torch.empty(3, NORM_SIZE, dtype=DTYPE)
    mean, rstd = torch.empty(2, *NORM_ROWS)
    residual_norm.fill_forward(residual, branch, scale, None, weight, bias, 1e-12, total, normalized, mean, rstd)
    residual_norm.fill_backward(
        grad_sum, grad_normalized, total, branch, scale, None, weight, mean, rstd,
        [grad_residual, grad_branch, grad_scale, grad_weight, grad_bias],
    )  # fmt: skip


def _loop_row(name: str, capability: int, launch: Launch, counters: Counters) -> LoopRow:
    variant: Variant | LinearVariant
    if name == "linear_gelu":
        architecture = gpu.architecture_class(*divmod(capability, 10))
        variant = LinearVariant(capability, linear_configs.TILES["half", architecture][-1])
        work = linear_gelu_variants.work(variant)
    else:
        layout = attention_variants.bias_layouts(capability, "bf16")[0]
        variant = attention_variants.shipped(Variant(name, capability, head_dim=HEAD_DIM, bias_layout=layout))
        work = attention_variants.work(variant)
    assert variant.tile is not None
    executed = loop_counts(launch, counters, work.scores)
    return LoopRow(name, capability, tuple(variant.tile), executed, machine_counts(compile_variant(variant), work))


def machine_counts(compiled: Compiled, work: sass.Work) -> MachineCounts:
    """Read the machine code.

    Args:
        compiled: A kernel with a main loop.
        work: The work of an iteration.
    """
    registers = sass.resources(compiled.cubin).registers
    body = main_loop(sass.disassemble(compiled.cubin, "-hex"))
    wgmma_cycles = 64 * 64 * 16 / sass.RATES[work.capability].matrix
    return MachineCounts(
        registers=registers,
        shared=compiled.shared,
        programs=programs_per_sm(work.capability, registers, compiled.shared, work.warps),
        cycles=loop_cycles(body, wgmma_cycles),
        pipes=sass.cycles_by_pipe(Counter(instruction.name for instruction in body), work),
        tiles=work.scores / 4096,
    )


def programs_per_sm(capability: int, registers: int, shared: int, warps: int) -> int:
    """Return how many programs fit an SM. Registers are allocated to warps in steps of 256."""
    by_registers = SM_REGISTERS // (-(-registers // 8) * 8 * 32 * warps)
    by_shared = SM_SHARED[capability] * 1024 // (shared + PROGRAM_SHARED)
    return min(by_registers, by_shared, SM_WARPS[capability] // warps)
