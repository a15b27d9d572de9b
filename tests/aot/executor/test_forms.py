"""Modifiers that do not go together, and operands too many."""

from __future__ import annotations

import re

import pytest

from beit_fast.kernels.aot.executor.errors import UnsupportedInstructionError

from ...support.executor import run_ptx

PRODUCT = "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%r1,%r2,%r3,%r4}, "
TENSOR = "mov.b32 %r9, dynamic; tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r9], 32;"


def refuse(body: str, statement: str) -> None:
    with pytest.raises(UnsupportedInstructionError, match=re.escape(f"`{statement.rstrip(';')}`")):
        run_ptx(body + statement)


@pytest.mark.parametrize(
    "statement",
    [
        "ld.global.shared.b32 %r1, [%rd1];",
        "ld.shared.nc.b32 %r1, [%r2];",
        "ld.global.v2.v4.b32 {%r1, %r2}, [%rd1];",
        "ld.v2.global.b32 {%r1, %r2}, [%rd1];",
        "ld.global.b32.b32 %r1, [%rd1];",
        "ld.global.bf16 %rs1, [%rd1];",
        "st.global.nc.b32 [%rd1], %r1;",
        "st.global.shared.b32 [%rd1], %r1;",
        "mov.bf16x2 %r1, %r2;",
        "cvta.to.to.global.u64 %rd1, %rd2;",
        "cp.async.ca.cg.shared.global [%r1], [%rd1], 16;",
        "cp.async.cg.shared.global [%r1], [%rd1], 8;",
        "cp.async.ca.shared.global.L2::64B.L2::128B [%r1], [%rd1], 16;",
        "mbarrier.init.b64 [%r1], 1;",
        "ldmatrix.sync.aligned.m8n8.x1.x4.shared.b16 {%r1}, [%r2];",
        "ldmatrix.aligned.m8n8.x1.shared.b16 {%r1}, [%r2];",
        "stmatrix.sync.aligned.m8n8.x1.trans.trans.shared.b16 [%r2], {%r1};",
        "shfl.sync.bfly.idx.b32 %r1, %r2, 1, 31, -1;",
        "vote.sync.all.any.pred %p1, %p2, -1;",
        "barrier.sync.sync 0;",
        "exit.uni;",
        "bra.uni.uni $out;",
        "setp.lt.and.or.s32 %p1, %r1, %r2, %p2;",
        "setp.lt.ftz.s32 %p1, %r1, %r2;",
        "selp.b32.b32 %r1, %r2, %r3, %p1;",
        "add.approx.f32 %r1, %r2, %r3;",
        "add.sat.rn.f32 %r1, %r2, %r3;",
        "mul.full.f32 %r1, %r2, %r3;",
        "div.approx.full.f32 %r1, %r2, %r3;",
        "rcp.approx.ftz.f64 %rd1, %rd2;",
        "shl.b32.b32 %r1, %r2, 3;",
        "shf.l.r.wrap.b32 %r1, %r2, %r3, 1;",
        "cvt.ftz.f32.f32 %r1, %r2;",
        "cvt.rpi.ftz.s32.f32 %r1, %r2;",
        "cvt.rn.ftz.bf16.f32 %rs1, %r2;",
        "cvt.rn.s32.s64 %r1, %rd1;",
        "cvt.f32.s32 %r1, %r2;",
    ],
)
def test_modifiers_that_do_not_go_together_are_an_error_that_names_the_instruction(statement: str) -> None:
    refuse("$out:", statement)


@pytest.mark.parametrize(
    "statement",
    [
        "ld.global.b32 %r1, [%rd1], %r2;",
        "ld.param.b32 %r1, [%rd1], %r2;",
        "st.shared.b32 [%r1], %r2, %r3;",
        "mov.b32 %r1, %r2, %r3;",
        "mov.b64 %rd1, {%r1, %r2}, %r3;",
        "cvta.to.global.u64 %rd1, %rd2, %rd3;",
        "cp.async.commit_group 1;",
        "cp.async.wait_all 0;",
        "cp.async.wait_group 0, 1;",
        "cp.async.ca.shared.global [%r1], [%rd1], 4, %r2, %rd2;",
        "fence.proxy.async 0;",
        "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r1}, [%r2], %r3;",
        "stmatrix.sync.aligned.m8n8.x1.shared.b16 [%r2], {%r1}, %r3;",
        "mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%r1,%r2,%r3,%r4}, {%r5,%r6}, {%r7}, {%r1,%r2,%r3,%r4}, 1;",
        "shfl.sync.bfly.b32 %r1, %r2, 1, 31, -1, 1;",
        "redux.sync.add.s32 %r1, %r2, -1, 1;",
        "vote.sync.all.pred %p1, %p2, -1, 1;",
        "elect.sync %r1|%p1, -1, 1;",
        "bar.warp.sync -1, 1;",
        "setp.lt.s32 %p1, %r1, %r2, %p2;",
        "add.s32 %r1, %r2, %r3, %r4;",
        "cvt.rn.bf16.f32 %rs1, %r1, %r2;",
        "ret 1;",
        "bra $out, $out;",
    ],
)
def test_operands_too_many_are_an_error_that_names_the_instruction(statement: str) -> None:
    refuse("$out:", statement)


@pytest.mark.parametrize(
    "statement",
    [
        PRODUCT + "%rd1, %rd2, %p1, 1, 1, 0;",
        PRODUCT + "%rd1, %rd2, %p1, 1, 1;",
        PRODUCT + "%rd1, %rd2, %p1, 1, 1, 0, 0, 0;",
        PRODUCT + "{%r5,%r6,%r7,%r8}, %rd2, %p1, 1, 1, 0, 0;",
        "wgmma.fence.sync.aligned 0;",
        "wgmma.wait_group.sync.aligned 0, 1;",
        "wgmma.wait_group.aligned.sync 0;",
    ],
)
def test_form_of_warpgroup_products_that_is_not_known_is_an_error(statement: str) -> None:
    refuse("", statement)


@pytest.mark.parametrize(
    "statement",
    [
        "tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r9], 32, 1;",
        "tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r1, 32, 1;",
        "tcgen05.wait::ld.wait::st.sync.aligned;",
        "tcgen05.wait::ld.sync.aligned 0;",
        "tcgen05.mma.cta_group::1.kind::f16.kind::tf32 [%r1], %rd1, %rd2, %r2, %p1;",
        "tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%r1], %rs1;",
    ],
)
def test_form_of_tensor_memory_that_is_not_known_is_an_error(statement: str) -> None:
    refuse(TENSOR, statement)
