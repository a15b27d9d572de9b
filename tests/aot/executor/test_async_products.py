"""wgmma and tcgen05: waits, proxy fences, tensor memory and mbarriers, by small kernels."""

from __future__ import annotations

from typing import Any

import pytest

from beit_fast.kernels.aot.executor.errors import (
    AccessError,
    BarrierError,
    PipelineError,
    ProxyError,
    RaceError,
    UnsupportedInstructionError,
)
from beit_fast.kernels.aot.executor.launch import Options
from beit_fast.kernels.aot.executor.schedule import LOCKSTEP, RANDOM, REVERSED, Schedule

from ...support.executor import THREAD, run_ptx, stored

SCHEDULES = [Schedule(LOCKSTEP), Schedule(REVERSED), Schedule(RANDOM, 1)]
each_schedule = pytest.mark.parametrize("schedule", SCHEDULES, ids=str)


def descriptor(chunks: int) -> int:
    """Describe an operand along K without a swizzle: chunks so far apart, eight rows of 16 bytes together."""
    return chunks >> 4 << 16 | 128 >> 4 << 32


VERSION = 1 << 46
"""Bit of matrix descriptors of tcgen05."""
SHAPE = 1 << 4 | 1 << 7 | 1 << 10 | 8 // 8 << 17 | 128 // 16 << 24
"""Instruction descriptor: fp32 sums of bf16, 128 x 8."""

WGMMA = (
    THREAD + "setp.lt.u32 %p1, %r1, 64; mov.b32 %r4, 0x3F803F80; @%p1 st.shared.b32 [%r3], %r4;"  # B: ones in bf16
    "fence.proxy.async.shared::cta; bar.sync 0;"
    f"shr.u32 %r4, %r9, 4; cvt.u64.u32 %rd3, %r4; or.b64 %rd3, %rd3, {descriptor(128)};"
    "mov.b32 %r10, 0x3F803F80; mov.b32 %r11, %r10; mov.b32 %r12, %r10; mov.b32 %r13, %r10;"  # A: ones
    "mov.b32 %r20, 0; mov.b32 %r21, 0; mov.b32 %r22, 0; mov.b32 %r23, 0;"
    "wgmma.fence.sync.aligned;"
    "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16"
    " {%r20,%r21,%r22,%r23}, {%r10,%r11,%r12,%r13}, %rd3, 1, 1, 1, 0;"
    "wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0; cvt.rzi.s32.f32 %r8, %r23;"
)
"""Sums of 16 products of ones, in a warpgroup."""


def run_wgmma(body: str, schedule: Schedule = SCHEDULES[0], threads: int = 128) -> list[int]:
    return stored(body, threads=threads, target="sm_90a", options=Options(schedule))


@each_schedule
@pytest.mark.parametrize("threads", [128, 256])
def test_wgmma_adds_products(schedule: Schedule, threads: int) -> None:
    assert set(run_wgmma(WGMMA, schedule, threads)) == {16}


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (("wgmma.wait_group.sync.aligned 0;", ""), "%r23 is read before"),
        (("wait_group.sync.aligned 0", "wait_group.sync.aligned 1"), "%r23 is read before"),
        (("wgmma.commit_group.sync.aligned;", ""), "%r23 is read before"),
        (("wgmma.wait_group", "mov.b32 %r22, 0; wgmma.wait_group"), "%r22 is written before"),
        (
            ("wgmma.wait_group", "@%p1 st.shared.b32 [%r3], %r4; wgmma.wait_group"),
            "a matrix instruction may still read",
        ),
        (("wgmma.wait_group.sync.aligned 0; cvt.rzi.s32.f32 %r8, %r23;", "mov.b32 %r8, 0;"), "without waiting"),
    ],
)
@each_schedule
def test_wgmma_without_its_wait_is_found(change: tuple[str, str], problem: str, schedule: Schedule) -> None:
    with pytest.raises(PipelineError, match=problem):
        run_wgmma(WGMMA.replace(*change), schedule)


