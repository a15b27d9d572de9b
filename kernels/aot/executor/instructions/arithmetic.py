"""Scalar arithmetic, comparisons and conversions."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from ..dtypes import PRED, Array, Dtype, unsigned
from ..operations import Operation, comparison_of, operation_of
from ..ptx import Instruction
from ..slots import Slots

if TYPE_CHECKING:
    from ..machine import Machine

Step = Callable[["Machine"], None]


def build(instruction: Instruction, slots: Slots) -> Step:
    """Return the step of a scalar instruction."""
    if instruction.opcode == "setp":
        return _comparison(instruction, slots)
    operation = operation_of(instruction)
    target = slots.target(instruction)
    count = len(operation.operands)
    if len(instruction.operands) != count + 1:
        raise instruction.unsupported(f"it has {len(instruction.operands)} operands")
    sources = [slots.operand(instruction, place + 1, dtype) for place, dtype in enumerate(operation.operands)]
    return _apply(_as_wide_as(operation, slots.kinds[target]), target, sources)


def _as_wide_as(operation: Operation, kind: Dtype) -> Operation:
    """Extend the result to the width of its register."""
    if operation.result.itemsize >= kind.itemsize:
        return operation
    function, narrow = operation.function, operation.result
    wide = kind if narrow.kind != "i" else np.dtype(f"int{8 * kind.itemsize}")
    bits = narrow if narrow.kind in "iu" else unsigned(narrow)
    return operation._replace(function=lambda *operands: function(*operands).view(bits).astype(wide), result=wide)


def _apply(operation: Operation, target: int, sources: list[int]) -> Step:
    """Return a step that applies a function to registers."""
    # One closure for each number of operands: a machine spends most of its time here.
    function, dtypes = operation.function, operation.operands
    if len(sources) == 1:
        (source,), (dtype,) = sources, dtypes

        def one(machine: Machine) -> None:
            registers = machine.registers
            a = registers.values[source]
            registers.write(target, function(a if a.dtype is dtype else registers.read(source, dtype)))

        return one
    if len(sources) == 2:
        (first, second), (first_type, second_type) = sources, dtypes

        def two(machine: Machine) -> None:
            registers = machine.registers
            values = registers.values
            a, b = values[first], values[second]
            if a.dtype is not first_type:
                a = registers.read(first, first_type)
            if b.dtype is not second_type:
                b = registers.read(second, second_type)
            registers.write(target, function(a, b))

        return two
    pairs = tuple(zip(sources, dtypes, strict=True))

    def several(machine: Machine) -> None:
        registers = machine.registers
        values = registers.values
        operands = [
            value if (value := values[source]).dtype is dtype else registers.read(source, dtype)
            for source, dtype in pairs
        ]
        registers.write(target, function(*operands))

    return several


_COMBINATIONS: dict[str, Callable[[Array, Array], Array]] = {
    "and": np.logical_and,
    "or": np.logical_or,
    "xor": np.logical_xor,
}


def _comparison(instruction: Instruction, slots: Slots) -> Step:
    """setp, with an optional second result. An optional predicate is combined with the results."""
    relation, *others = instruction.modifiers[:-1]
    combination = next((name for name in others if name in _COMBINATIONS), None)
    instruction.allow(relation, "ftz", instruction.modifiers[-1], *_COMBINATIONS)
    operation = comparison_of(instruction, relation)
    targets = slots.targets(instruction)
    if len(instruction.operands) != (4 if combination else 3) or len(targets) > 2:
        raise instruction.unsupported(f"it has {len(instruction.operands)} operands")
    sources = [slots.operand(instruction, place + 1, dtype) for place, dtype in enumerate(operation.operands)]
    if combination is None and len(targets) == 1 and targets[0] is not None:
        return _apply(operation, targets[0], sources)
    combine = _COMBINATIONS[combination] if combination else None
    predicate = slots.operand(instruction, 3, PRED) if combination else -1
    compare, dtypes = operation.function, operation.operands

    def step(machine: Machine) -> None:
        registers = machine.registers
        a, b = (registers.read(source, dtype) for source, dtype in zip(sources, dtypes, strict=True))
        result = compare(a, b)
        other = ~result
        if combine is not None:
            condition = registers.read(predicate, PRED)
            result, other = combine(result, condition), combine(other, condition)
        for target, values in zip(targets, (result, other), strict=False):
            if target is not None:
                registers.write(target, values)

    return step
