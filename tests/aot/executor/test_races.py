"""Order of accesses: barriers between warps, asynchronous copies and schedules of warps."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from beit_fast.kernels.aot.executor.errors import (
    BarrierError,
    PipelineError,
    RaceError,
    UnsupportedInstructionError,
)
from beit_fast.kernels.aot.executor.launch import Options
from beit_fast.kernels.aot.executor.schedule import HALVES, LOCKSTEP, RANDOM, REVERSED, Schedule, Turns

from ...support.executor import THREAD, run_ptx, stored

SCHEDULES = [Schedule(LOCKSTEP), Schedule(REVERSED), Schedule(RANDOM, 1), Schedule(HALVES, 2)]
each_schedule = pytest.mark.parametrize("schedule", SCHEDULES, ids=str)

EXCHANGE = THREAD + "st.shared.b32 [%r3], %r1; bar.sync 0; xor.b32 %r4, %r3, 128; ld.shared.b32 %r8, [%r4];"
"""Each thread reads the word of the thread with the same lane in the other warp."""


@each_schedule
def test_exchange_with_a_barrier_gives_the_same_bits_in_every_order(schedule: Schedule) -> None:
    result = stored(EXCHANGE, threads=64, options=Options(schedule))
    assert result == [thread ^ 32 for thread in range(64)]


@each_schedule
def test_exchange_without_the_barrier_is_a_race_in_every_order(schedule: Schedule) -> None:
    with pytest.raises(
        RaceError, match=r"writes shared memory without a barrier.*read by `ld.shared.*thread \d+ of CTA"
    ):
        run_ptx(EXCHANGE.replace("bar.sync 0;", ""), options=Options(schedule))


@each_schedule
def test_exchange_within_a_warp_is_not_a_race(schedule: Schedule) -> None:
    run_ptx(EXCHANGE.replace("bar.sync 0;", "").replace("128", "64"), options=Options(schedule))


def test_write_after_a_read_without_a_barrier_is_a_race() -> None:
    body = THREAD + "st.shared.b32 [%r3], %r1; bar.sync 0; xor.b32 %r4, %r3, 128; ld.shared.b32 %r5, [%r4];"
    run_ptx(body + "bar.sync 0; st.shared.b32 [%r3], %r5;")
    with pytest.raises(RaceError):
        run_ptx(body + "st.shared.b32 [%r3], %r5;")


def test_equal_values_of_several_warps_are_not_a_race() -> None:
    same = THREAD + "mov.b32 %r4, 5; st.shared.b32 [%r9], %r4;"
    run_ptx(same)
    with pytest.raises(RaceError):
        run_ptx(same.replace("mov.b32 %r4, 5", "shr.u32 %r4, %r1, 5"))


def test_values_before_a_barrier_of_one_cta_are_not_compared_with_those_behind_it() -> None:
    work = "setp.lt.u32 %p1, %r1, 32; @%p1 st.shared.b32 [%r9], %r9; bar.sync 0; mov.b32 %r4, 5;"
    work += "st.shared.b32 [%r9], %r4; bar.sync 0;"
    # The two CTAs pass their barriers at different times.
    body = THREAD + "mov.u32 %r8, %ctaid.x; setp.eq.u32 %p2, %r8, 1; @%p2 bra $other;"
    body += f"{work} bra $out; $other: {work} $out:"
    run_ptx(body, grid=(2, 1, 1))
    with pytest.raises(RaceError) as raised:
        run_ptx(body.replace("mov.b32 %r4, 5", "shr.u32 %r4, %r1, 5"), grid=(2, 1, 1))
    assert "st.shared.b32 [%r9], %r4" in str(raised.value)
    assert "st.shared.b32 [%r9], %r9" not in str(raised.value)


@pytest.mark.parametrize("first", ["st.shared.v4.b32 [%r5], {%r1, %r1, %r1, %r1}", "st.shared.b16 [%r5+6], %rs1"])
def test_accesses_of_different_sizes_are_compared_by_byte(first: str) -> None:
    body = THREAD + "cvt.u16.u32 %rs1, %r1; shr.u32 %r4, %r1, 5; setp.eq.u32 %p1, %r4, 0; add.s32 %r5, %r9, 0;"
    body += f"shl.b32 %r6, %r1, 4; add.s32 %r5, %r9, %r6; @%p1 {first};"
    # Threads of the second warp read bytes 4-7 of the first 16, or bytes that nothing wrote.
    run_ptx(body + "@!%p1 ld.shared.b32 %r7, [%r9+1020];")
    with pytest.raises(RaceError):
        run_ptx(body + "@!%p1 ld.shared.b32 %r7, [%r9+4];")


def test_hazards_are_counted_by_place_if_they_are_collected() -> None:
    racy = EXCHANGE.replace("bar.sync 0;", "")
    launch = run_ptx(racy + "bar.sync 0;" + racy, grid=(3, 1, 1), options=Options(collect=True, lanes_together=64))
    assert sorted(launch.hazards.values()) == [3, 3]
    assert all(hazard.kind == "RaceError" and hazard.kernel == "kernel" for hazard in launch.hazards)
    assert {hazard.instruction for hazard in launch.hazards} == {"st.shared.b32 [%r3], %r1"}


def test_barrier_that_some_threads_do_not_reach_is_found() -> None:
    with pytest.raises(BarrierError, match="do not reach"):
        run_ptx(THREAD + "setp.lt.u32 %p1, %r1, 32; @%p1 bra $out; bar.sync 0; $out:")
    with pytest.raises(BarrierError, match="different barriers"):
        run_ptx(THREAD + "setp.lt.u32 %p1, %r1, 32; @%p1 bra $b; bar.sync 0; bra $out; $b: bar.sync 0; $out:")


def test_warp_instruction_of_some_threads_is_found() -> None:
    shuffle = "mov.u32 %r1, %tid.x; setp.lt.u32 %p1, %r1, 7; @%p1 shfl.sync.bfly.b32 %r8, %r1, 5, 31, -1;"
    with pytest.raises(BarrierError, match=r"not all threads of a warp.*thread 7 of CTA 0"):
        stored(shuffle)


def test_uniform_branch_that_parts_a_warp_is_found() -> None:
    body = "mov.u32 %r1, %tid.x; setp.lt.u32 %p1, %r1, 32; @%p1 bra.uni $out; mov.b32 %r2, 1; $out:"
    run_ptx(body)
    parted = body.replace("32; @", "39; @")
    run_ptx(parted.replace(".uni", ""))
    with pytest.raises(BarrierError, match=r"only some threads.*`@%p1 bra.uni \$out`.*thread 39 of CTA 0"):
        run_ptx(parted)
    # Threads that are elsewhere do not count.
    run_ptx(parted.replace("@", "setp.lt.u32 %p2, %r1, 20; @!%p2 bra $out; @"))


def test_uniform_return_that_parts_a_warp_is_found() -> None:
    with pytest.raises(BarrierError, match=r"`@%p1 ret.uni`"):
        run_ptx("mov.u32 %r1, %tid.x; setp.lt.u32 %p1, %r1, 39; @%p1 ret.uni;")


COLLATZ = """
mov.u32 %r1, %tid.x; add.s32 %r1, %r1, 1; mov.b32 %r8, 0;
$loop: setp.eq.b32 %p1, %r1, 1; @%p1 bra $done;
and.b32 %r2, %r1, 1; setp.eq.b32 %p2, %r2, 0; @%p2 bra $even;
mad.lo.s32 %r1, %r1, 3, 1; bra.uni $next;
$even: shr.u32 %r1, %r1, 1;
$next: add.s32 %r8, %r8, 1; bra.uni $loop;
$done:
"""


@each_schedule
def test_divergent_threads_meet_again(schedule: Schedule) -> None:
    def steps(number: int) -> int:
        return 0 if number == 1 else 1 + steps(3 * number + 1 if number % 2 else number // 2)

    result = stored(COLLATZ + "bar.sync 0;", threads=64, options=Options(schedule))
    assert result == [steps(thread + 1) for thread in range(64)]


COPY = (
    THREAD + "ld.param.b64 %rd1, [p0]; mad.wide.u32 %rd2, %r1, 16, %rd1; shl.b32 %r4, %r1, 4; add.s32 %r3, %r9, %r4;"
    "cp.async.cg.shared.global [%r3], [%rd2], 16; cp.async.commit_group;"
    "cp.async.wait_group 0; bar.sync 0; ld.shared.b32 %r8, [%r3];"
)


@each_schedule
def test_copy_lands_at_the_wait(schedule: Schedule) -> None:
    run_ptx(COPY, [torch.arange(256.0)], options=Options(schedule))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (("wait_group 0", "wait_group 1"), "reads shared memory that an asynchronous copy did not deliver"),
        (("cp.async.commit_group;", ""), "reads shared memory that an asynchronous copy did not deliver"),
        (("cp.async.wait_group 0; bar.sync 0; ld.shared.b32 %r8, [%r3];", ""), "ends without waiting"),
        (
            ("cp.async.wait_group", "st.shared.b32 [%r3], %r1; cp.async.wait_group"),
            "writes shared memory that an async",
        ),
    ],
)
@each_schedule
def test_copy_without_its_wait_is_found(change: tuple[str, str], problem: str, schedule: Schedule) -> None:
    with pytest.raises(PipelineError, match=problem):
        run_ptx(COPY.replace(*change), [torch.arange(256.0)], options=Options(schedule))


@each_schedule
def test_copy_that_another_warp_reads_needs_a_barrier(schedule: Schedule) -> None:
    # The wait of a thread orders its own copies only.
    run_ptx(COPY.replace("bar.sync 0;", ""), [torch.arange(256.0)], options=Options(schedule))
    body = COPY.replace("bar.sync 0;", "xor.b32 %r3, %r3, 512;")
    with pytest.raises((RaceError, PipelineError)):
        run_ptx(body, [torch.arange(256.0)], options=Options(schedule))


def test_copy_of_nothing_writes_zeros_and_does_not_read() -> None:
    body = COPY.replace(", 16; cp", ", 16, 0; cp").replace("[%rd2]", "[%rd1+4096]")
    (value,) = set(stored(body, threads=32))
    assert value == 0


def test_copies_land_in_groups() -> None:
    two = (
        THREAD + "ld.param.b64 %rd1, [p0]; mad.wide.u32 %rd2, %r1, 4, %rd1;"
        "cp.async.ca.shared.global [%r3], [%rd2], 4; cp.async.commit_group;"
        "cp.async.ca.shared.global [%r3+512], [%rd2], 4; cp.async.commit_group; cp.async.wait_group 1;"
    )
    run_ptx(two + "ld.shared.b32 %r5, [%r3]; cp.async.wait_all;", [torch.arange(64.0)])
    with pytest.raises(PipelineError, match="did not deliver"):
        run_ptx(two + "ld.shared.b32 %r5, [%r3+512]; cp.async.wait_all;", [torch.arange(64.0)])


@pytest.mark.parametrize(
    "statement",
    [
        "bar.sync 1;",
        "bar.sync 0, 32;",
        "bar.arrive 0, 64;",
        "mov.u32 %r1, %clock;",
        "atom.global.add.u32 %r1, [%rd1], %r2;",
        "red.global.add.u32 [%rd1], %r2;",
        "cp.async.bulk.commit_group;",
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%r1], [%rd1, {%r2, %r3}], [%r4];",
        "barrier.cluster.arrive;",
        "fence.proxy.async.global;",
        "membar.gl;",
        "ld.global.acquire.gpu.b32 %r1, [%rd1];",
        "ld.b32 %r1, [%rd1];",
        "shfl.sync.bfly.f32 %r1, %r2, 1, 31, -1;",
        "brx.idx %r1, targets;",
        "call.uni helper, (%r1);",
        "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%r1,%r2}, {%r1,%r2}, {%r1}, {%r1,%r2};",
        "tcgen05.mma.cta_group::2.kind::f16 [%r1], %rd1, %rd2, %r2, %p1;",
        "frobnicate.b32 %r1, %r2;",
    ],
)
def test_instruction_that_is_not_known_is_an_error_that_names_it(statement: str) -> None:
    with pytest.raises(UnsupportedInstructionError, match=f"`{re.escape(statement.rstrip(';'))}`"):
        run_ptx(statement)


def test_schedule_with_an_unknown_order_lists_the_orders() -> None:
    with pytest.raises(ValueError, match=r"'backwards' is not supported \(expected lockstep, rev"):
        Schedule("backwards")


@pytest.mark.parametrize(("order", "at_once"), [(REVERSED, 1), (RANDOM, 1), (HALVES, 4)])
def test_turns_run_each_warp_once_between_two_barriers(order: str, at_once: int) -> None:
    turns = Turns(Schedule(order, 1), 0, 2, 256, 1)
    firsts = set()
    for _ in range(8):
        waiting = np.zeros((2, 8, 32), bool)
        runs = []
        while not waiting.all():
            runs.append(turns.choose(~waiting.reshape(-1)).reshape(2, 8, 32))
            assert (runs[-1].any(2) == runs[-1].all(2)).all()  # whole warps
            assert (runs[-1].all(2).sum(1) == at_once).all()
            assert not (runs[-1] & waiting).any()
            waiting |= runs[-1]
        assert len(runs) == 8 // at_once
        turns.end(None)
        firsts.add(runs[0][:, :, 0].tobytes())
    assert (len(firsts) == 1) == (order == REVERSED)


def test_turns_of_halves_stay_until_all_their_warps_wait() -> None:
    turns = Turns(Schedule(HALVES, 1), 0, 1, 128, 1)
    first = turns.choose(np.ones(128, bool))
    waits = np.zeros(128, bool)
    waits[np.flatnonzero(first)[:32]] = True
    assert (turns.choose(~waits) == (first & ~waits)).all()
    assert (turns.choose(~first) == ~first).all()


def test_turns_of_halves_change_when_a_warp_waits_for_another() -> None:
    turns = Turns(Schedule(HALVES, 1), 0, 1, 256, 1)
    drawn = set()
    for _ in range(8):
        drawn.add(turns.choose(np.ones(256, bool)).tobytes())
        turns.end(np.array([0]))
    assert len(drawn) > 1