@each_schedule
def test_wgmma_without_a_proxy_fence_is_found(schedule: Schedule) -> None:
    with pytest.raises(ProxyError, match=r"without fence.proxy.async.*wgmma.*byte 0 of shared memory"):
        run_wgmma(WGMMA.replace("fence.proxy.async.shared::cta;", ""), schedule)


@pytest.mark.parametrize(
    ("placed", "is_enough"),
    [
        ("bar.sync 0; fence.proxy.async;", True),  # every thread of the warpgroup, behind the barrier
        ("bar.sync 0; @%p1 fence.proxy.async; bar.sync 0;", True),  # some threads, and a barrier behind them
        ("bar.sync 0; @%p1 fence.proxy.async;", False),
        ("@!%p1 fence.proxy.async; bar.sync 0;", False),  # of threads that wrote nothing
        ("setp.lt.u32 %p2, %r1, 5; @%p2 fence.proxy.async; bar.sync 0;", False),
    ],
)
def test_proxy_fence_covers_its_threads_and_what_precedes_them(placed: str, is_enough: bool) -> None:
    body = WGMMA.replace("fence.proxy.async.shared::cta; bar.sync 0;", placed)
    if is_enough:
        assert set(run_wgmma(body)) == {16}
    else:
        with pytest.raises(ProxyError):
            run_wgmma(body)


def test_wgmma_operand_written_without_a_barrier_is_a_race() -> None:
    late = WGMMA.replace("setp.lt.u32 %p1, %r1, 64;", "setp.gt.u32 %p1, %r1, 63; add.s32 %r3, %r3, -256;")
    assert set(run_wgmma(late)) == {16}
    with pytest.raises(RaceError):
        run_wgmma(late.replace("bar.sync 0;", ""))


TENSOR = (
    THREAD + "shr.u32 %r10, %r1, 5; setp.eq.u32 %p1, %r10, 0; setp.eq.u32 %p2, %r1, 0;"
    "@%p1 tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r9+8000], 32;"
    # A has 128 rows of 32 bytes, B 8 columns; their K chunks are 2048 and 128 bytes apart.
    "mov.b32 %r4, 0x3F803F80; shl.b32 %r5, %r1, 4; add.s32 %r5, %r9, %r5;"
    "st.shared.v4.b32 [%r5], {%r4,%r4,%r4,%r4}; st.shared.v4.b32 [%r5+2048], {%r4,%r4,%r4,%r4};"
    "setp.lt.u32 %p3, %r1, 16; @%p3 st.shared.v4.b32 [%r5+4096], {%r4,%r4,%r4,%r4};"
    "@%p2 mbarrier.init.shared::cta.b64 [%r9+7168], 1;"
    "fence.proxy.async.shared::cta; bar.sync 0; ld.shared.b32 %r11, [%r9+8000];"
    f"shr.u32 %r6, %r9, 4; cvt.u64.u32 %rd3, %r6; or.b64 %rd4, %rd3, {descriptor(2048) | VERSION};"
    f"add.s64 %rd5, %rd3, 256; or.b64 %rd5, %rd5, {descriptor(128) | VERSION};"
    f"mov.b32 %r12, {SHAPE}; setp.ne.u32 %p4, %r1, %r1;"
    "@%p2 tcgen05.mma.cta_group::1.kind::f16 [%r11], %rd4, %rd5, %r12, %p4;"
    "@%p2 tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%r9+7168];"
    "mov.b32 %r13, 0; { .reg .pred complete; waitLoop:"
    " mbarrier.try_wait.parity.shared::cta.b64 complete, [%r9+7168], %r13; @!complete bra.uni waitLoop; }"
    "shl.b32 %r14, %r10, 21; add.s32 %r14, %r11, %r14;"
    "tcgen05.ld.sync.aligned.32x32b.x8.b32 {%r20,%r21,%r22,%r23,%r24,%r25,%r26,%r27}, [%r14];"
    "tcgen05.wait::ld.sync.aligned; cvt.rzi.s32.f32 %r8, %r27; bar.sync 0;"
    "@%p1 tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r11, 32;"
)
"""Sums of 16 products of ones, in tensor memory."""
STORE = "tcgen05.st.sync.aligned.32x32b.x1.b32 [%r14], {%r4};"
WAIT_LD = "tcgen05.wait::ld.sync.aligned;"


