"""Choose the function that computes a scalar instruction."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from . import floats, integers
from .dtypes import DTYPES, F32, F64, PRED, U16, U32, U64, WIDER, Array, Dtype, unsigned
from .ptx import Immediate, Instruction

Function = Callable[..., Array]


class Operation(NamedTuple):
    """A function of arrays and its types. An array holds one element per thread, or one for all."""

    function: Function
    result: Dtype
    operands: tuple[Dtype, ...]


def operation_of(instruction: Instruction) -> Operation:
    """Return the operation of a scalar instruction.

    Raises:
        UnsupportedInstructionError: If the instruction or one of its modifiers is not known.
    """
    builder = _BUILDERS.get(instruction.opcode)
    if builder is None:
        raise instruction.unsupported()
    return builder(instruction)


def _type_of(instruction: Instruction) -> tuple[str, Dtype]:
    if not instruction.modifiers or instruction.modifiers[-1] not in DTYPES:
        raise instruction.unsupported("its type is not known")
    return instruction.modifiers[-1], DTYPES[instruction.modifiers[-1]]


def _arithmetic(instruction: Instruction) -> Operation:
    """Operands and result of one type."""
    kind, dtype = _type_of(instruction)
    if kind in ("f32", "f64", "f32x2"):
        return _float_arithmetic(instruction, kind)
    if kind in ("f16", "bf16", "f16x2", "bf16x2"):
        return _half_arithmetic(instruction, kind)
    function = integers.PLAIN.get(instruction.opcode)
    if function is None or len(instruction.modifiers) != 1:
        raise instruction.unsupported()
    count = {"not": 1, "neg": 1, "abs": 1, "sad": 3}.get(instruction.opcode, 2)
    return Operation(function, dtype, (dtype,) * count)


_DOUBLE = ("add", "sub", "mul", "div", "min", "max", "neg", "abs", "sqrt", "rcp")
"""Operations on fp64 that are exact or rounded once."""


def _float_arithmetic(instruction: Instruction, kind: str) -> Operation:
    opcode, dtype = instruction.opcode, DTYPES[kind]
    instruction.allow("rn", "approx", "full", "ftz", "sat", "NaN", kind)
    function = floats.PLAIN.get(opcode)
    if function is None or (kind == "f64" and opcode not in _DOUBLE):
        raise instruction.unsupported()
    count = floats.OPERANDS.get(opcode, 2)
    if "NaN" in instruction.modifiers:
        function = {"min": np.minimum, "max": np.maximum}[opcode]
    if opcode in ("min", "max") and len(instruction.operands) == 4:
        function, count = _of_three(function), 3
    if "ftz" in instruction.modifiers:
        function = _flushing(function)
    if "sat" in instruction.modifiers:
        function = _saturating(function)
    if kind == "f32x2":
        function = _on_pairs(function)
    return Operation(function, dtype, (dtype,) * count)


def _half_arithmetic(instruction: Instruction, kind: str) -> Operation:
    """16-bit floats, one or two; `add`, `sub` and `fma` may also widen them to fp32."""
    opcode, dtype = instruction.opcode, unsigned(DTYPES[kind])
    widen = floats.bf16_to_f32 if kind.startswith("bf16") else floats.f16_to_f32
    if "f32" in instruction.modifiers and opcode in ("add", "sub", "fma") and not kind.endswith("x2"):
        instruction.allow("rn", "f32", kind)
        return Operation(
            _widening(floats.PLAIN[opcode], widen), F32, (U16,) * (floats.OPERANDS.get(opcode, 2) - 1) + (F32,)
        )
    instruction.allow("rn", "approx", "NaN", kind)
    if opcode in floats.SIGN_BITS:
        return Operation(floats.SIGN_BITS[opcode], dtype, (dtype,))
    function = floats.HALF.get(opcode)
    if "NaN" in instruction.modifiers:
        function = {"min": np.minimum, "max": np.maximum}.get(opcode)
    if function is None:
        raise instruction.unsupported()
    narrow = floats.f64_to_bf16 if kind.startswith("bf16") else floats.f64_to_f16
    on_one = _in_double(function, widen, narrow)
    applied = _on_halves(on_one) if kind.endswith("x2") else on_one
    return Operation(applied, dtype, (dtype,) * floats.OPERANDS.get(opcode, 2))


def _of_three(function: Function) -> Function:
    return lambda a, b, c: function(function(a, b), c)


def _flushing(function: Function) -> Function:
    return lambda *operands: floats.flush(function(*map(floats.flush, operands)))


def _saturating(function: Function) -> Function:
    return lambda *operands: floats.saturate(function(*operands))


def _widening(function: Function, widen: Callable[[Array], Array]) -> Function:
    return lambda *operands: function(*map(widen, operands[:-1]), operands[-1])


def _in_double(function: Function, widen: Callable[[Array], Array], narrow: Callable[[Array], Array]) -> Function:
    return lambda *operands: narrow(function(*(widen(operand).astype(F64) for operand in operands)))


def _on_halves(function: Function) -> Function:
    """Apply to both halves of 32-bit registers."""

    def apply(*operands: Array) -> Array:
        parts = zip(*map(floats.low_and_high, operands), strict=True)
        return floats.join_halves(*(function(*part) for part in parts))

    return apply


def _on_pairs(function: Function) -> Function:
    """Apply to both fp32 numbers of 64-bit registers."""

    def apply(*operands: Array) -> Array:
        pairs = [np.ascontiguousarray(operand).view(F32).reshape(-1, 2) for operand in operands]
        return np.ascontiguousarray(function(*pairs)).reshape(-1).view(U64)

    return apply


def _multiplication(instruction: Instruction) -> Operation:
    """mul and mad of integers in three forms; mul of floats."""
    kind, dtype = _type_of(instruction)
    if dtype.kind == "f" or kind.startswith(("bf16", "f16", "f32")):
        if instruction.opcode == "mad":
            raise instruction.unsupported()
        return _arithmetic(instruction)
    if len(instruction.modifiers) != 2:
        raise instruction.unsupported()
    form = instruction.modifiers[0]
    products: dict[str, Function] = {
        "lo": np.multiply,
        "wide": integers.wide_product,
        "hi": integers.high_product,
    }
    if form not in products or (form == "wide" and dtype not in WIDER):
        raise instruction.unsupported()
    product, result = products[form], WIDER[dtype] if form == "wide" else dtype
    if instruction.opcode == "mul":
        return Operation(product, result, (dtype, dtype))
    return Operation(lambda a, b, c: product(a, b) + c, result, (dtype, dtype, result))


def _shift(instruction: Instruction) -> Operation:
    _, dtype = _type_of(instruction)
    instruction.allow(instruction.modifiers[-1])
    amount = instruction.operand(2)
    is_left = instruction.opcode == "shl"
    if isinstance(amount, Immediate) and int(amount.text, 0) < 8 * dtype.itemsize:
        plain: Function = np.left_shift if is_left else np.right_shift
        return Operation(lambda a, bits: plain(a, bits.astype(a.dtype)), dtype, (dtype, U32))
    return Operation(integers.shift_left if is_left else integers.shift_right, dtype, (dtype, U32))


_INTEGER_COMPARISONS: dict[str, Function] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
}


def comparison_of(instruction: Instruction, relation: str) -> Operation:
    """Return the comparison of a `setp` or `set`."""
    kind, dtype = _type_of(instruction)
    if kind in ("f16", "bf16"):
        widen = floats.f16_to_f32 if kind == "f16" else floats.bf16_to_f32
        compare = floats.COMPARISONS.get(relation)
        if compare is None:
            raise instruction.unsupported()
        return Operation(lambda a, b: compare(widen(a), widen(b)), PRED, (U16, U16))
    function = (floats.COMPARISONS if dtype.kind == "f" else _INTEGER_COMPARISONS).get(relation)
    if function is None or kind.endswith("x2"):
        raise instruction.unsupported()
    return Operation(_flushing_operands(function) if "ftz" in instruction.modifiers else function, PRED, (dtype, dtype))


def _flushing_operands(function: Function) -> Function:
    return lambda a, b: function(floats.flush(a), floats.flush(b))


def _selection(instruction: Instruction) -> Operation:
    kind, dtype = _type_of(instruction)
    instruction.allow(kind)
    return Operation(_select, dtype, (dtype, dtype, PRED))


def _select(a: Array, b: Array, condition: Array) -> Array:
    return np.where(condition, a, b)


def _bits(function: Function, count: int, kinds: tuple[str, ...] = ("b32",)) -> Callable[[Instruction], Operation]:
    def build(instruction: Instruction) -> Operation:
        kind, dtype = _type_of(instruction)
        if kind not in kinds or len(instruction.modifiers) != 1:
            raise instruction.unsupported()
        result = U32 if instruction.opcode in ("popc", "clz") else dtype
        return Operation(function, result, (dtype,) * count)

    return build


def _bit_field(instruction: Instruction) -> Operation:
    kind, dtype = _type_of(instruction)
    instruction.allow(kind)
    if instruction.opcode == "bfi":
        return Operation(integers.insert_bits, dtype, (dtype, dtype, U32, U32))
    return Operation(integers.extract_bits, dtype, (dtype, U32, U32))


def _funnel_shift(instruction: Instruction) -> Operation:
    instruction.allow("l", "r", "wrap", "clamp", "b32")
    function = integers.funnel_left if instruction.modifiers[0] == "l" else integers.funnel_right
    return Operation(functools.partial(function, wraps="wrap" in instruction.modifiers), U32, (U32, U32, U32))


def _conversion(instruction: Instruction) -> Operation:
    *modifiers, to, source = instruction.modifiers
    found = _float_conversion(to, source, set(modifiers))
    if found is not None:
        return found
    a, b = DTYPES.get(to), DTYPES.get(source)
    if a is None or b is None or to.endswith("x2") or "bf16" in (to, source):
        raise instruction.unsupported()
    rounding = set(modifiers) - {"ftz"}
    if b.kind == "f" and a.kind != "f":
        if rounding not in ({"rzi"}, {"rni"}, {"rmi"}, {"rpi"}):
            raise instruction.unsupported()
        return Operation(functools.partial(_to_integer, mode=rounding.pop(), dtype=a), a, (b,))
    if b.kind == a.kind == "f" and rounding in ({"rzi"}, {"rni"}, {"rmi"}, {"rpi"}):
        return Operation(_ROUND_TO_INTEGER[rounding.pop()], a, (b,))
    if rounding - {"rn"} or (b.itemsize == 8 and to == "f16"):
        raise instruction.unsupported()
    return Operation(lambda x: x.astype(a), a, (b,))


_ROUND_TO_INTEGER: dict[str, Function] = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}


def _to_integer(x: Array, mode: str, dtype: Dtype) -> Array:
    """Round and clamp to the range of the type; NaN becomes 0."""
    limits = np.iinfo(dtype)
    whole = np.nan_to_num(_ROUND_TO_INTEGER[mode](x.astype(F64)), nan=0.0, posinf=np.inf, neginf=-np.inf)
    inside = (whole > limits.min) & (whole < limits.max)
    result = np.where(inside, whole, 0).astype(dtype)
    result = np.where(whole >= limits.max, dtype.type(limits.max), result)
    return np.where(whole <= limits.min, dtype.type(limits.min), result)


def _float_conversion(to: str, source: str, modifiers: set[str]) -> Operation | None:
    """Return a conversion that involves 16-bit floats or tf32. Return None if it is not one of them."""
    plain, rounded = modifiers <= {"ftz"}, modifiers <= {"rn", "ftz"} and "rn" in modifiers
    if (to, source) == ("f32", "bf16") and plain:
        return Operation(floats.bf16_to_f32, F32, (U16,))
    if (to, source) == ("f32", "f16") and plain:
        return Operation(floats.f16_to_f32, F32, (U16,))
    if source != "f32":
        return None
    if to == "tf32" and modifiers == {"rna"}:
        return Operation(floats.f32_to_tf32, U32, (F32,))
    narrow = {"bf16": floats.f32_to_bf16, "f16": floats.f32_to_f16}.get(to.removesuffix("x2"))
    if narrow is None or not rounded:
        return None
    if to.endswith("x2"):
        return Operation(lambda high, low: floats.join_halves(narrow(low), narrow(high)), U32, (F32, F32))
    return Operation(narrow, U16, (F32,))


_BUILDERS: dict[str, Callable[[Instruction], Operation]] = {
    **dict.fromkeys({*integers.PLAIN, *floats.PLAIN} - {"mul"}, _arithmetic),
    **dict.fromkeys(("mul", "mad"), _multiplication),
    **dict.fromkeys(("shl", "shr"), _shift),
    **dict.fromkeys(("bfe", "bfi"), _bit_field),
    "selp": _selection,
    "cvt": _conversion,
    "shf": _funnel_shift,
    "prmt": _bits(integers.permute_bytes, 3),
    "lop3": _bits(integers.combine_logically, 4),
    "popc": _bits(integers.count_ones, 1, ("b32", "b64")),
    "clz": _bits(integers.count_leading_zeros, 1, ("b32", "b64")),
    "brev": _bits(integers.reverse_bits, 1, ("b32", "b64")),
}
