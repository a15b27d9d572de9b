"""Bounds, alignment, initialization and CTAs, by kernels of a few instructions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from beit_fast.kernels.aot.executor.errors import AccessError, RaceError
from beit_fast.kernels.aot.executor.launch import Options

from ...support.executor import THREAD, run_ptx, stored

LOAD = "ld.param.b64 %rd1, [p0]; mov.u32 %r1, %tid.x; mad.wide.u32 %rd2, %r1, 4, %rd1; ld.global.b32 %r2, [%rd2];"


def test_global_access_to_the_last_element_is_allowed() -> None:
    run_ptx(LOAD, [torch.zeros(64)])


@pytest.mark.parametrize(
    ("tensor", "change", "thread", "where"),
    [
        (torch.zeros(63), "", 63, r"a0 \+252 bytes \(it has 252\)"),
        (torch.zeros(60), "", 60, r"a0 \+240 bytes"),
        (torch.zeros(65)[1:], "-4", 0, r"a0 -4 bytes"),
        (torch.zeros(64), "+16", 60, r"a0 \+256 bytes"),
        (torch.zeros(128)[::2], "", 1, r"a0 \+4 bytes"),
        (torch.zeros(80)[:64].reshape(4, 16).t()[:, :3], "", 48, ""),
    ],
)
def test_global_access_outside_the_elements_is_found(tensor: Tensor, change: str, thread: int, where: str) -> None:
    body = LOAD.replace("[%rd2]", f"[%rd2{change}]")
    with pytest.raises(AccessError, match=rf"outside a0.*ld\.global.*thread {thread} of CTA 0, {where}"):
        run_ptx(body, [tensor])


def test_global_access_outside_all_arguments_is_found() -> None:
    with pytest.raises(AccessError, match=r"outside all arguments.*thread 0 of CTA 0, address 0x0"):
        run_ptx("mov.b64 %rd1, 0; ld.global.b32 %r1, [%rd1];", [torch.zeros(4)])


def test_global_access_that_is_not_aligned_is_found() -> None:
    body = LOAD.replace("ld.global.b32 %r2", "ld.global.v2.b32 {%r2, %r3}")
    with pytest.raises(AccessError, match=r"8 bytes is not aligned.*thread 1 of CTA 0, a0 \+4 bytes"):
        run_ptx(body, [torch.zeros(66)])


def test_error_names_kernel_source_and_instruction() -> None:
    located = "\n\t.loc\t1 7 3 // kernel.py:7:3 @[ caller.py:9:1 ]\n" + LOAD
    with pytest.raises(AccessError, match=r"AccessError in kernel: .*`ld.global.b32 %r2, \[%rd2\]` from kernel.py:7:3"):
        run_ptx(located, [torch.zeros(63)])


def test_predicate_excludes_threads_from_an_access() -> None:
    guarded = LOAD.replace("ld.global", "setp.lt.u32 %p1, %r1, 60; @%p1 ld.global")
    run_ptx(guarded, [torch.zeros(60)])
    with pytest.raises(AccessError, match="thread 60"):
        run_ptx(guarded.replace("60;", "61;"), [torch.zeros(60)])


STORE = "ld.param.b64 %rd1, [p0]; mov.u32 %r1, %ctaid.x; mov.u32 %r2, %tid.x; st.global.b32 [%rd1], %r1;"
STORE_OWN = STORE.replace("st.global", "mad.wide.u32 %rd1, %r1, 4, %rd1; st.global")


def test_ctas_that_write_the_same_element_are_found() -> None:
    run_ptx(STORE, [torch.zeros(1)])
    with pytest.raises(RaceError, match=r"writes what another CTA wrote.*CTA [01]"):
        run_ptx(STORE, [torch.zeros(1)], grid=(2, 1, 1))
    run_ptx(STORE_OWN, [torch.zeros(2)], grid=(2, 1, 1))


@pytest.mark.parametrize("together", [1, 4096])
def test_cta_that_reads_what_another_wrote_is_found(together: int) -> None:
    options = Options(lanes_together=together)
    body = STORE_OWN + "ld.param.b64 %rd3, [p0]; ld.global.b32 %r3, [%rd3];"
    run_ptx(body, [torch.zeros(1)], options=options)
    with pytest.raises(RaceError, match="reads what another CTA wrote"):
        run_ptx(body, [torch.zeros(2)], grid=(2, 1, 1), options=options)


@pytest.mark.parametrize("together", [1, 4096])
def test_cta_that_writes_what_another_read_is_found(together: int) -> None:
    options = Options(lanes_together=together)
    # Each CTA reads the element of the last one, which writes it later.
    body = "ld.param.b64 %rd3, [p0]; ld.global.b32 %r3, [%rd3+4];" + STORE_OWN
    with pytest.raises(RaceError, match="writes what another CTA reads"):
        run_ptx(body, [torch.zeros(2)], grid=(2, 1, 1), options=options)


def test_arguments_that_share_memory_share_races() -> None:
    memory = torch.zeros(2)
    body = "ld.param.b64 %rd3, [p1]; ld.global.b32 %r3, [%rd3];" + STORE_OWN
    run_ptx(body, [torch.zeros(2), torch.zeros(2)], grid=(2, 1, 1))
    with pytest.raises(RaceError):
        run_ptx(body, [memory, memory[1:]], grid=(2, 1, 1))


@pytest.mark.parametrize(
    ("statement", "problem"),
    [
        ("ld.shared.b32 %r5, [%r3+-4];", "outside shared memory.*thread 0 .*byte -4 of 1024"),
        ("ld.shared.b32 %r5, [%r3+772];", "outside shared memory.*thread 63 .*byte 1024 of 1024"),
        ("ld.shared.v4.b32 {%r5, %r6, %r7, %r8}, [%r3];", "not aligned.*thread 1 .*byte 4"),
        ("st.shared.b64 [%r3], %rd2;", "not aligned.*thread 1 "),
        ("ld.shared.b32 %r5, [%r1];", "outside shared memory.*thread 0"),
    ],
)
def test_shared_access_outside_or_not_aligned_is_found(statement: str, problem: str) -> None:
    with pytest.raises(AccessError, match=problem):
        run_ptx(THREAD + "mov.b64 %rd2, 0;" + statement)


def test_shared_variables_of_fixed_size_lie_before_the_dynamic_array() -> None:
    body = ".shared .align 4 .b8 first[100]; .shared .align 16 .b8 second[16]; mov.b32 %r2, first; mov.b32 %r3, second;"
    assert set(stored(body + "sub.s32 %r8, %r3, %r2;")) == {112}
    assert set(stored(body + "mov.b32 %r4, dynamic; sub.s32 %r8, %r4, %r3;")) == {16}


def test_uninitialized_reads_are_noted_and_are_nan() -> None:
    launch = run_ptx(THREAD + "ld.shared.b32 %r5, [%r3];")
    (note,) = launch.notes
    assert note.problem == "reads uninitialized shared memory"
    assert launch.notes[note] == 64
    (value,) = set(stored(THREAD + "ld.shared.b32 %r8, [%r9];"))
    assert torch.tensor(value, dtype=torch.int32).view(torch.float32).isnan()
    assert not run_ptx(THREAD + "st.shared.b32 [%r3], %r1; ld.shared.b32 %r5, [%r3];").notes


def test_registers_that_were_not_written_are_noted() -> None:
    def notes(body: str) -> list[str]:
        return [note.instruction for note in run_ptx(body).notes if "register" in note.problem]

    assert notes("add.s32 %r1, %r2, %r2;") == ["add.s32 %r1, %r2, %r2"]
    # Half of the threads write it: those may read it, the others may not.
    half = "mov.u32 %r1, %tid.x; setp.lt.u32 %p1, %r1, 32; @%p1 mov.b32 %r2, 5;"
    assert notes(half + "@%p1 add.s32 %r3, %r2, 1;") == []
    assert notes(half + "add.s32 %r3, %r2, 1;") == ["add.s32 %r3, %r2, 1"]
    assert notes(half + "@!%p1 mov.b32 %r2, 6; add.s32 %r3, %r2, 1;") == []


def test_local_memory_belongs_to_a_thread() -> None:
    body = ".local .align 8 .b8 depot[16]; mov.b64 %rd3, depot; mov.u32 %r1, %tid.x; st.local.b32 [%rd3+8], %r1;"
    assert stored(body + "ld.local.b32 %r8, [%rd3+8];") == list(range(32))
    with pytest.raises(AccessError, match="local memory"):
        run_ptx(body + "ld.local.b32 %r8, [%rd3+16];")


def test_narrow_loads_extend_zeros_or_signs() -> None:
    values = torch.tensor([0x85, 0xFF], dtype=torch.uint8)
    for kind, expected in (("u8", 0x85), ("s8", 0xFFFFFF85)):
        out = torch.zeros(32, dtype=torch.int32)
        body = "ld.param.b64 %rd1, [p0]; ld.param.b64 %rd2, [p1]; mov.u32 %r1, %tid.x;"
        body += f"ld.global.{kind} %r8, [%rd1]; mad.wide.u32 %rd2, %r1, 4, %rd2; st.global.b32 [%rd2], %r8;"
        run_ptx(body, [values, out], threads=32)
        assert out[0].item() % 2**32 == expected