def run_tensor(body: str, schedule: Schedule = SCHEDULES[0]) -> list[int]:
    return stored(body, threads=128, shared=8192, target="sm_100a", options=Options(schedule))


@each_schedule
def test_tcgen05_adds_products(schedule: Schedule) -> None:
    assert set(run_tensor(TENSOR, schedule)) == {16}


@pytest.mark.parametrize(
    ("change", "error", "problem"),
    [
        (("@!complete bra.uni waitLoop;", ""), (PipelineError, RaceError), "tensor memory"),
        (("fence.proxy.async.shared::cta;", ""), ProxyError, "without fence.proxy.async"),
        (("tcgen05.ld", STORE + "tcgen05.ld"), PipelineError, "reads tensor memory before"),
        (("[%r14];tcgen05.wait", "[%r14+32];tcgen05.wait"), AccessError, "not allocated.*column 32"),
        (("@%p1 tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r11, 32;", ""), AccessError, "without freeing"),
        (("@%p2 mbarrier.init.shared::cta.b64 [%r9+7168], 1;", ""), BarrierError, "not initialized"),
        (("@%p2 tcgen05.commit", "@%p4 tcgen05.commit"), BarrierError, "event that does not happen"),
    ],
)
@each_schedule
def test_tcgen05_error_is_found(
    change: tuple[str, str], error: type[Exception] | tuple[type[Exception], ...], problem: str, schedule: Schedule
) -> None:
    body = TENSOR.replace(*change)
    assert body != TENSOR
    with pytest.raises(error, match=problem):
        run_tensor(body, schedule)


@each_schedule
def test_operand_written_without_a_barrier_is_a_race(schedule: Schedule) -> None:
    """Only warp 0 executes the product, and it is not ordered behind the writes of the others."""
    with pytest.raises((RaceError, BarrierError)):
        run_tensor(TENSOR.replace("fence.proxy.async.shared::cta; bar.sync 0;", "fence.proxy.async;"), schedule)


@each_schedule
def test_result_of_a_load_that_is_used_before_the_wait_is_noted(schedule: Schedule) -> None:
    problem = "a result of tcgen05.ld is used before tcgen05.wait::ld"
    body = TENSOR.replace("tcgen05.wait::ld.sync.aligned;", "mov.b32 %r30, %r26; tcgen05.wait::ld.sync.aligned;")
    options: dict[str, Any] = {"threads": 128, "shared": 8192, "target": "sm_100a", "options": Options(schedule)}
    assert {note.problem for note in run_ptx(TENSOR, **options).notes} == set()
    (note,) = run_ptx(body, **options).notes
    assert (note.problem, note.instruction) == (problem, "mov.b32 %r30, %r26")
    assert set(run_tensor(body, schedule)) == {16}


@each_schedule
def test_store_over_a_load_in_flight_is_found(schedule: Schedule) -> None:
    store = STORE + "tcgen05.wait::st.sync.aligned;"
    assert set(run_tensor(TENSOR.replace(WAIT_LD, WAIT_LD + store), schedule)) == {16}
    with pytest.raises(PipelineError, match=r"writes tensor memory that tcgen05.ld may still read.*tcgen05.st"):
        run_tensor(TENSOR.replace(WAIT_LD, store + WAIT_LD), schedule)


@each_schedule
def test_product_over_a_load_in_flight_is_found(schedule: Schedule) -> None:
    begin, end = TENSOR.index("@%p2 tcgen05.mma"), TENSOR.index("shl.b32 %r14")
    again = TENSOR[begin:end].replace("mov.b32 %r13, 0;", "mov.b32 %r13, 1;")
    waited = f"{WAIT_LD} bar.sync 0; {again}"
    assert set(run_tensor(TENSOR.replace(WAIT_LD, waited), schedule)) == {16}
    # The other warps wait, but not the warp with the thread that multiplies.
    with pytest.raises(PipelineError, match=r"writes tensor memory that tcgen05.ld may still read.*tcgen05.mma"):
        run_tensor(TENSOR.replace(WAIT_LD, f"@!%p1 {waited} {WAIT_LD}"), schedule)


