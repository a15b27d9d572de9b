"""Order of accesses to global memory: warps of one CTA, copies of an element, and elements that are written twice."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from beit_fast.kernels.aot.executor import global_log
from beit_fast.kernels.aot.executor.errors import RaceError, RewriteError, UnsupportedInstructionError
from beit_fast.kernels.aot.executor.launch import Options
from beit_fast.kernels.aot.executor.schedule import HALVES, LOCKSTEP, RANDOM, REVERSED, Schedule

from ...support.executor import run_ptx

SCHEDULES = [Schedule(LOCKSTEP), Schedule(REVERSED), Schedule(RANDOM, 1), Schedule(HALVES, 2)]
each_schedule = pytest.mark.parametrize("schedule", SCHEDULES, ids=str)

OWN = "ld.param.b64 %rd1, [p0]; mov.u32 %r1, %tid.x; mad.wide.u32 %rd2, %r1, 4, %rd1; shr.u32 %r5, %r1, 5;"
"""Put the thread into %r1, the address of its element into %rd2, and its warp into %r5."""
OTHER = "xor.b32 %r2, %r1, 32; mad.wide.u32 %rd3, %r2, 4, %rd1;"
"""Put the address of the element of the same lane in the other warp into %rd3."""
EXCHANGE = OWN + OTHER + "\n\t.loc\t1 7 3 // kernel.py:7:3\nst.global.b32 [%rd2], %r1; bar.sync 0; "
EXCHANGE += "\n\t.loc\t1 8 3 // kernel.py:8:3\nld.global.b32 %r3, [%rd3];"


def run(body: str, schedule: Schedule = SCHEDULES[0], elements: int = 64, **options: Any) -> None:
    run_ptx(body, [torch.zeros(elements)], options=Options(schedule), **options)


@each_schedule
def test_exchange_between_warps_needs_a_barrier(schedule: Schedule) -> None:
    run(EXCHANGE, schedule)
    with pytest.raises(RaceError, match="another warp"):
        run(EXCHANGE.replace("bar.sync 0;", ""), schedule)


@each_schedule
def test_exchange_within_a_warp_is_not_a_race(schedule: Schedule) -> None:
    run(EXCHANGE.replace("bar.sync 0;", "").replace("%r1, 32", "%r1, 16"), schedule)


def test_race_between_warps_names_both_instructions_and_the_place() -> None:
    with pytest.raises(RaceError) as raised:
        run(EXCHANGE.replace("bar.sync 0;", ""))
    assert str(raised.value) == (
        "RaceError in kernel: reads what another warp wrote without a barrier between them, in a0: "
        "`ld.global.b32 %r3, [%rd3]` from kernel.py:8:3; written by `st.global.b32 [%rd2], %r1` from kernel.py:7:3 "
        "(thread 0 of CTA 0, a0 +128 bytes (it has 256), warp 1 of CTA 0)"
    )


@each_schedule
def test_write_after_a_read_of_another_warp_needs_a_barrier(schedule: Schedule) -> None:
    body = OWN + OTHER + "ld.global.b32 %r3, [%rd3]; bar.sync 0; st.global.b32 [%rd2], %r1;"
    run(body, schedule)
    with pytest.raises(RaceError, match=r"another warp"):
        run(body.replace("bar.sync 0;", ""), schedule)


@each_schedule
def test_write_of_one_warp_after_reads_of_several_needs_a_barrier(schedule: Schedule) -> None:
    body = OWN + "ld.global.b32 %r3, [%rd1]; setp.eq.u32 %p1, %r1, 0; bar.sync 0; @%p1 st.global.b32 [%rd1], %r1;"
    run(body, schedule)
    with pytest.raises(RaceError, match=r"another warp"):
        run(body.replace("bar.sync 0;", ""), schedule)
    # Reads before a barrier do not hide those behind it.
    with pytest.raises(RaceError, match=r"another warp"):
        run(body.replace("@%p1", "ld.global.b32 %r3, [%rd1]; @%p1"), schedule)


def test_barrier_of_one_cta_does_not_order_the_warps_of_another() -> None:
    body = OWN + OTHER + "mov.u32 %r4, %ctaid.x; shl.b32 %r4, %r4, 8; cvt.u64.u32 %rd4, %r4; add.s64 %rd2, %rd2, %rd4;"
    body += "add.s64 %rd3, %rd3, %rd4; setp.eq.u32 %p1, %r4, 0; st.global.b32 [%rd2], %r1;"
    body += "@%p1 bra $first; bar.sync 0; bra $read; $first: mov.b32 %r6, 0; $read: ld.global.b32 %r3, [%rd3];"
    with pytest.raises(RaceError, match=r"another warp.*of CTA 0, a0"):
        run(body, elements=128, grid=(2, 1, 1))
    run(body.replace("@%p1 bra $first;", ""), elements=128, grid=(2, 1, 1))


@each_schedule
def test_copies_of_several_warps_are_not_a_race(schedule: Schedule) -> None:
    copies = OWN + "mov.b32 %r4, 5; st.global.b32 [%rd1], %r4; ld.global.b32 %r3, [%rd1];"
    run(copies, schedule, threads=128)
    with pytest.raises(RaceError, match="another warp"):
        run(copies.replace("mov.b32 %r4, 5", "mov.b32 %r4, %r5"), schedule, threads=128)


@each_schedule
def test_copies_that_a_warp_without_one_reads_need_a_barrier(schedule: Schedule) -> None:
    body = OWN + "setp.lt.u32 %p1, %r1, 64; mov.b32 %r4, 5; @%p1 st.global.b32 [%rd1], %r4; bar.sync 0;"
    body += "ld.global.b32 %r3, [%rd1];"
    run(body, schedule, threads=128)
    with pytest.raises(RaceError, match="another warp"):
        run(body.replace("bar.sync 0;", ""), schedule, threads=128)


@each_schedule
def test_copies_of_two_instructions_are_a_race(schedule: Schedule) -> None:
    body = OWN + "setp.lt.u32 %p1, %r1, 32; mov.b32 %r4, 5; @%p1 st.global.b32 [%rd1], %r4;"
    body += "@!%p1 st.global.b32 [%rd1], %r4;"
    with pytest.raises(RaceError, match=r"writes what another warp wrote"):
        run(body, schedule)


@each_schedule
@pytest.mark.parametrize("between", ["", "bar.sync 0;"])
def test_element_that_is_written_twice_is_found(between: str, schedule: Schedule) -> None:
    body = OWN + f"st.global.b32 [%rd2], %r1; {between} st.global.b32 [%rd2], %r5;"
    with pytest.raises(RewriteError) as raised:
        run(body.replace("st.", "\n\t.loc\t1 7 3 // kernel.py:7:3\nst."), schedule)
    text = "RewriteError in kernel: writes what its CTA wrote before in the same launch, in a0: "
    text += "`st.global.b32 [%rd2], %r5` from kernel.py:7:3; written by `st.global.b32 [%rd2], %r1` from kernel.py:7:3"
    assert str(raised.value).startswith(text)
    assert "(thread " in str(raised.value)
    assert "of CTA 0, a0 +" in str(raised.value)


@each_schedule
def test_copies_that_are_written_twice_are_found(schedule: Schedule) -> None:
    body = OWN + "mov.b32 %r4, 0; mov.b32 %r6, 5;"
    body += "$loop: st.global.b32 [%rd1], %r6; add.s32 %r4, %r4, 1; setp.lt.u32 %p1, %r4, 2;"
    run(body, schedule)
    with pytest.raises(RewriteError):
        run(body + "@%p1 bra $loop;", schedule)


def test_rewritten_elements_are_counted_by_instruction_if_hazards_are_collected() -> None:
    body = OWN + "st.global.b32 [%rd2], %r1; st.global.b32 [%rd2], %r5;"
    launch = run_ptx(body, [torch.zeros(64)], options=Options(collect=True))
    (hazard,) = launch.hazards
    assert (hazard.kind, hazard.instruction) == ("RewriteError", "st.global.b32 [%rd2], %r5")
    assert launch.hazards[hazard] == 1


@pytest.mark.parametrize("schedule", SCHEDULES[::3], ids=str)
def test_wide_access_is_compared_by_element(schedule: Schedule) -> None:
    wide = OWN + "shl.b32 %r2, %r5, 4; cvt.u64.u32 %rd3, %r2; add.s64 %rd3, %rd1, %rd3; and.b32 %r6, %r1, 31;"
    wide += "setp.eq.u32 %p1, %r6, 0; @%p1 st.global.v4.b32 [%rd3], {%r1, %r1, %r1, %r1};"
    # Warp 1 wrote elements 4 to 7.
    run(wide + "setp.eq.u32 %p2, %r1, 1; @%p2 ld.global.b32 %r3, [%rd1+12];", schedule)
    with pytest.raises(RaceError, match=r"another warp.*a0 \+(?:28|16) bytes"):
        run(wide + "setp.eq.u32 %p2, %r1, 1; @%p2 ld.global.b32 %r3, [%rd1+28];", schedule)


def test_copy_that_another_warp_overwrites_is_a_race() -> None:
    body = OWN + OTHER + "mov.b32 %r9, dynamic; shl.b32 %r4, %r1, 2; add.s32 %r9, %r9, %r4;"
    body += "cp.async.ca.shared.global [%r9], [%rd3], 4; cp.async.commit_group; cp.async.wait_group 0; bar.sync 0;"
    run(body + "st.global.b32 [%rd2], %r1;")
    with pytest.raises(RaceError, match=r"writes what another warp reads.*read by `cp.async"):
        run(body.replace("bar.sync 0;", "") + "st.global.b32 [%rd2], %r1;")


def test_kernel_and_grid_that_stamps_cannot_name_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(global_log, "_END", global_log._CTA + 2)
    run(OWN, grid=(3, 1, 1))
    with pytest.raises(NotImplementedError, match="the grid has more than 3 CTAs"):
        run(OWN, grid=(4, 1, 1))
    monkeypatch.setattr(global_log, "_WARP", 2)
    with pytest.raises(UnsupportedInstructionError, match="more than 4 instructions"):
        run(OWN + "st.global.b32 [%rd2], %r1;")
