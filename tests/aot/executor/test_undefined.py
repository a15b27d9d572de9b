"""Values that were never written, and what they decide."""

from __future__ import annotations

import pytest
import torch

from beit_fast.kernels.aot.executor.errors import UninitializedError
from beit_fast.kernels.aot.executor.launch import Options

from ...support.executor import THREAD, run_ptx

LOAD = THREAD + "ld.shared.b32 %r5, [%r3];"
BRANCH = "setp.eq.s32 %p2, %r5, 3; @%p2 bra $out; mov.b32 %r6, 1; $out:"
BOTH = "setp.lt.u32 %p1, %r1, 99; setp.eq.s32 %p2, %r5, 3;"
NEITHER = BOTH.replace("99", "0")
PART = THREAD + "setp.lt.u32 %p1, %r1, 7; @%p1 st.shared.b32 [%r3], %r1; ld.shared.v2.b32 {%r4, %r5}, [%r9+24];"


def branch_on(predicate: str) -> str:
    return f"@{predicate} bra $out; mov.b32 %r6, 1; $out:"


def test_branch_on_an_unwritten_register_is_found() -> None:
    with pytest.raises(
        UninitializedError, match=r"a branch depends on a value that was not written.*thread 0 of CTA 0"
    ):
        run_ptx(branch_on("%p1"))


@pytest.mark.parametrize(
    "body",
    [
        LOAD + BRANCH,
        LOAD + "mad.lo.s32 %r5, %r5, 0, 3;" + BRANCH,
        LOAD + "mov.b32 %r6, %r5; mov.b32 %r5, %r6;" + BRANCH,
        THREAD + "ld.shared.b8 %rs1, [%r3]; cvt.u32.u16 %r5, %rs1;" + BRANCH,
        THREAD + "ld.shared.v2.b8 {%rs1, %rs2}, [%r3]; cvt.u32.u16 %r5, %rs2;" + BRANCH,
        ".local .align 4 .b8 depot[4]; mov.b64 %rd3, depot; ld.local.b32 %r5, [%rd3];" + BRANCH,
        ".local .align 4 .b8 depot[4]; mov.b64 %rd3, depot; ld.local.u8 %r5, [%rd3];" + BRANCH,
        LOAD + BOTH + "and.pred %p3, %p1, %p2;" + branch_on("%p3"),
        LOAD + NEITHER + "or.pred %p3, %p1, %p2;" + branch_on("%p3"),
        LOAD + "setp.lt.u32 %p1, %r1, 99; selp.b32 %r5, %r5, 3, %p1;" + BRANCH,
        LOAD + "setp.eq.s32 %p1, %r5, 3; selp.b32 %r5, 4, 3, %p1;" + BRANCH,
        PART + BRANCH,
    ],
)
def test_branch_on_unwritten_memory_is_found(body: str) -> None:
    with pytest.raises(UninitializedError, match=r"a branch depends on a value that was not written: `@%p. bra"):
        run_ptx(body, threads=32)


@pytest.mark.parametrize(
    "body",
    [
        LOAD.replace("ld.shared", "st.shared.b32 [%r3], %r1; ld.shared") + BRANCH,
        LOAD + NEITHER + "and.pred %p3, %p1, %p2;" + branch_on("%p3"),
        LOAD + BOTH + "or.pred %p3, %p1, %p2;" + branch_on("%p3"),
        LOAD + "setp.lt.u32 %p1, %r1, 0; selp.b32 %r5, %r5, 3, %p1;" + BRANCH,
        LOAD + "mov.b32 %r5, %r1;" + BRANCH,
        # LLVM joins a value with an undefined half.
        LOAD + "mov.b64 %rd1, {%r1, %r5}; mov.b64 {%r5, _}, %rd1;" + BRANCH,
        PART + BRANCH.replace("%r5", "%r4"),
    ],
)
def test_branch_that_unwritten_memory_does_not_decide_is_allowed(body: str) -> None:
    run_ptx(body, threads=32)


@pytest.mark.parametrize(
    ("statement", "purpose"),
    [
        ("ld.shared.b32 %r7, [%r6];", "an address"),
        ("st.shared.b32 [%r6], %r1;", "an address"),
        ("@%p1 mov.b32 %r7, 1;", "the execution of an instruction"),
        ("cp.async.ca.shared.global [%r3], [%rd1], 4, %r4; cp.async.wait_all;", "an asynchronous operation"),
    ],
)
def test_unwritten_memory_that_decides_an_instruction_is_found(statement: str, purpose: str) -> None:
    body = LOAD + "ld.param.b64 %rd1, [p0]; and.b32 %r4, %r5, 0; add.s32 %r6, %r9, %r4; setp.eq.s32 %p1, %r4, 1;"
    with pytest.raises(UninitializedError, match=rf"{purpose} depends on.*`{statement[:9]}"):
        run_ptx(body + statement, [torch.zeros(4)])


def test_unwritten_global_memory_that_decides_a_branch_is_counted() -> None:
    memory = torch.tensor([0x7FDB7FDB, 5] * 32, dtype=torch.int32)
    body = THREAD + "ld.param.b64 %rd1, [p0]; mad.wide.u32 %rd2, %r1, 4, %rd1; ld.global.b32 %r5, [%rd2];"
    (hazard,) = run_ptx(body + BRANCH, [memory], options=Options(collect=True)).hazards
    assert hazard.kind == "UninitializedError"
    odd = "and.b32 %r2, %r1, 1; setp.eq.s32 %p1, %r2, 1;"
    assert not run_ptx(body + odd + BRANCH.replace("@%p2", "@!%p1 ret; @%p2"), [memory]).hazards
