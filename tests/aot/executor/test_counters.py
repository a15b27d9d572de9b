"""Counts of instructions, shared-memory wavefronts and global sectors."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from beit_fast.kernels.aot.executor.counters import Counters, GlobalCount, SharedCount, pipe_of
from beit_fast.kernels.aot.executor.launch import Launch, Options
from beit_fast.kernels.aot.executor.parser import parse

from ...support.executor import THREAD, module, run_ptx


def count(body: str, arguments: list[torch.Tensor] | None = None, **options: int) -> tuple[Counters, Launch]:
    counters = Counters()
    launch = run_ptx(body, arguments or [], shared=8192, options=Options(counters=counters), **options)
    return counters, launch


def shared(body: str) -> SharedCount:
    (found,) = count(THREAD + body, threads=32)[0].shared.values()
    return found


@pytest.mark.parametrize(
    ("stride", "wavefronts"), [(4, 1), (8, 2), (16, 4), (128, 32), (0, 1), (12, 1), (132, 1), (64, 16)]
)
def test_shared_words_at_a_stride(stride: int, wavefronts: int) -> None:
    found = shared(f"mad.lo.s32 %r4, %r1, {stride}, %r9; ld.shared.b32 %r5, [%r4];")
    assert (found.requests, found.wavefronts, found.ideal, found.bytes) == (1, wavefronts, 1, 128)
    assert found.conflicts == wavefronts - 1


@pytest.mark.parametrize(
    ("load", "size", "stride", "wavefronts"),
    [
        ("v4.b32 {%r4,%r5,%r6,%r7}", 16, 16, 4),
        ("v4.b32 {%r4,%r5,%r6,%r7}", 16, 32, 8),
        ("v4.b32 {%r4,%r5,%r6,%r7}", 16, 144, 4),
        ("v4.b32 {%r4,%r5,%r6,%r7}", 16, 128, 32),
        ("v2.b32 {%r4,%r5}", 8, 8, 2),
        ("v2.b32 {%r4,%r5}", 8, 16, 4),
        ("u16 %rs1", 2, 2, 1),
    ],
)
def test_shared_vectors_at_a_stride(load: str, size: int, stride: int, wavefronts: int) -> None:
    found = shared(f"mad.lo.s32 %r10, %r1, {stride}, %r9; ld.shared.{load}, [%r10];")
    assert found.wavefronts == wavefronts
    assert found.ideal == max(1, size // 4)


@pytest.mark.parametrize(("stride", "wavefronts"), [(16, 4), (128, 32), (144, 4), (64, 16)])
def test_rows_of_ldmatrix_at_a_stride(stride: int, wavefronts: int) -> None:
    body = f"mad.lo.s32 %r10, %r1, {stride}, %r9;"
    found = shared(body + "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r4,%r5,%r6,%r7}, [%r10];")
    assert (found.wavefronts, found.ideal, found.bytes) == (wavefronts, 4, 512)


@pytest.mark.parametrize(("stride", "sectors", "ideal"), [(4, 4, 4), (8, 8, 4), (32, 32, 4), (0, 1, 1)])
def test_global_words_at_a_stride(stride: int, sectors: int, ideal: int) -> None:
    body = f"ld.param.b64 %rd1, [p0]; mov.u32 %r1, %tid.x; mad.wide.u32 %rd2, %r1, {stride}, %rd1;"
    storage = torch.zeros(800)
    memory = storage[-(storage.data_ptr() // 4) % 8 :]  # begins at a sector
    counters, _ = count(body + "ld.global.b32 %r2, [%rd2];", [memory], threads=64)
    (found,) = counters.global_memory.values()
    assert found == GlobalCount(requests=2, sectors=2 * sectors, ideal=2 * ideal, bytes=256)


def test_instructions_are_counted_by_warp_pipe_and_source_line() -> None:
    body = (
        "\n\t.loc\t1 3 1 // kernel.py:3:1\nmov.u32 %r1, %tid.x; setp.lt.u32 %p1, %r1, 32; mov.b32 %r2, 0;\n"
        "$loop:\n\t.loc\t1 4 1 // kernel.py:4:1\n add.s32 %r2, %r2, 1; setp.lt.s32 %p2, %r2, 3; @%p2 bra $loop;\n"
        "\t.loc\t1 5 1 // kernel.py:5:1\n @%p1 bra $out; ex2.approx.f32 %r3, %r2; $out: bar.sync 0;"
    )
    counters, launch = count(body, grid=(2, 1, 1))
    assert launch.instructions()["add.s32"] == 2 * 2 * 3
    assert counters.names["kernel"] == launch.instructions()
    assert counters.pipes["kernel"]["special function"] == 2  # one warp of each CTA
    assert counters.pipes["kernel"]["synchronization"] == 4
    assert counters.sources["kernel"]["kernel.py:4:1", "integer"] == 2 * 2 * 3 * 2
    lines: Counter[str] = Counter()
    for (source, _), number in counters.sources["kernel"].items():
        lines[source] += number
    assert lines == launch.source_lines()


@pytest.mark.parametrize(
    ("statement", "pipe"),
    [
        ("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%r1}, {%r1}, {%r1}, {%r1};", "matrix"),
        ("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r1}, [%r2];", "load/store"),
        ("cp.async.wait_group 0;", "synchronization"),
        ("cp.async.cg.shared.global [%r1], [%rd1], 16;", "load/store"),
        ("fma.rn.f32 %r1, %r2, %r3, %r4;", "float"),
        ("mad.lo.s32 %r1, %r2, %r3, %r4;", "integer"),
        ("cvt.rn.bf16x2.f32 %r1, %r2, %r3;", "conversion"),
        ("rsqrt.approx.f32 %r1, %r2;", "special function"),
        ("tcgen05.wait::ld.sync.aligned;", "synchronization"),
    ],
)
def test_pipe_of_instruction(statement: str, pipe: str) -> None:
    assert pipe_of(parse(module(statement)).kernel.instructions[0]) == pipe