@each_schedule
def test_tensor_memory_that_is_freed_without_a_barrier_is_a_race(schedule: Schedule) -> None:
    with pytest.raises((RaceError, AccessError), match="tensor memory"):
        run_tensor(TENSOR.replace("bar.sync 0;@%p1 tcgen05.dealloc", "@%p1 tcgen05.dealloc"), schedule)


def test_transposed_operand_in_tensor_memory_is_refused() -> None:
    body = TENSOR.replace("[%r11], %rd4, %rd5", "[%r11], [%r11+8], %rd5")
    with pytest.raises(UnsupportedInstructionError, match="an operand in tensor memory is transposed"):
        run_tensor(body.replace(f"mov.b32 %r12, {SHAPE};", f"mov.b32 %r12, {SHAPE | 1 << 15};"))


@each_schedule
def test_store_to_an_operand_in_flight_is_found(schedule: Schedule) -> None:
    body = TENSOR.replace("mov.b32 %r13, 0;", "mov.b32 %r13, 0; @%p1 st.shared.b32 [%r9], %r4;")
    with pytest.raises((PipelineError, RaceError)):
        run_tensor(body, schedule)


@pytest.mark.parametrize("schedule", SCHEDULES[1:], ids=str)
def test_warp_that_does_not_observe_the_product_needs_a_barrier(schedule: Schedule) -> None:
    # Only warp 0 waits at the mbarrier.
    some = TENSOR.replace("mov.b32 %r13, 0; {", "mov.b32 %r13, 0; @!%p1 bra $behind; {")
    some = some.replace("shl.b32 %r14", "$behind: shl.b32 %r14")
    with pytest.raises((RaceError, PipelineError)):
        run_tensor(some, schedule)
    with_barrier = some.replace("$behind:", "$behind: bar.sync 0;")
    assert set(run_tensor(with_barrier, schedule)) == {16}


def test_tensor_memory_race_between_warps_is_found() -> None:
    # Warps 0 and 4 have the rows 0-31 in common, so a store of one needs a barrier behind the load of the other.
    body = TENSOR.replace("shl.b32 %r14, %r10, 21;", "and.b32 %r15, %r10, 3; shl.b32 %r14, %r15, 21;")
    body = body.replace("st.shared.v4.b32 [%r5]", "setp.lt.u32 %p6, %r1, 128; @%p6 st.shared.v4.b32 [%r5]")
    body = body.replace("st.shared.v4.b32 [%r5+2048]", "@%p6 st.shared.v4.b32 [%r5+2048]")
    upper = "setp.gt.u32 %p5, %r10, 3; @%p5 " + STORE + "tcgen05.wait::st.sync.aligned;"
    options: dict[str, Any] = {"threads": 256, "shared": 8192, "target": "sm_100a"}
    loaded = "tcgen05.wait::ld.sync.aligned;"
    stored(body.replace(loaded, loaded + "bar.sync 0;" + upper), **options)
    with pytest.raises(RaceError, match=r"writes tensor memory without a barrier.*tcgen05.st.*read by .*tcgen05.ld"):
        stored(body.replace(loaded, loaded + upper), **options)


INVAL = "@%p2 mbarrier.inval.shared::cta.b64 [%r9+7168];"
LIVE = "fence.proxy.async.shared::cta; bar.sync 0;"
"""Behind it, the mbarrier is initialized."""


