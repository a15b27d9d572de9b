"""Places of registers, constants and variables of a function."""

from __future__ import annotations

import struct
from collections.abc import Mapping

import numpy as np

from .dtypes import DTYPES, F32, F64, PRED, U32, Array, Dtype, unsigned
from .errors import UnsupportedInstructionError
from .ptx import Address, Function, Immediate, Instruction, Register, Scalar

SPECIAL = (
    *(f"%{name}.{axis}" for name in ("tid", "ntid", "ctaid", "nctaid") for axis in "xyz"),
    "%laneid",
)
"""Special registers; all are 32 bits."""


class Slots:
    """Numbers of the arrays in a register file.

    Args:
        function: Its registers come first.
        symbols: Addresses of variables.
    """

    def __init__(self, function: Function, symbols: Mapping[str, int]) -> None:
        self.kinds: list[Dtype] = []
        self.names: list[str] = []
        self.constants: dict[int, Array] = {}
        self._numbers: dict[object, int] = {}
        self._symbols = symbols
        for name, kind in function.registers.items():
            self._new(name, name, unsigned(DTYPES[kind]))
        for name in SPECIAL:
            self._new(name, name, U32)

    def register(self, name: str) -> int:
        number = self._numbers.get(name)
        if number is None:
            raise UnsupportedInstructionError(f"unsupported register: {name}")
        return number

    def constant(self, value: Array) -> int:
        """Return the slot of an array of one element."""
        key = (value.dtype.str, value.tobytes())
        if key not in self._numbers:
            self.constants[self._new(key, "constant", value.dtype)] = value
        return self._numbers[key]

    def scalar(self, operand: Scalar, dtype: Dtype) -> int:
        """Return the slot of a register, a number or an address. It is read as `dtype`."""
        if isinstance(operand, Register):
            return self.register(operand.name)
        if isinstance(operand, Immediate):
            return self.constant(number(operand.text, dtype))
        if operand.name not in self._symbols:
            raise UnsupportedInstructionError(f"unsupported variable: {operand.name}")
        return self.constant(number(str(self._symbols[operand.name]), dtype))

    def operand(self, instruction: Instruction, position: int, dtype: Dtype) -> int:
        return self.scalar(instruction.scalar(position), dtype)

    def operands(self, instruction: Instruction, position: int, dtype: Dtype) -> list[int]:
        """Return the slots of a vector operand, or of a scalar alone."""
        return [self.scalar(item, dtype) for item in instruction.items(position)]

    def target(self, instruction: Instruction, position: int = 0) -> int:
        return self.register(instruction.register(position))

    def targets(self, instruction: Instruction, position: int = 0) -> list[int | None]:
        """Return the slots of the results, None for the sink `_`."""
        operand = instruction.operand(position)
        items = (operand,) if isinstance(operand, Register) else getattr(operand, "items", ())
        if not items or any(item is not None and not isinstance(item, Register) for item in items):
            raise instruction.unsupported(f"operand {position} is not made of registers")
        return [None if item is None else self.register(item.name) for item in items]

    def base(self, address: Address, dtype: Dtype) -> int:
        return self.scalar(address.base, dtype)

    def _new(self, key: object, name: str, dtype: Dtype) -> int:
        self._numbers[key] = len(self.kinds)
        self.kinds.append(dtype)
        self.names.append(name)
        return self._numbers[key]


def number(text: str, dtype: Dtype) -> Array:
    """Return the array of one element for a constant in an instruction."""
    if text[:2] in ("0f", "0F"):
        bits = bytes.fromhex(text[2:])
        if dtype == F32:
            return np.array(struct.unpack(">f", bits), F32)
        return np.array([int.from_bytes(bits)], unsigned(dtype)).view(dtype)
    if text[:2] in ("0d", "0D"):
        return np.array(struct.unpack(">d", bytes.fromhex(text[2:])), F64)
    if dtype.kind == "f":
        return np.array([float(text)], dtype)
    value = int(text.rstrip("U"), 0)
    if dtype == PRED:
        return np.array([value != 0])
    return np.array([value % (1 << 8 * dtype.itemsize)], unsigned(dtype)).view(dtype)
