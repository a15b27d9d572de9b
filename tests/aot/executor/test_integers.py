"""Integer instructions against Python integers."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest

from beit_fast.kernels.aot.executor.dtypes import DTYPES, Array
from beit_fast.kernels.aot.executor.errors import UnsupportedInstructionError

from ...support.executor import compute, stored

TYPES = ["u16", "s16", "u32", "s32", "u64", "s64"]


def special_values(kind: str) -> list[int]:
    limits = np.iinfo(DTYPES[kind])
    middle = [1, 2, 3, 7, 100, 0x1234, 0x7FFF, limits.max // 3]
    return [int(limits.min), int(limits.min) + 1, 0, *middle, *(-x for x in middle if limits.min), int(limits.max)]


def pairs(kind: str) -> tuple[list[int], list[int]]:
    first, second = zip(*itertools.product(special_values(kind), repeat=2), strict=True)
    return list(first), list(second)


def wrapped(value: int, kind: str) -> int:
    bits = int(kind[1:])
    value %= 1 << bits
    return value - (1 << bits) if kind[0] == "s" and value >> (bits - 1) else value


def array(values: list[int], kind: str) -> Array:
    return np.array([value % (1 << int(kind[1:])) for value in values], f"uint{kind[1:]}")


def truncating_quotient(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


TWO_OPERANDS: dict[str, Callable[[int, int], int]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul.lo": lambda a, b: a * b,
    "min": min,
    "max": max,
    "div": truncating_quotient,
    "rem": lambda a, b: a - truncating_quotient(a, b) * b,
}


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("name", TWO_OPERANDS)
def test_arithmetic_special_values_equal_python(name: str, kind: str) -> None:
    first, second = pairs(kind)
    if name in ("div", "rem"):
        first, second = zip(*((a, b) for a, b in zip(first, second, strict=True) if b), strict=True)
    result = compute(f"{name}.{kind}", array(list(first), kind), array(list(second), kind))
    expected = [wrapped(TWO_OPERANDS[name](a, b), kind) for a, b in zip(first, second, strict=True)]
    assert [wrapped(value, kind) for value in result.tolist()] == expected


@pytest.mark.parametrize("kind", TYPES)
def test_multiply_high_special_values_equal_python(kind: str) -> None:
    first, second = pairs(kind)
    result = compute(f"mul.hi.{kind}", array(first, kind), array(second, kind))
    expected = [wrapped(a * b >> int(kind[1:]), kind) for a, b in zip(first, second, strict=True)]
    assert [wrapped(value, kind) for value in result.tolist()] == expected


@pytest.mark.parametrize("kind", TYPES[:4])
def test_multiply_wide_special_values_equal_python(kind: str) -> None:
    first, second = pairs(kind)
    wide = f"{kind[0]}{2 * int(kind[1:])}"
    result = compute(f"mad.wide.{kind}", array(first, kind), array(second, kind), array([5] * len(first), wide))
    expected = [wrapped(a * b + 5, wide) for a, b in zip(first, second, strict=True)]
    assert [wrapped(value, wide) for value in result.tolist()] == expected


@pytest.mark.parametrize("kind", ["u16", "s16", "u32", "s32", "u64", "s64"])
def test_shift_right_by_any_amount_equals_python(kind: str) -> None:
    amounts = [0, 1, 5, 15, 16, 31, 32, 63, 64, 200]
    first, second = zip(*itertools.product(special_values(kind), amounts), strict=True)
    result = compute(f"shr.{kind}", array(list(first), kind), np.array(second, np.uint32))
    assert [wrapped(value, kind) for value in result.tolist()] == [
        wrapped(a >> b, kind) for a, b in zip(first, second, strict=True)
    ]


@pytest.mark.parametrize("kind", ["u16", "u32", "u64"])
def test_shift_left_by_any_amount_equals_python(kind: str) -> None:
    amounts = [0, 1, 5, 15, 16, 31, 32, 63, 64, 200]
    first, second = zip(*itertools.product(special_values(kind), amounts), strict=True)
    result = compute(f"shl.b{kind[1:]}", array(list(first), kind), np.array(second, np.uint32))
    assert result.tolist() == [wrapped(a << b, kind) for a, b in zip(first, second, strict=True)]


def field_of(value: int, start: int, length: int, kind: str) -> int:
    """Extract bits by the definition of bfe in the PTX ISA, one bit after another."""
    bits = int(kind[1:])
    msb = bits - 1
    sign = 0 if kind[0] == "u" or length == 0 else value >> min(start + length - 1, msb) & 1
    result = 0
    for place in range(bits):
        inside = place < length and start + place <= msb
        result |= (value >> (start + place) & 1 if inside else sign) << place
    return result


@pytest.mark.parametrize("kind", ["u32", "s32", "u64", "s64"])
def test_extract_bits_any_field_equals_definition(kind: str) -> None:
    values = [0x12345678, 0x80000000, 0xFFFFFFFF, 0xF0F0F0F0]
    if kind.endswith("64"):
        values += [0xFEDCBA9876543210, 1 << 63]
    places = [0, 1, 4, 15, 28, 31, 32, 40, 63, 64, 255]
    cases = list(itertools.product(values, places, places))
    a, start, length = (list(part) for part in zip(*cases, strict=True))
    result = compute(f"bfe.{kind}", array(a, kind), np.array(start, np.uint32), np.array(length, np.uint32))
    unsigned = f"u{kind[1:]}"
    assert [wrapped(value, unsigned) for value in result.tolist()] == [field_of(*case, kind) for case in cases]


def test_insert_bits_any_field_equals_definition() -> None:
    places = [0, 1, 4, 15, 28, 31, 32]
    cases = list(itertools.product([0x12345678, 0xFFFFFFFF], [0, 0xA5A5A5A5], places, places))
    a, b, start, length = (np.array(part, np.uint32) for part in zip(*cases, strict=True))
    expected = []
    for value, other, first, count in cases:
        for place in range(count):
            if first + place < 32:
                other = other & ~(1 << (first + place)) | (value >> place & 1) << (first + place)
        expected.append(other)
    assert compute("bfi.b32", a, b, start, length).tolist() == expected


@pytest.mark.parametrize("mode", ["wrap", "clamp"])
def test_funnel_shift_any_amount_equals_python(mode: str) -> None:
    low, high, amounts = 0x89ABCDEF, 0x01234567, [0, 1, 7, 31, 32, 33, 64]
    counts = [amount & 31 if mode == "wrap" else min(amount, 32) for amount in amounts]
    operands = (np.array([low] * 7, np.uint32), np.array([high] * 7, np.uint32), np.array(amounts, np.uint32))
    both = high << 32 | low
    assert compute(f"shf.l.{mode}.b32", *operands).tolist() == [(both << n >> 32) & 0xFFFFFFFF for n in counts]
    assert compute(f"shf.r.{mode}.b32", *operands).tolist() == [(both >> n) & 0xFFFFFFFF for n in counts]


def test_permute_bytes_selects_bytes_and_signs() -> None:
    a, b = np.array([0x44332211], np.uint32), np.array([0x88776655], np.uint32)
    assert compute("prmt.b32", a, b, np.array([0x7160], np.uint32)).tolist() == [0x88227711]
    assert compute("prmt.b32", a, b, np.array([0xF80A], np.uint32)).tolist() == [0xFF001100]


@pytest.mark.parametrize("table", [0x96, 0xE8, 0x80, 0xFE, 0x2A])
def test_combine_logically_every_table_entry_is_used(table: int) -> None:
    a, b, c = 0xF0F0F0F0, 0xCCCCCCCC, 0xAAAAAAAA
    expected = sum(
        (table >> ((a >> place & 1) * 4 + (b >> place & 1) * 2 + (c >> place & 1)) & 1) << place for place in range(32)
    )
    operands = [np.array([value], np.uint32) for value in (a, b, c, table)]
    assert compute("lop3.b32", *operands).tolist() == [expected]


def test_bit_counts_equal_python() -> None:
    values = np.array([0, 1, 0x80000000, 0xFFFFFFFF, 0x00F00F00], np.uint32)
    assert compute("popc.b32", values).tolist() == [value.bit_count() for value in values.tolist()]
    assert compute("clz.b32", values).tolist() == [32 - value.bit_length() for value in values.tolist()]
    reversed_bits = [int(f"{value:032b}"[::-1], 2) for value in values.tolist()]
    assert compute("brev.b32", values).tolist() == reversed_bits


RELATIONS: dict[str, Callable[[int, int], bool]] = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
}


@pytest.mark.parametrize("kind", ["u32", "s32"])
@pytest.mark.parametrize("relation", RELATIONS)
def test_comparison_special_values_equals_python(relation: str, kind: str) -> None:
    a, b = 0xFFFFFFFE, 5
    signed = wrapped(a, kind)
    expected = RELATIONS[relation](signed, b)
    body = f"mov.b32 %r1, {a}; mov.b32 %r2, {b}; setp.{relation}.{kind} %p1|%p2, %r1, %r2;"
    assert set(stored(body + "selp.b32 %r8, 1, 0, %p1;")) == {int(expected)}
    assert set(stored(body + "selp.b32 %r8, 1, 0, %p2;")) == {int(not expected)}


def test_comparison_combined_with_a_predicate() -> None:
    body = "mov.b32 %r1, 1; setp.eq.b32 %p1, %r1, 2; setp.eq.and.b32 %p2|%p3, %r1, 1, %p1;"
    body += "setp.ne.or.b32 %p4, %r1, 1, %p1;"
    for predicate, expected in (("%p2", 0), ("%p3", 0), ("%p4", 0)):
        assert set(stored(body + f"selp.b32 %r8, 1, 0, {predicate};")) == {expected}
    assert set(stored(body + "not.pred %p5, %p1; setp.eq.xor.b32 %p6, %r1, 2, %p5; selp.b32 %r8, 1, 0, %p6;")) == {1}


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("mov.b32 %r1, 0xFFFFFF85; cvt.u16.u32 %rs1, %r1; cvt.u32.u16 %r8, %rs1;", 0xFF85),
        ("mov.b32 %r1, 0xFFFFFF85; cvt.s32.s8 %r8, %r1;", 0xFFFFFF85),
        ("mov.b32 %r1, 0xFFFFFF85; cvt.u32.u8 %r8, %r1;", 0x85),
        ("mov.b32 %r1, 0x1FF; cvt.u8.u32 %rs1, %r1; cvt.u32.u16 %r8, %rs1;", 0xFF),
        ("mov.b32 %r1, 0x180; cvt.s8.s32 %rs1, %r1; cvt.u32.u16 %r8, %rs1;", 0xFF80),
        ("mov.b32 %r1, 0x80000000; cvt.s64.s32 %rd3, %r1; shr.u64 %rd4, %rd3, 32; cvt.u32.u64 %r8, %rd4;", 0xFFFFFFFF),
        ("mov.b32 %r1, 0x12345678; mov.b32 {%rs1, %rs2}, %r1; mov.b32 %r8, {%rs2, %rs1};", 0x56781234),
        ("mov.b32 %r1, 1; mov.b32 %r2, 2; mov.b64 %rd3, {%r1, %r2}; mov.b64 {_, %r8}, %rd3;", 2),
    ],
)
def test_conversions_between_widths(body: str, expected: int) -> None:
    assert set(stored(body)) == {expected}


@pytest.mark.parametrize(
    "name", ["add.cc.u32", "addc.u32", "mul24.lo.u32", "mad.hi.cc.u32", "min.relu.s32", "add.s8x4"]
)
def test_unknown_form_is_an_error(name: str) -> None:
    with pytest.raises(UnsupportedInstructionError):
        compute(name, *[np.zeros(1, np.uint32)] * (3 if name.startswith("mad") else 2))
