"""Check that machine code of sm_90 waits before using a product's registers.

HGMMA reads and writes registers while the warps execute what follows. `gsb0` at a product ends a group, and
`WARPGROUP.DEPBAR.LE gsb0, n` waits until at most n groups are in flight. PTX forbids accesses before that, and Triton
emits some: moves that `ptxas` should remove. Other architectures have no such products.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from . import sass

PRODUCT = re.compile(r"HGMMA\.64x(\d+)x\d+\.F32")
REGISTER = re.compile(r"(?<![A-Z])R(\d+)(\.64)?")
A_REGISTERS = 4
"""Registers of a thread that hold 64 rows and 32 bytes of each."""
STORES = ("ST", "STG", "STS", "STL", "STSM", "RED", "LDGSTS", "BRA", "BAR", "EXIT", "RET", "CALL")
"""Instructions whose first operand is not a result."""


class Instruction(NamedTuple):
    """One line of machine code."""

    text: str
    name: str
    operands: tuple[str, ...]
    guard: str | None
    target: int = -1  # of a branch


class Group(NamedTuple):
    """Registers of products that end together."""

    sums: frozenset[int] = frozenset()
    factors: frozenset[int] = frozenset()

    def __or__(self, other: Group) -> Group:
        return Group(self.sums | other.sums, self.factors | other.factors)


State = tuple[Group, ...]
"""The open group, then those in flight, newest first."""
START: State = (Group(),)
MOST_GROUPS = 8
"""In flight that are told apart; older ones count as one."""


def find_accesses(disassembly: str) -> list[str]:
    """Return the instructions that use a product's registers before the wait.

    Each is followed by those registers.

    Args:
        disassembly: What `sass.disassemble` returns.
    """
    code = _parse(disassembly)
    before: dict[int, State] = {0: START} if code else {}
    pending, found = [0] if code else [], {}
    while pending:
        place = pending.pop()
        instruction, state = code[place], before[place]
        wrong = _touched(instruction, state)
        if wrong:
            found[place] = f"{instruction.text}: R{', R'.join(map(str, sorted(wrong)))}"
        after = _step(instruction, state)
        for following in _successors(place, instruction, len(code)):
            joined = _join(before.get(following), after)
            if joined != before.get(following):
                before[following] = joined
                pending.append(following)
    return [found[place] for place in sorted(found)]


def count_products(disassembly: str) -> int:
    """Return the number of warpgroup products."""
    return sum(PRODUCT.match(instruction.name) is not None for instruction in _parse(disassembly))


def _parse(disassembly: str) -> list[Instruction]:
    return [
        Instruction(
            f"{line.name} {line.operands}",
            line.name,
            tuple(part.strip() for part in line.operands.split(",")) if line.operands else (),
            line.guard,
            line.target,
        )
        for line in sass.parse(disassembly)
    ]


def _successors(place: int, instruction: Instruction, end: int) -> Iterator[int]:
    if instruction.target >= 0:
        yield instruction.target
    always_leaves = instruction.name.partition(".")[0] in ("BRA", "EXIT", "RET") and instruction.guard is None
    # A branch may have its condition among the operands.
    if place + 1 < end and not (always_leaves and len(instruction.operands) <= 1):
        yield place + 1


def _step(instruction: Instruction, state: State) -> State:
    """Return what is in flight behind an instruction."""
    open_group, *flying = state
    if product := PRODUCT.match(instruction.name):
        group = open_group | _registers_of(instruction, int(product[1]))
        if "gsb0" not in instruction.operands:
            return (group, *flying)
        if len(flying) == MOST_GROUPS:
            *flying, second, first = flying
            flying = [*flying, second | first]
        return (Group(), group, *flying)
    if instruction.name.startswith("WARPGROUP.DEPBAR"):
        return (open_group, *flying[: int(instruction.operands[1], 16)])
    return state


def _registers_of(instruction: Instruction, columns: int) -> Group:
    """Return the registers of a product: the sums, and the first factor unless it is in shared memory."""
    first = int(instruction.operands[0].removeprefix("R"))
    sums = frozenset(range(first, first + columns // 2))
    factor = REGISTER.match(instruction.operands[1])
    start = int(factor[1]) if factor else 0
    return Group(sums, frozenset(range(start, start + A_REGISTERS)) if factor else frozenset())


def _join(known: State | None, other: State) -> State:
    """Return everything that may be in flight where two paths meet."""
    if known is None:
        return other
    length = max(len(known), len(other))
    first, second = (state + (Group(),) * (length - len(state)) for state in (known, other))
    return tuple(one | two for one, two in zip(first, second, strict=True))


def _touched(instruction: Instruction, state: State) -> set[int]:
    """Return the registers in flight that an instruction may not use: sums, and factors that it would write."""
    written, read = _accesses(instruction)
    sums = frozenset().union(*(group.sums for group in state))
    factors = frozenset().union(*(group.factors for group in state))
    if PRODUCT.match(instruction.name):
        # Products execute in order: they may add to the same sums.
        return set(written & factors | read & sums)
    return set((written | read) & sums | written & factors)


def _accesses(instruction: Instruction) -> tuple[set[int], set[int]]:
    """Return at least the registers that an instruction writes and reads."""
    if product := PRODUCT.match(instruction.name):
        group = _registers_of(instruction, int(product[1]))
        return set(group.sums), set(group.factors)
    written: set[int] = set()
    read: set[int] = set()
    results = 0 if instruction.name.partition(".")[0] in STORES else 1
    for place, operand in enumerate(instruction.operands):
        for found in REGISTER.finditer(operand):
            is_address = "[" in operand
            width = (2 if found[2] else 1) if is_address else _width(instruction.name)
            registers = set(range(int(found[1]), int(found[1]) + width))
            (written if place < results and not is_address else read).update(registers)
    return written, read


def _width(name: str) -> int:
    """Return the registers of an operand that is not an address."""
    if ".128" in name or name.endswith(".M88.4"):
        return 4
    return 2 if ".64" in name or name.endswith(".M88.2") else 1
