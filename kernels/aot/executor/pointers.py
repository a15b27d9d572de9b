"""Which parameters of a kernel hold pointers that it may store through."""

from __future__ import annotations

from collections.abc import Iterator

from .ptx import Address, Function, Group, Operand, Register, Scalar, Symbol, Vector


def written_parameters(function: Function) -> frozenset[str]:
    """Return names of parameters that may reach the address of a store.

    The analysis ignores the order of instructions, and a value in memory has no source, except in parameters.
    """
    parameters = {variable.name for variable in function.parameters}
    sources: dict[str, frozenset[str]] = {}

    def reached(operand: Operand) -> frozenset[str]:
        names: frozenset[str] = frozenset()
        for item in _scalars(operand):
            if isinstance(item, Register):
                names |= sources.get(item.name, frozenset())
            elif isinstance(item, Symbol) and item.name in parameters:
                names |= {item.name}
        return names

    flows = list(_flows(function, parameters))
    changed = True
    while changed:
        changed = False
        for targets, origins in flows:
            found: frozenset[str] = frozenset()
            for origin in origins:
                found |= {origin} if origin in parameters else sources.get(origin, frozenset())
            for target in targets if found else ():
                if not found <= sources.get(target, frozenset()):
                    sources[target] = sources.get(target, frozenset()) | found
                    changed = True
    stores = (one for one in function.instructions if one.opcode == "st" and "shared" not in one.modifiers)
    return frozenset().union(*(reached(store.operands[0]) for store in stores))


def _flows(function: Function, parameters: set[str]) -> Iterator[tuple[list[str], list[str]]]:
    """Yield what each instruction writes and reads. It writes registers, and it reads registers and parameters."""
    for instruction in function.instructions:
        if len(instruction.operands) < 2 or instruction.opcode == "st":
            continue
        if instruction.opcode == "ld" and "param" not in instruction.modifiers:
            continue
        origins = [
            item.name
            for operand in instruction.operands[1:]
            for item in _scalars(operand)
            if isinstance(item, Register) or (isinstance(item, Symbol) and item.name in parameters)
        ]
        targets = [item.name for item in _scalars(instruction.operands[0]) if isinstance(item, Register)]
        if origins and targets:
            yield targets, origins


def _scalars(operand: Operand) -> Iterator[Scalar]:
    if isinstance(operand, Address):
        yield operand.base
    elif isinstance(operand, Vector | Group):
        for item in operand.items:
            if item is not None:
                yield item
    else:
        yield operand