@each_schedule
@pytest.mark.parametrize(
    ("access", "problem"),
    [
        ("@%p5 st.shared.b64 [%r9+7168], %rd3;", "writes bytes of an mbarrier"),
        ("@%p5 st.shared.v4.b32 [%r9+7168], {%r4,%r4,%r4,%r4};", "writes bytes of an mbarrier"),
        ("@%p5 st.shared.b32 [%r9+7172], %r4;", "writes bytes of an mbarrier"),
        ("@%p5 ld.shared.b32 %r16, [%r9+7172];", "reads bytes of an mbarrier"),
        ("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r16}, [%r9+7168];", "reads bytes of an mbarrier"),
        ("stmatrix.sync.aligned.m8n8.x1.shared.b16 [%r9+7168], {%r4};", "writes bytes of an mbarrier"),
        ("@%p5 cp.async.ca.shared.global [%r9+7168], [%rd1], 8, 0;", "copies to bytes of an mbarrier"),
        ("@%p5 mbarrier.init.shared::cta.b64 [%r9+7168], 1;", "initializes an mbarrier again without mbarrier.inval"),
    ],
)
def test_access_to_a_live_mbarrier_is_found(access: str, problem: str, schedule: Schedule) -> None:
    placed = f"{LIVE} setp.eq.u32 %p5, %r1, 96; {access} bar.sync 0;"
    found = rf"{problem}.*initialized by `@%p2 mbarrier.init.*\(thread (96|0) of CTA 0, byte 71(68|72) of shared memory"
    with pytest.raises(BarrierError, match=found):
        run_tensor(TENSOR.replace(LIVE, placed), schedule)


@each_schedule
@pytest.mark.parametrize("access", ["st.shared.b64 [%r9+7176], %rd3;", "ld.shared.b32 %r16, [%r9+7164];"])
def test_access_beside_a_live_mbarrier_is_allowed(access: str, schedule: Schedule) -> None:
    assert set(run_tensor(TENSOR.replace(LIVE, f"@%p2 {access} {LIVE}"), schedule)) == {16}


@each_schedule
def test_product_whose_operand_is_a_live_mbarrier_is_found(schedule: Schedule) -> None:
    body = TENSOR.replace("[%r9+7168]", "[%r9+4224]")  # in B, which ends at 4352
    body = body.replace("@%p2 mbarrier.init", "bar.sync 0; @%p2 mbarrier.init")
    with pytest.raises(BarrierError, match=r"multiplies bytes of an mbarrier before.*`@%p2 tcgen05.mma.*byte 4224 of"):
        run_tensor(body, schedule)


@each_schedule
def test_bytes_of_an_mbarrier_may_be_used_behind_its_invalidation(schedule: Schedule) -> None:
    use = "bar.sync 0; st.shared.b32 [%r9+7168], %r10; bar.sync 0;".replace("st", "@%p1 st")
    init = "@%p2 mbarrier.init.shared::cta.b64 [%r9+7168], 1;"
    for later in (use, init):
        body = TENSOR.replace(WAIT_LD, f"{WAIT_LD} bar.sync 0; {INVAL} {later}")
        assert set(run_tensor(body, schedule)) == {16}
        with pytest.raises(BarrierError, match=r"before mbarrier.inval|again without mbarrier.inval"):
            run_tensor(body.replace(INVAL, ""), schedule)


@each_schedule
def test_mbarrier_that_all_threads_initialize_is_found(schedule: Schedule) -> None:
    with pytest.raises(BarrierError, match="initializes an mbarrier again"):
        run_tensor(TENSOR.replace("@%p2 mbarrier.init", "@%p1 mbarrier.init"), schedule)


def test_zeros_where_another_warp_initializes_an_mbarrier_are_a_race() -> None:
    zeros = "setp.eq.u32 %p5, %r1, 96; mov.b64 %rd6, 0; @%p5 st.shared.b64 [%r9+7168], %rd6;"
    body = TENSOR.replace("@%p2 mbarrier.init", f"{zeros} bar.sync 0; @%p2 mbarrier.init")
    assert set(run_tensor(body)) == {16}
    with pytest.raises(RaceError, match=r"mbarrier.init|st.shared.b64"):
        run_tensor(TENSOR.replace("@%p2 mbarrier.init", f"{zeros} @%p2 mbarrier.init"))
