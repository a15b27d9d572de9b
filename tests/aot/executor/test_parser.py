"""PTX text as objects."""

from __future__ import annotations

import re
import textwrap

import pytest
import torch

from beit_fast.kernels.aot.executor.errors import UnsupportedInstructionError
from beit_fast.kernels.aot.executor.parser import parse
from beit_fast.kernels.aot.executor.pointers import written_parameters
from beit_fast.kernels.aot.executor.ptx import Address, Immediate, Instruction, Register, Symbol, Variable, Vector

from ...support.executor import module


def instructions(body: str) -> list[Instruction]:
    return parse(module(body)).kernel.instructions


def test_parse_operands_of_every_kind_are_typed() -> None:
    load, store, move, compare, _ = instructions(
        "@!%p1 ld.shared::cta.v2.b32 {%r1, _}, [%r2+-16]; st.global.b32 [dynamic + 0x10], -7;"
        " mov.b32 %r3, 0f3F800000; setp.lt.s32 %p1|%p2, %r1, 5;"
    )
    assert load.opcode == "ld"
    assert load.modifiers == ("shared", "v2", "b32")
    assert (load.predicate, load.negated) == ("%p1", True)
    assert load.operands == (Vector((Register("%r1"), None)), Address(Register("%r2"), -16))
    assert store.operands == (Address(Symbol("dynamic"), 16), Immediate("-7"))
    assert move.operands[1] == Immediate("0f3F800000")
    assert compare.operands[0] == Vector((Register("%p1"), Register("%p2")))


def test_parse_names_in_scopes_are_local() -> None:
    kernel = parse(
        module(
            "{ .reg .pred done; loop: mov.pred done, 1; @!done bra.uni loop; }"
            " { .reg .pred done; loop: mov.pred done, 0; @done bra loop; }"
        )
    ).kernel
    first, branch, second, other = kernel.instructions[:4]
    assert first.register(0) == branch.predicate != second.register(0) == other.predicate
    assert kernel.labels[branch.label(0)] == 0
    assert kernel.labels[other.label(0)] == 2


def test_parse_statements_over_several_lines_are_joined() -> None:
    instruction, _ = instructions("add.s32\n %r1,\n // a comment; with a semicolon\n %r2, %r3;")
    assert instruction.text == "add.s32 %r1, %r2, %r3"


def test_parse_locations_give_the_source_with_inlining() -> None:
    body = (
        "\t.loc\t1 79 22                         // backward.py:79:22\n mov.b32 %r1, 1;\n"
        "\t.loc\t2 43 17                         // standard.py:43:17 @[ backward.py:79:47 ]\n mov.b32 %r1, 2;\n"
        "\t.loc\t1 5 1\n mov.b32 %r1, 3;\n"
        "\t.loc\t2 6 1, function_name $L__info_string0, inlined_at 1 7 2\n mov.b32 %r1, 4;\n"
    )
    text = module(body) + '.file 1 "/tmp/kernel.cu"\n.file 2 "/tmp/gather.cuh"\n'
    assert [one.source for one in parse(text).kernel.instructions[:4]] == [
        "backward.py:79:22",
        "standard.py:43:17 @[ backward.py:79:47 ]",
        "kernel.cu:5:1",
        "gather.cuh:6:1 @[ kernel.cu:7:2 ]",
    ]


def test_parse_module_with_several_kernels_names_them() -> None:
    text = """
    .version 8.7
    .target sm_90a
    .global .align 4 .b8 text[3] = {95, 36, 0};
    .visible .entry first(.param .align 8 .b8 first_0[24], .param .u16 first_1)
    .maxntid 128, 1, 1
    { .reg .b32 %r<3>; .shared .align 16 .b8 tile[2][64]; .local .align 4 .b8 depot[8]; mov.b32 %r1, %r2; ret; }
    .func (.param .b32 result) helper(.param .b32 helper_0) { ret; }
    .visible .entry second() .reqntid 32 { ret; }
    """
    parsed = parse(textwrap.dedent(text))
    assert parsed.target == "sm_90a"
    assert list(parsed.kernels) == ["first", "second"]
    first = parsed.functions["first"]
    assert first.parameters == [
        Variable("first_0", "param", 8, 24),
        Variable("first_1", "param", 2, 2),
    ]
    assert (first.maximum_threads, first.required_threads) == ((128, 1, 1), None)
    assert first.variables == [Variable("tile", "shared", 16, 128), Variable("depot", "local", 4, 8)]
    assert parsed.functions["second"].threads == 32
    assert not parsed.functions["helper"].is_kernel
    assert parsed.variables == [Variable("text", "global", 4, 3, b"_$\0")]
    with pytest.raises(ValueError, match="2 kernels"):
        _ = parsed.kernel


@pytest.mark.parametrize("statement", [".branchtargets a, b;", "%r1 = 3;", "ld.global.b32 %r1, [%r2 + %r3 * 4];"])
def test_parse_unknown_statement_is_an_error(statement: str) -> None:
    with pytest.raises(UnsupportedInstructionError):
        instructions(statement)


@pytest.mark.parametrize(
    "directive", [".reqnctapercluster 2", ".explicitcluster", ".maxclusterrank 8", ".frobnicate 7"]
)
def test_parse_unknown_directive_of_a_kernel_is_an_error_that_names_it(directive: str) -> None:
    name = directive.split()[0]
    with pytest.raises(UnsupportedInstructionError, match=rf"directive of kernel: \{name}"):
        parse(module("").replace(".reqntid 64", f".reqntid 64\n{directive}"))


def test_parse_directives_that_limit_resources_are_allowed() -> None:
    kernel = parse(module("").replace(".reqntid 64", ".maxntid 64, 1, 1\n.reqntid 32, 2\n.minnctapersm 2\n.maxnreg 80"))
    assert (kernel.kernel.required_threads, kernel.kernel.maximum_threads) == ((32, 2), (64, 1, 1))


@pytest.mark.parametrize("statement", [".frobnicate 7", ".frobnicate .shared .align 4 .b8 x[4];", ".alias f, g;"])
def test_parse_unknown_statement_of_a_module_is_an_error_that_names_it(statement: str) -> None:
    with pytest.raises(UnsupportedInstructionError, match=re.escape(f"declaration: {statement.rstrip(';')}")):
        parse(module("").replace(".extern", f"{statement}\n.extern"))


def test_written_parameters_follow_addresses_into_stores() -> None:
    parsed = parse(
        module(
            "ld.param.b64 %rd1, [p0]; ld.param.b64 %rd2, [p1]; ld.param.b32 %r1, [p2];"
            "mad.wide.s32 %rd3, %r1, 4, %rd2; ld.global.b32 %r2, [%rd1]; st.global.b32 [%rd3], %r2;",
            [torch.zeros(1), torch.zeros(1), 3],
        )
    )
    assert written_parameters(parsed.kernel) == {"p1", "p2"}
