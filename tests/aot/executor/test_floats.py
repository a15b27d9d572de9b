"""Floating-point instructions against fp64, exact fractions and torch."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch

from beit_fast.kernels.aot.executor.dtypes import Array
from beit_fast.kernels.aot.executor.errors import UnsupportedInstructionError
from beit_fast.kernels.aot.executor.operations import comparison_of
from beit_fast.kernels.aot.executor.parser import parse

from ...support.executor import compute, module

SPECIAL = [0.0, -0.0, 1.0, -1.5, 3.4e38, -3.4e38, 1e-40, -1e-45, 1.2e-38, float("inf"), float("-inf"), float("nan")]


def singles(count: int = 2000) -> Array:
    generator = np.random.default_rng(0)
    values = generator.normal(size=count) * 10.0 ** generator.integers(-20, 20, count)
    return np.concatenate([np.array(SPECIAL), values]).astype(np.float32)


def same(actual: Array, expected: Array) -> bool:
    """Compare bits, except those of NaN."""
    nan = np.isnan(expected)
    return bool((np.isnan(actual) == nan).all() and (actual.view(np.uint32) == expected.view(np.uint32))[~nan].all())


@pytest.mark.parametrize(("name", "function"), [("add", np.add), ("sub", np.subtract), ("mul", np.multiply)])
def test_arithmetic_rounds_the_exact_result(name: str, function: np.ufunc) -> None:
    a, b = singles(), singles()[::-1].copy()
    with np.errstate(all="ignore"):
        # fp64 holds the product exactly, and rounds sums far below fp32.
        expected = function(a.astype(np.float64), b.astype(np.float64)).astype(np.float32)
        if name != "mul":
            expected = function(a, b)
    assert same(compute(f"{name}.rn.f32" if name != "sub" else "sub.f32", a, b), expected)


def nearest_even(value: Fraction) -> float:
    """Round a positive fraction to 24 bits."""
    exponent = 0
    while value >= 1 << 24:
        value, exponent = value / 2, exponent + 1
    while value < 1 << 23:
        value, exponent = value * 2, exponent - 1
    return float(round(value)) * 2.0**exponent  # Python rounds halves to even


def test_fma_rounds_once() -> None:
    generator = np.random.default_rng(1)
    # Products just above and below the middle of two fp32 numbers, which fp64 rounds to the middle.
    base = np.float32(1 + 2.0**-12)
    a = np.concatenate([np.full(4, base), generator.uniform(1, 2, 200).astype(np.float32)])
    b = np.concatenate([np.full(4, base), generator.uniform(1, 2, 200).astype(np.float32)])
    c = np.concatenate(
        [np.array([2.0**-60, 2.0**-70, 0, 2.0**-90], np.float32), generator.uniform(0, 1e-7, 200).astype(np.float32)]
    )
    expected = [
        nearest_even(Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z)))
        for x, y, z in zip(a, b, c, strict=True)
    ]
    assert compute("fma.rn.f32", a, b, c).tolist() == expected


def test_fma_of_tie_is_moved_by_the_addend() -> None:
    # 1 + 2**-23 + 2**-24 is the middle; the addend decides.
    a, b = np.full(3, 1 + 2.0**-23, np.float32), np.full(3, 1.0, np.float32)
    wide = np.array([2.0**-24, 2.0**-24 + 2.0**-47, 2.0**-24 - 2.0**-48], np.float32)
    expected = [nearest_even(Fraction(float(x)) + Fraction(float(z))) for x, z in zip(a, wide, strict=True)]
    assert compute("fma.rn.f32", a, b, wide).tolist() == expected


def test_flush_to_zero_replaces_subnormal_operands_and_results() -> None:
    a = np.array([1e-40, -1e-40, 2e-38, 1.0], np.float32)
    b = np.array([1.0, 1.0, 0.25, 2.0], np.float32)
    assert compute("mul.ftz.f32", a, b).tolist() == [0.0, -0.0, 0.0, 2.0]
    assert np.signbit(compute("mul.ftz.f32", a, b)).tolist() == [False, True, False, False]
    assert (compute("mul.f32", a, b)[:3] != 0).all()


def test_minimum_and_maximum_with_nan() -> None:
    a, b = np.array([np.nan, 1, np.nan, -2], np.float32), np.array([1, np.nan, np.nan, 3], np.float32)
    assert same(compute("max.f32", a, b), np.array([1, 1, np.nan, 3], np.float32))
    assert same(compute("min.f32", a, b), np.array([1, 1, np.nan, -2], np.float32))
    assert same(compute("max.NaN.f32", a, b), np.array([np.nan, np.nan, np.nan, 3], np.float32))


FUNCTIONS = {
    "ex2.approx.f32": np.exp2,
    "lg2.approx.f32": np.log2,
    "sqrt.approx.f32": np.sqrt,
    "rsqrt.approx.f32": lambda x: 1 / np.sqrt(x),
    "rcp.rn.f32": lambda x: 1 / x,
    "tanh.approx.f32": np.tanh,
    "abs.f32": np.abs,
    "neg.f32": np.negative,
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_function_error_is_below_two_units(name: str) -> None:
    x = np.concatenate([np.linspace(0.01, 100, 1000), 2.0 ** np.arange(-20, 20)]).astype(np.float32)
    with np.errstate(all="ignore"):
        exact = FUNCTIONS[name](x.astype(np.float64))
        expected = exact.astype(np.float32)
    result = compute(name, x)
    assert result.dtype == np.float32
    finite = np.isfinite(expected)
    assert (np.isfinite(result) == finite).all()
    assert (np.abs(result[finite].astype(np.float64) - exact[finite]) <= 2 * np.spacing(np.abs(expected[finite]))).all()


@pytest.mark.parametrize("kind", ["bf16", "f16"])
def test_conversion_to_half_rounds_as_torch(kind: str) -> None:
    values = singles()
    dtype = torch.bfloat16 if kind == "bf16" else torch.float16
    expected = torch.from_numpy(values).to(dtype)
    result = compute(f"cvt.rn.{kind}.f32", values)
    nan = torch.isnan(expected).numpy()
    assert (result == expected.view(torch.int16).numpy().view(np.uint16))[~nan].all()
    assert (result[nan] == 0x7FFF).all()
    back = compute(f"cvt.f32.{kind}", result)
    assert same(back, expected.float().numpy())
    pairs = compute(f"cvt.rn.{kind}x2.f32", values, values[::-1].copy())
    assert (pairs & 0xFFFF == result[::-1]).all()
    assert (pairs >> 16 == result).all()


@pytest.mark.parametrize("kind", ["bf16", "f16"])
@pytest.mark.parametrize("name", ["add", "sub", "mul", "fma.rn", "max", "min"])
def test_half_arithmetic_rounds_the_exact_result(name: str, kind: str) -> None:
    dtype = torch.bfloat16 if kind == "bf16" else torch.float16
    generator = torch.Generator().manual_seed(0)
    operands = [torch.randn(1000, generator=generator).to(dtype) for _ in range(3 if "fma" in name else 2)]
    functions = {
        "add": lambda a, b: a + b,
        "sub": lambda a, b: a - b,
        "mul": lambda a, b: a * b,
        "fma.rn": lambda a, b, c: a * b + c,
        "max": torch.maximum,
        "min": torch.minimum,
    }
    exact = functions[name](*(operand.double() for operand in operands))
    bits = [operand.view(torch.int16).numpy().view(np.uint16) for operand in operands]
    result = torch.from_numpy(compute(f"{name}.{kind}", *bits).view(np.int16)).view(dtype).double()
    unit = torch.finfo(dtype).eps / 2
    assert ((result - exact).abs() <= exact.abs() * unit * 1.0001 + 1e-7).all()
    packed = [half.astype(np.uint32) | half[::-1].astype(np.uint32) << 16 for half in bits]
    both = compute(f"{name}.{kind}x2", *packed)
    single = compute(f"{name}.{kind}", *bits)
    assert (both & 0xFFFF == single).all()
    assert (both >> 16 == single[::-1]).all()


def test_half_sign_operations_change_bits_only() -> None:
    bits = np.array([0x0000, 0x8000, 0x3F80, 0xFFC1, 0x7F80], np.uint16)
    assert compute("neg.bf16", bits).tolist() == (bits ^ 0x8000).tolist()
    assert compute("abs.f16", bits).tolist() == (bits & 0x7FFF).tolist()


def test_widening_fma_adds_to_single() -> None:
    a = torch.randn(100, generator=torch.Generator().manual_seed(0)).bfloat16()
    c = torch.randn(100, generator=torch.Generator().manual_seed(1))
    bits = a.view(torch.int16).numpy().view(np.uint16)
    expected = (a.double() * a.double() + c.double()).float().numpy()
    assert same(compute("fma.rn.f32.bf16", bits, bits, c.numpy()), expected)


def test_pairs_of_singles_equal_single_arithmetic() -> None:
    a, b, c = (np.random.default_rng(seed).normal(size=200).astype(np.float32) for seed in range(3))
    pairs = [operand.view(np.uint64) for operand in (a, b, c)]
    assert same(compute("fma.rn.f32x2", *pairs).view(np.float32), compute("fma.rn.f32", a, b, c))
    assert same(compute("add.rn.f32x2", *pairs[:2]).view(np.float32), a + b)


@pytest.mark.parametrize(
    ("mode", "expected"),
    [("rzi", [2, -2, 2, 0]), ("rni", [2, -2, 3, 0]), ("rmi", [2, -3, 2, -1]), ("rpi", [3, -2, 3, 0])],
)
def test_conversion_to_integer_rounds_and_clamps(mode: str, expected: list[int]) -> None:
    values = np.array([2.5, -2.5, 2.6, -0.4], np.float32)
    assert compute(f"cvt.{mode}.s32.f32", values).tolist() == expected
    extreme = np.array([3e9, -3e9, np.nan, np.inf, -np.inf], np.float32)
    limits = [2**31 - 1, -(2**31), 0, 2**31 - 1, -(2**31)]
    assert compute(f"cvt.{mode}.s32.f32", extreme).tolist() == limits
    assert compute(f"cvt.{mode}.f32.f32", values).tolist() == [float(value) for value in expected]


def test_conversion_from_integer_rounds_to_nearest() -> None:
    values = np.array([2**24 + 1, -(2**31), 2**31 - 1, 0, 7], np.int32)
    assert compute("cvt.rn.f32.s32", values).tolist() == values.astype(np.float32).tolist()
    assert compute("cvt.rn.f32.u8", np.array([0, 255, 128], np.uint8)).tolist() == [0.0, 255.0, 128.0]


def test_conversion_to_tf32_rounds_ties_away() -> None:
    values = np.array([1.0, 1 + 2.0**-11, -1 - 2.0**-11, 1 + 2.0**-12], np.float32)
    result = compute("cvt.rna.tf32.f32", values).view(np.float32)
    assert result.tolist() == [1.0, 1 + 2.0**-10, -1 - 2.0**-10, 1.0]


@pytest.mark.parametrize(
    ("relation", "expected"),
    [
        ("eq", [1, 0, 0, 0]),
        ("ne", [0, 1, 1, 0]),
        ("lt", [0, 1, 0, 0]),
        ("ge", [1, 0, 1, 0]),
        ("equ", [1, 0, 0, 1]),
        ("neu", [0, 1, 1, 1]),
        ("ltu", [0, 1, 0, 1]),
        ("leu", [1, 1, 0, 1]),
        ("gtu", [0, 0, 1, 1]),
        ("geu", [1, 0, 1, 1]),
        ("num", [1, 1, 1, 0]),
        ("nan", [0, 0, 0, 1]),
    ],
)
def test_comparison_with_nan(relation: str, expected: list[int]) -> None:
    instruction = parse(module(f"setp.{relation}.f32 %p1, %r1, %r2;")).kernel.instructions[0]
    a, b = np.array([1, 1, 2, np.nan], np.float32), np.array([1, 2, 1, 1], np.float32)
    assert comparison_of(instruction, relation).function(a, b).astype(int).tolist() == expected


@pytest.mark.parametrize(
    "name", ["add.rz.f32", "fma.rm.f32", "div.rn.f16", "cvt.rz.bf16.f32", "ex2.approx.f64", "cvt.rn.e4m3x2.f32"]
)
def test_unknown_form_is_an_error(name: str) -> None:
    with pytest.raises(UnsupportedInstructionError):
        compute(name, np.zeros(1, np.float32), np.zeros(1, np.float32))
