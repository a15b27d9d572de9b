"""PTX as objects: modules, kernels, instructions and their operands."""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

from .errors import UnsupportedInstructionError


class Register(NamedTuple):
    """A virtual or special register."""

    name: str


class Immediate(NamedTuple):
    """A number as written: 12, -1, 0x10, 0f3F800000."""

    text: str


class Symbol(NamedTuple):
    """A label, a function or the address of a variable."""

    name: str


Scalar = Register | Immediate | Symbol


class Vector(NamedTuple):
    """Operands in braces, or the two results of `p|q`."""

    items: tuple[Scalar | None, ...]  # None for the sink `_`


class Address(NamedTuple):
    """An operand in brackets."""

    base: Scalar
    offset: int


class Group(NamedTuple):
    """Operands in parentheses: parameters of a call."""

    items: tuple[Scalar, ...]


Operand = Register | Immediate | Symbol | Vector | Address | Group


@dataclasses.dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction. `::` in names is written `_`, and `shared::cta` is `shared`."""

    opcode: str  # "setp"
    modifiers: tuple[str, ...]  # ("lt", "s32")
    operands: tuple[Operand, ...]
    predicate: str | None  # name of a register
    negated: bool  # whether the predicate is `@!p`
    text: str  # as written
    source: str  # "forward.py:91:87 @[ forward.py:206:47 ]", or empty
    number: int = 0  # in its function

    @property
    def name(self) -> str:
        """Opcode and modifiers."""
        return ".".join((self.opcode, *self.modifiers))

    def __str__(self) -> str:
        return f"`{self.text}`" + (f" from {self.source}" if self.source else "")

    def unsupported(self, reason: str = "") -> UnsupportedInstructionError:
        """Return the error for a form that is not implemented."""
        return UnsupportedInstructionError(f"unsupported instruction {self}" + (f": {reason}" if reason else ""))

    def allow(self, *names: str) -> None:
        """Raise UnsupportedInstructionError if a modifier is not one of `names`."""
        unknown = set(self.modifiers).difference(names)
        if unknown:
            raise self.unsupported(f".{', .'.join(sorted(unknown))} is not implemented")

    def operand(self, position: int) -> Operand:
        if position >= len(self.operands):
            raise self.unsupported(f"it has {len(self.operands)} operands")
        return self.operands[position]

    def scalar(self, position: int) -> Scalar:
        operand = self.operand(position)
        if not isinstance(operand, Register | Immediate | Symbol):
            raise self.unsupported(f"operand {position} is not a scalar")
        return operand

    def register(self, position: int) -> str:
        """Return the name of a register operand."""
        operand = self.operand(position)
        if not isinstance(operand, Register):
            raise self.unsupported(f"operand {position} is not a register")
        return operand.name

    def items(self, position: int) -> tuple[Scalar, ...]:
        """Return the parts of a vector operand, or a scalar alone. Sinks are not supported."""
        operand = self.operand(position)
        parts = operand.items if isinstance(operand, Vector) else (operand,)
        scalars = tuple(part for part in parts if isinstance(part, Register | Immediate | Symbol))
        if len(scalars) != len(parts):
            raise self.unsupported(f"operand {position} has a sink")
        return scalars

    def address(self, position: int) -> Address:
        operand = self.operand(position)
        if not isinstance(operand, Address):
            raise self.unsupported(f"operand {position} is not an address")
        return operand

    def integer(self, position: int) -> int:
        """Return the value of an integer constant."""
        operand = self.operand(position)
        if not isinstance(operand, Immediate):
            raise self.unsupported(f"operand {position} is not a constant")
        return int(operand.text.rstrip("U"), 0)

    @property
    def access_bytes(self) -> int:
        """Bytes that one thread loads or stores by `ld` or `st`."""
        bits = int(self.modifiers[-1].removeprefix("bf").lstrip("bsuf"))
        vector = next((int(name[1:]) for name in self.modifiers if name in ("v2", "v4", "v8")), 1)
        return bits * vector // 8

    def label(self, position: int) -> str:
        operand = self.operand(position)
        if not isinstance(operand, Symbol):
            raise self.unsupported(f"operand {position} is not a label")
        return operand.name


class Variable(NamedTuple):
    """A variable in shared, local, param, global or const memory."""

    name: str
    space: str
    alignment: int
    size: int  # bytes; 0 for an array whose size the launch decides
    data: bytes = b""


@dataclasses.dataclass
class Function:
    """The body of a kernel or of a `.func`."""

    name: str
    parameters: list[Variable]
    results: list[Variable]  # of a `.func`
    is_kernel: bool
    required_threads: tuple[int, ...] | None  # of `.reqntid`
    maximum_threads: tuple[int, ...] | None  # of `.maxntid`
    registers: dict[str, str]  # name to type
    variables: list[Variable]
    instructions: list[Instruction]
    labels: dict[str, int]  # label to the number of the instruction behind it

    @property
    def threads(self) -> int | None:
        """Threads of a CTA, if the module says how many."""
        return None if self.required_threads is None else math.prod(self.required_threads)


@dataclasses.dataclass
class Module:
    """A PTX file."""

    target: str  # "sm_90a"
    functions: dict[str, Function]
    variables: list[Variable]

    @property
    def kernels(self) -> dict[str, Function]:
        return {name: function for name, function in self.functions.items() if function.is_kernel}

    @property
    def kernel(self) -> Function:
        """Return the only kernel.

        Raises:
            ValueError: If the module has none or several.
        """
        kernels = list(self.kernels.values())
        if len(kernels) != 1:
            raise ValueError(f"the module has {len(kernels)} kernels (expected 1): {', '.join(self.kernels)}")
        return kernels[0]
