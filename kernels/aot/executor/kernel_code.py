"""Translate a function into basic blocks of steps that a machine executes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, NamedTuple

from .instructions import step_of
from .instructions.forms import check_form
from .parser import parse
from .pointers import written_parameters
from .ptx import Function, Instruction, Module, Variable
from .shared_memory import BASE
from .slots import Slots

if TYPE_CHECKING:
    from .machine import Machine

Step = Callable[["Machine"], None]

WARPGROUP = 4
"""Warps that execute wgmma together."""


class Block(NamedTuple):
    """Instructions without a branch between them, and how threads leave them."""

    steps: list[Step]
    first: int  # number of the first instruction
    last: int
    exit: Instruction | None  # a branch, barrier or return; None if the next block follows
    target: int  # block of a branch, or -1
    predicate: int  # slot of the branch's predicate, or -1


class Code(NamedTuple):
    """A kernel that is ready to run."""

    function: Function
    target: str
    slots: Slots
    blocks: list[Block]
    static_shared: int  # bytes of the shared variables of fixed size
    local_bytes: int  # of a thread
    granule: int  # bytes of the smallest access to shared memory
    group: int  # warps that have to run together
    has_async_proxy: bool
    tensor_columns: int  # upper bound of the columns that are allocated
    parameter_offsets: dict[str, int]  # in the block of parameters
    parameter_bytes: int
    written_parameters: frozenset[str]  # names of the parameters through which the kernel may store

    @property
    def instructions(self) -> list[Instruction]:
        return self.function.instructions


@functools.lru_cache(maxsize=64)
def load(ptx: str, kernel: str | None = None) -> Code:
    """Parse and translate a kernel; None for the only one of the module."""
    module = parse(ptx, kernel)
    function = module.kernel if kernel is None else module.kernels[kernel]
    return translate(module, function)


def translate(module: Module, function: Function) -> Code:
    """Translate a kernel.

    Raises:
        UnsupportedInstructionError: If the kernel has an instruction that is not known.
    """
    variables = module.variables + function.variables
    symbols, static_shared, local_bytes = _place_variables(variables)
    offsets, parameter_bytes = _offsets(function.parameters, 0)
    slots = Slots(function, symbols | offsets)
    instructions = function.instructions
    starts = _block_starts(function)
    numbers = {start: number for number, start in enumerate(starts)}
    blocks = []
    for start, end in zip(starts, [*starts[1:], len(instructions)], strict=True):
        final = instructions[end - 1] if ends_block(instructions[end - 1]) else None
        steps = [step_of(instruction, slots) for instruction in instructions[start : end - 1 if final else end]]
        target = predicate = -1
        if final is not None:
            _check_exit(final)
            if final.opcode == "bra":
                target = numbers.get(function.labels[final.label(0)], len(starts))
            if final.predicate is not None:
                predicate = slots.register(final.predicate)
        blocks.append(Block(steps, start, end - 1, final, target, predicate))
    opcodes = {instruction.opcode for instruction in instructions}
    return Code(
        function=function,
        target=module.target,
        slots=slots,
        blocks=blocks,
        static_shared=static_shared,
        local_bytes=local_bytes,
        granule=_granule(instructions),
        group=WARPGROUP if "wgmma" in opcodes else 1,
        has_async_proxy=bool(opcodes & {"wgmma", "tcgen05"}),
        tensor_columns=_tensor_columns(instructions),
        parameter_offsets=offsets,
        parameter_bytes=parameter_bytes,
        written_parameters=written_parameters(function),
    )


def ends_block(instruction: Instruction) -> bool:
    """Return whether threads may part or wait at an instruction."""
    if instruction.opcode in ("bar", "barrier"):
        return "warp" not in instruction.modifiers
    return instruction.opcode in ("bra", "ret", "exit")


def _block_starts(function: Function) -> list[int]:
    instructions = function.instructions
    starts = {0}
    for number, instruction in enumerate(instructions):
        if ends_block(instruction):
            starts.add(number + 1)
        if instruction.opcode == "bra":
            label = instruction.label(0)
            if label not in function.labels:
                raise instruction.unsupported(f"label {label} is not defined")
            starts.add(function.labels[label])
    return sorted(start for start in starts if start < len(instructions))


def _check_exit(instruction: Instruction) -> None:
    """Raise UnsupportedInstructionError for barriers of part of a CTA and unknown branches."""
    if instruction.opcode in ("bar", "barrier"):
        instruction.allow("sync", "cta", "aligned")
        if instruction.modifiers[-1:] == () or "sync" not in instruction.modifiers or len(instruction.operands) != 1:
            raise instruction.unsupported()
        if instruction.integer(0) != 0 or instruction.predicate is not None:
            raise instruction.unsupported("only barrier 0 of all threads is implemented")
    else:
        instruction.allow("uni")
    check_form(instruction)


def _place_variables(variables: list[Variable]) -> tuple[dict[str, int], int, int]:
    """Place shared and local variables in memory.

    Return their addresses, the bytes of shared memory and those of local memory.
    """
    shared = [variable for variable in variables if variable.space == "shared"]
    fixed, size = _offsets([variable for variable in shared if variable.size], BASE)
    for variable in shared:
        if not variable.size:
            fixed[variable.name] = -(-size // variable.alignment) * variable.alignment
    local, local_bytes = _offsets([variable for variable in variables if variable.space == "local"], 0)
    return fixed | local, size - BASE, local_bytes


def _offsets(variables: list[Variable], start: int) -> tuple[dict[str, int], int]:
    """Place variables one behind the other; return their offsets and the end."""
    offsets = {}
    for variable in variables:
        start = -(-start // variable.alignment) * variable.alignment
        offsets[variable.name] = start
        start += variable.size
    return offsets, start


def _granule(instructions: Iterable[Instruction]) -> int:
    """Return the bytes of the smallest access to shared memory."""
    sizes = {16}
    for instruction in instructions:
        if instruction.opcode in ("mbarrier", "tcgen05"):
            sizes.add(4 if "alloc" in instruction.modifiers else 8)
        elif instruction.opcode in ("ld", "st") and not {"global", "param", "local"} & set(instruction.modifiers):
            sizes.add(instruction.access_bytes)
        elif instruction.opcode == "cp" and len(instruction.operands) > 1:
            sizes.add(instruction.integer(2))
    return min(sizes)


def _tensor_columns(instructions: Iterable[Instruction]) -> int:
    columns = 0
    for instruction in instructions:
        if instruction.opcode == "tcgen05" and "alloc" in instruction.modifiers:
            columns += instruction.integer(1)
    return columns
