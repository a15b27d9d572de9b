"""Counts of a loop with a matrix product."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton")

from beit_fast.kernels.aot.counts.executed import Conflict, launch_counts, loop_counts, loop_of
from beit_fast.kernels.aot.executor import kernel_code
from beit_fast.kernels.aot.executor.counters import Counters
from beit_fast.kernels.aot.executor.launch import Options

from ...support.executor import THREAD, module, run_ptx

PRODUCT = (
    "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%r20,%r21,%r22,%r23}, {%r24,%r25,%r26,%r27}, {%r28,%r29}, "
)
PRODUCT += "{%r20,%r21,%r22,%r23};"
ZEROS = "".join(f"mov.b32 %r{number}, 0;" for number in range(20, 30))
BODY = (
    THREAD
    + ZEROS
    + "shl.b32 %r10, %r1, 3; add.s32 %r10, %r9, %r10; mov.b32 %r11, 0; st.shared.b32 [%r10], %r11;\n"
    + "\t.loc\t1 7 1 // kernel.py:7:1\n$loop: ld.shared.b32 %r12, [%r10]; "
    + PRODUCT
    + " bar.sync 0; add.s32 %r11, %r11, 1; setp.lt.s32 %p1, %r11, 3; @%p1 bra $loop;\n"
    + "\t.loc\t1 8 1 // kernel.py:8:1\n ld.shared.b32 %r13, [%r10];"
)


def test_loop_counts_are_those_of_an_iteration() -> None:
    """Two warps in two CTAs run three iterations; each has as many scores as two tiles of 64 x 64."""
    counters = Counters()
    launch = run_ptx(BODY, grid=(2, 1, 1), options=Options(counters=counters))
    found = loop_counts(launch, counters, scores=2 * 4096)
    # Two warps issue an instruction once for two tiles, and there are four schedulers.
    assert found.pipes["matrix"] == found.pipes["load/store"] == 2 / 2 / 4
    assert found.pipes["synchronization"] == found.pipes["control"] == 2 / 2 / 4
    assert found.pipes["integer"] == 2 * 2 / 2 / 4
    # A stride of 8 bytes takes two wavefronts instead of one.
    assert (found.wavefronts, found.ideal_wavefronts) == (2 * 2 / 2, 2 / 2)
    assert found.conflicts == [Conflict("ld.shared.b32", "kernel.py:7:1", 1.0)]
    assert (found.barriers, found.waits, found.sectors, found.l2_bytes) == (0.5, 0, 0, 0)


def test_loop_counts_copies_of_every_iteration() -> None:
    """The last of three iterations loads nothing, as in a pipelined loop."""
    storage = torch.zeros(100)
    memory = storage[-(storage.data_ptr() // 4) % 8 :]  # begins at a sector
    address = "ld.param.b64 %rd1, [p0]; mad.wide.u32 %rd2, %r1, 4, %rd1;"
    load = "setp.lt.s32 %p2, %r11, 2; @%p2 ld.global.b32 %r14, [%rd2];"
    body = BODY.replace("\t.loc\t1 7", f"{address}\n\t.loc\t1 7").replace("$loop:", f"$loop: {load}")
    counters = Counters()
    launch = run_ptx(body, [memory], options=Options(counters=counters))
    found = loop_counts(launch, counters, scores=4096)
    assert found.sectors == found.ideal_sectors == 2 * 4
    assert found.l2_bytes == 2 * 32 * 4


def test_launch_counts_include_what_is_outside_the_loop() -> None:
    counters = Counters()
    run_ptx(BODY, options=Options(counters=counters))
    found = launch_counts("kernel", counters)
    assert (found.wavefronts, found.ideal_wavefronts) == (2 * 2 * 5, 2 * 5)
    first, *_ = found.conflicts
    assert first == Conflict("ld.shared.b32", "kernel.py:7:1", 6.0)
    assert launch_counts("another", counters) == (0, 0, 0, 0, [])


def test_loop_of_a_kernel_without_products_raises() -> None:
    body = "mov.b32 %r2, 0; $loop: add.s32 %r2, %r2, 1; setp.lt.s32 %p2, %r2, 3; @%p2 bra $loop;"
    with pytest.raises(ValueError, match="kernel has no loop with a matrix product"):
        loop_of(kernel_code.load(module(body)))
