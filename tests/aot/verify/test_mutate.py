"""Kernels that are broken on purpose, and the verdict on them."""

from __future__ import annotations

import os
from unittest import mock

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton")
if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
    pytest.skip("the Triton interpreter and compiler cannot share a process", allow_module_level=True)

import triton

from beit_fast.kernels.aot.executor import launch
from beit_fast.kernels.aot.verify import mutate
from beit_fast.kernels.aot.verify.cases import LinearCase, NormCase
from beit_fast.kernels.aot.verify.check import run
from beit_fast.kernels.aot.verify.mutations import MUTATIONS, ORDER, Limits, mutants, spread
from beit_fast.kernels.aot.verify.operators import prepare
from beit_fast.kernels.aot.verify.replay import Done, replayed

LINEAR = LinearCase(80, "bf16", 70, 144, 72)

has_fences = pytest.mark.skipif(
    triton.__version__.startswith("3.6."),
    reason="Triton 3.6 leaves out fences on sm_100, so the kernel is broken already",
)

PTX = """
\tbar.sync \t0;
\twgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%r1,%r2,%r3,%r4}, %rd1, %rd2, %p1, 1, 1, 0, 1;
\t@%p2 tcgen05.mma.cta_group::1.kind::f16 [ %r5 + 0 ], [ %r6 + 8 ], %rd3, %r7, %p3;
\tbar.sync \t0;
\tbar.sync \t0;
"""


def test_mutants_name_the_line_and_change_one_statement() -> None:
    found = [mutant for mutant in mutants(PTX) if mutant.kind == "barrier dropped"]
    assert [(mutant.line, mutant.statement) for mutant in found] == [(line, "bar.sync 0;") for line in (2, 5, 6)]
    lines = PTX.splitlines()
    assert [mutant.ptx.splitlines() for mutant in found] == [
        [*lines[:line], "", *lines[line + 1 :]] for line in (1, 4, 5)
    ]


def test_mutants_drop_the_invalidation_of_an_mbarrier() -> None:
    statement = "@%p2 mbarrier.inval.shared::cta.b64 [%r8];"
    (found,) = mutants(f"\tret;\n\t{statement}\n")
    assert found == ("invalidation of an mbarrier dropped", 2, statement, "\tret;\n\n")


@pytest.mark.parametrize(
    ("kind", "changed"),
    [
        ("first factor of products 16 bytes further", ["add.s64 changed, %rd1, 1;", ", changed, %rd2, %p1,"]),
        ("second factor of products 16 bytes further", ["add.s64 changed, %rd2, 1;", ", %rd1, changed, %p1,"]),
        ("second factor of products transposed", ["%p1, 1, 1, 0, 0;"]),
        ("second factor of tensor products transposed", ["xor.b32 changed, %r7, 65536;", ", %rd3, changed, %p3;"]),
        ("sums kept or not", ["not.pred changed, %p1;", ", %rd2, changed, 1, 1, 0, 1;"]),
        ("sums of tensor products 4 columns further", ["[ %r5 + 4 ], [ %r6 + 8 ]"]),
        ("factor in tensor memory 4 columns further", ["[ %r5 + 0 ], [ %r6 + 12 ]"]),
    ],
)
def test_mutants_of_a_product_change_one_operand(kind: str, changed: list[str]) -> None:
    first = next(mutant for mutant in mutants(PTX) if mutant.kind == kind)
    assert all(text in first.ptx and text not in PTX for text in changed)


def test_spread_keeps_some_of_each_kind() -> None:
    found = list(mutants(PTX))
    some = spread(found, Limits(2, 1))
    assert [mutant.line for mutant in some if mutant.kind in ORDER] == [2, 5]
    assert [mutant.kind for mutant in some] == sorted((mutant.kind for mutant in some), key=list(MUTATIONS).index)
    assert spread(found, Limits(None, 9)) == found


def test_replayed_executes_other_kernels_once() -> None:
    case = NormCase(80, "bf16", "bf16", 768)
    prepared, done = prepare(case), Done()
    with replayed(lambda ptx: ".entry residual_norm_backward_kernel(" in ptx, done):
        first = run(case, prepared, mutate.SCHEDULES[0])
        with mock.patch.object(launch, "run", wraps=launch.run) as executed:
            second = run(case, prepared, mutate.SCHEDULES[0])
    assert [call.args[0].function.name for call in executed.call_args_list] == ["residual_norm_backward_kernel"]
    assert [launch.kernel for launch in second.launches] == [launch.kernel for launch in first.launches]
    assert all(torch.equal(second.results[name], first.results[name]) for name in first.results)


@pytest.mark.parametrize(
    ("capability", "kind", "verdict"),
    [
        (80, "wait for copies dropped", "PipelineError"),
        (80, "wait for one group of copies less", "PipelineError"),
        (80, "copy from 16 bytes further", "wrong numbers"),
        (80, "rows of a first factor exchanged", "wrong numbers"),
        (90, "fence between proxies dropped", "ProxyError"),
        (90, "wait for warpgroup products dropped", "PipelineError"),
        (90, "fence of warpgroup products dropped", mutate.NOTED),
        (90, "first factor of products 16 bytes further", "wrong numbers"),
        (90, "other swizzle of the second factor", "wrong numbers"),
        (90, "second factor of products transposed", "wrong numbers"),
        pytest.param(100, "wait for an mbarrier dropped", "PipelineError", marks=has_fences),
        pytest.param(100, "tensor memory 4 columns further", "AccessError", marks=has_fences),
    ],
)
def test_judge_of_a_broken_kernel_returns_the_fault(capability: int, kind: str, verdict: str) -> None:
    subject = mutate.Subject("linear_gelu_kernel", LINEAR._replace(capability=capability))
    assert [found.text for found in mutate.judge(subject, Limits(1, 1), kind)] == [verdict]


def test_judge_of_dropped_barriers_returns_races() -> None:
    found = list(mutate.judge(mutate.Subject("linear_gelu_kernel", LINEAR), Limits(9), "barrier dropped"))
    # With some Tritons, the first two barriers guard memory that nothing has touched before: see mutants.md.
    assert [verdict.text for verdict in found[2:]] == ["RaceError"] * (len(found) - 2) != []
    assert {verdict.text for verdict in found[:2]} <= {mutate.SAME_BITS, "RaceError"}


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["70"], "compute capabilities [70] are not supported"),
        (["80", "--kernel", "gelu2"], "no kernel contains 'gelu2' (expected one of attention_forward"),
        (["80", "--kind", "barier"], "no kind contains 'barier' (expected one of"),
    ],
)
def test_main_with_wrong_options_exits(arguments: list[str], error: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        mutate.main(arguments)
    assert stopped.value.code == 2
    assert error in capsys.readouterr().err
