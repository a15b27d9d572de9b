"""Parse PTX text into a `Module`."""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Iterator
from typing import NamedTuple

from .errors import UnsupportedInstructionError
from .ptx import (
    Address,
    Function,
    Group,
    Immediate,
    Instruction,
    Module,
    Operand,
    Register,
    Scalar,
    Symbol,
    Variable,
    Vector,
)

_HEAD = re.compile(r"^(?:\.(?:visible|weak|extern|common)\s+)*\.(entry|func)\b", re.M)
_LOCATION = re.compile(
    r"\s*\.loc\s+(\d+)\s+(\d+)\s+(\d+)(?:\s*,?\s*function_name\s+\S+\s*,\s*inlined_at\s+(\d+)\s+(\d+)\s+(\d+))?"
    r"[^/]*(?://\s*(.*\S))?"
)
_FILE = re.compile(r'^\s*\.file\s+(\d+)\s+(?:"[^"]*"\s+)?"([^"]+)"', re.M)
_VARIABLE = re.compile(
    r"^(?:\.(?:visible|weak|extern|common)\s+)*\.(shared|local|param|global|const)\s+(?:\.attribute\([^)]*\)\s*)?(?:\.align\s+(\d+)\s+)?\.(\w+)\s+"
    r"(?:\.ptr\s*(?:\.\w+\s*)?(?:\.align\s+\d+\s+)?)?([\w$.]+)\s*((?:\[\s*\d*\s*\])*)\s*(?:=\s*(.*))?$",
    re.S,
)
_HEADING = re.compile(r"^[ \t]*\.(?:version|target|address_size|file)\b.*$", re.M)
"""Statements of a module without a semicolon."""
_DIRECTIVE = re.compile(r"\.(\w+)\s*([\d\s,]*)")
_LIMITS = ("reqntid", "maxntid", "minnctapersm", "maxnctapersm", "maxnreg", "noreturn")
"""Directives of a function that do not change what it computes."""
_CLUSTERS = ("reqnctapercluster", "explicitcluster", "maxclusterrank", "blocksareclusters")
_REGISTERS = re.compile(r"\.reg\s+\.(\w+)\s+(.+)$", re.S)
_INSTRUCTION = re.compile(r"(?:@(!?)\s*([%\w$]+)\s+)?([a-z][\w.:]*)\s*(.*)$", re.S)
_ADDRESS = re.compile(r"\[\s*([\w$%.]+)\s*(?:([+-])\s*(-?\w+)\s*)?\]$")
_COMMENT_OR_BRACE = re.compile(r"//[^\n]*|[{}]")
_OPERANDS = re.compile(r"(?:\{[^}]*\}|\[[^\]]*\]|\([^)]*\)|[^,{\[(])+")


def parse(text: str, kernel: str | None = None) -> Module:
    """Parse a module. Debug sections are skipped.

    Args:
        text: The PTX.
        kernel: The only function to parse; None for all.

    Raises:
        UnsupportedInstructionError: If a statement is not known.
    """
    target = re.search(r"^\.target\s+(\w+)", text, re.M)
    if target is None:
        raise ValueError("PTX without .target")
    files = {number: path.rpartition("/")[2] for number, path in _FILE.findall(text)}
    functions: dict[str, Function] = {}
    outside = []
    place = 0
    while head := _HEAD.search(text, place):
        outside.append(text[place : head.start()])
        function, place = _function(text, head, files, kernel)
        if function is not None:
            functions[function.name] = function
    outside.append(text[place:])
    variables = [
        _variable(statement)
        for part in outside
        for statement in _HEADING.sub("", _without_comments(part.partition("\t.section")[0])).split(";")
        if statement.strip()
    ]
    return Module(target[1], functions, variables)


def _without_comments(text: str) -> str:
    return re.sub(r"//.*", "", text)


def _function(text: str, head: re.Match[str], files: dict[str, str], wanted: str | None) -> tuple[Function | None, int]:
    """Return the function that begins at `head`, and where it ends; None for a declaration or an unwanted one."""
    body_start = text.find("{", head.end())
    semicolon = text.find(";", head.end())
    if body_start < 0 or 0 <= semicolon < body_start:
        return None, semicolon + 1
    signature = _without_comments(text[head.end() : body_start])
    end = _closing_brace(text, body_start)
    match = re.match(r"\s*(?:\(([^)]*)\)\s*)?([\w$]+)\s*(?:\(([^)]*)\))?(.*)$", signature, re.S)
    assert match is not None
    results, name, parameters, text_behind = match.groups()
    if wanted not in (None, name):
        return None, end + 1
    directives = _directives(name, text_behind)
    reader = _BodyReader(files)
    for line in text[body_start + 1 : end].splitlines():
        reader.line(line)
    return Function(
        name,
        [_variable(part) for part in (parameters or "").split(",") if part.strip()],
        [_variable(part) for part in (results or "").split(",") if part.strip()],
        head[1] == "entry",
        directives.get("reqntid"),
        directives.get("maxntid"),
        reader.registers,
        reader.variables,
        reader.instructions,
        reader.labels,
    ), end + 1


def _closing_brace(text: str, start: int) -> int:
    """Return the position of the brace that closes the one at `start`."""
    depth = 0
    for match in _COMMENT_OR_BRACE.finditer(text, start):
        if match[0] in "{}":
            depth += 1 if match[0] == "{" else -1
            if depth == 0:
                return match.start()
    raise ValueError("PTX with an unclosed brace")


def _directives(function: str, text: str) -> dict[str, tuple[int, ...]]:
    """Return the numbers of each directive between the parameters and the body."""
    rest = _DIRECTIVE.sub("", text).strip()
    found = {name: tuple(map(int, re.findall(r"\d+", numbers))) for name, numbers in _DIRECTIVE.findall(text)}
    if rest:
        raise UnsupportedInstructionError(f"unsupported directive of {function}: {' '.join(text.split())}")
    for name in found:
        if name in _CLUSTERS:
            raise UnsupportedInstructionError(f"unsupported directive of {function}: .{name} (clusters of CTAs)")
        if name not in _LIMITS:
            raise UnsupportedInstructionError(f"unsupported directive of {function}: .{name}")
    return found


_SIZES = {"pred": 1, "f16": 2, "bf16": 2, "f32": 4, "f64": 8} | {
    f"{letter}{bits}": bits // 8 for letter in "bus" for bits in (8, 16, 32, 64, 128)
}


def _variable(statement: str) -> Variable:
    match = _VARIABLE.search(" ".join(statement.split()))
    if match is None or match[3] not in _SIZES:
        raise UnsupportedInstructionError(f"unsupported declaration: {' '.join(statement.split())}")
    space, alignment, kind, name, extents, value = match.groups()
    item = _SIZES[kind]
    size = item
    for extent in re.findall(r"\[\s*(\d*)\s*\]", extents):
        size *= int(extent or 0)
    data = b""
    if value is not None:
        numbers = re.findall(r"0[fFdD][\da-fA-F]+|-?\w+", value)
        if any(re.match(r"0[fFdD]", number) or not re.match(r"-?\d", number) for number in numbers):
            raise UnsupportedInstructionError(f"unsupported initial value: {' '.join(statement.split())[:200]}")
        data = b"".join((int(number, 0) % (1 << 8 * item)).to_bytes(item, "little") for number in numbers)
    return Variable(name, space, int(alignment or item), size, data)


class _Scope(NamedTuple):
    """Braces inside a body, with their own registers, labels and variables."""

    first: int  # number of its first instruction
    names: dict[str, str]  # to names that are unique in the function


class _BodyReader:
    """Collect the statements of a function body, one line after another."""

    def __init__(self, files: dict[str, str]) -> None:
        self.registers: dict[str, str] = {}
        self.variables: list[Variable] = []
        self.instructions: list[Instruction] = []
        self.labels: dict[str, int] = {}
        self._files = files
        self._source = ""
        self._pending = ""
        self._scopes: list[_Scope] = []
        self._operands: dict[str, Operand] = {}
        self._names: dict[str, tuple[str, tuple[str, ...]]] = {}
        self._serial = 0

    def line(self, line: str) -> None:
        if line.lstrip().startswith((".loc ", ".loc\t")):
            self._locate(line)
            return
        self._pending += line.partition("//")[0] + " "
        for statement in self._statements():
            self._statement(statement)

    def _locate(self, line: str) -> None:
        match = _LOCATION.match(line)
        if match is None:
            raise UnsupportedInstructionError(f"unsupported location: {line.strip()}")
        file, row, column, outer_file, outer_row, outer_column, comment = match.groups()
        self._source = comment or f"{self._files.get(file, file)}:{row}:{column}"
        if outer_file and not comment:
            self._source += f" @[ {self._files.get(outer_file, outer_file)}:{outer_row}:{outer_column} ]"

    def _statements(self) -> Iterator[str]:
        """Yield the complete statements of the pending text; handle labels and braces."""
        while text := self._pending.lstrip():
            if label := re.match(r"([\w$]+):(?!:)", text):
                self._pending = text[label.end() :]
                self._label(label[1])
            elif text[0] in "{}":
                self._pending = text[1:]
                self._open() if text[0] == "{" else self._close()
            else:
                statement, end, rest = text.partition(";")
                if not end:
                    return
                self._pending = rest
                yield " ".join(statement.split())
        self._pending = ""

    def _unique(self, name: str) -> str:
        if not self._scopes:
            return name
        self._serial += 1
        return self._scopes[-1].names.setdefault(name, f"{name}.{self._serial}")

    def _label(self, name: str) -> None:
        self.labels[self._unique(name)] = len(self.instructions)

    def _open(self) -> None:
        self._scopes.append(_Scope(len(self.instructions), {}))

    def _close(self) -> None:
        """End a scope. Branches in it may stand before their label."""
        scope = self._scopes.pop()
        for number in range(scope.first, len(self.instructions)):
            branch = self.instructions[number]
            if branch.opcode == "bra" and branch.label(0) in scope.names:
                target = Symbol(scope.names[branch.label(0)])
                self.instructions[number] = dataclasses.replace(branch, operands=(target,))

    def _statement(self, text: str) -> None:
        if declared := _REGISTERS.match(text):
            self._declare(declared[1], declared[2])
        elif text.startswith((".shared", ".local", ".param")):
            variable = _variable(text)
            self.variables.append(variable._replace(name=self._unique(variable.name)))
        elif text.startswith(".pragma"):
            return
        elif text.startswith("."):
            raise UnsupportedInstructionError(f"unsupported directive: {text}")
        else:
            try:
                self.instructions.append(self._instruction(text))
            except UnsupportedInstructionError as error:
                raise UnsupportedInstructionError(f"unsupported instruction `{text}`: {error}") from error

    def _declare(self, kind: str, names: str) -> None:
        for name in re.split(r"\s*,\s*", names.strip()):
            if many := re.match(r"(%?[\w$]+)<(\d+)>$", name):
                self.registers.update({f"{many[1]}{number}": kind for number in range(int(many[2]))})
            else:
                self.registers[self._unique(name)] = kind

    def _name(self, text: str) -> tuple[str, tuple[str, ...]]:
        """Return opcode and modifiers."""
        opcode, *modifiers = text.replace("shared::cta", "shared").replace("::", "_").split(".")
        return sys.intern(opcode), tuple(map(sys.intern, modifiers))

    def _instruction(self, text: str) -> Instruction:
        match = _INSTRUCTION.match(text)
        if match is None:
            raise UnsupportedInstructionError(f"unsupported statement: {text}")
        negation, predicate, name, operands = match.groups()
        if name not in self._names:
            self._names[name] = self._name(name)
        return Instruction(
            *self._names[name],
            tuple(self._operand(part.strip()) for part in _OPERANDS.findall(operands) if part.strip()),
            self._resolve(predicate) if predicate else None,
            bool(negation),
            text,
            self._source,
            len(self.instructions),
        )

    def _operand(self, text: str) -> Operand:
        if self._scopes:  # names may differ from one scope to the next
            return self._parse_operand(text)
        found = self._operands.get(text)
        if found is None:
            found = self._operands[text] = self._parse_operand(text)
        return found

    def _parse_operand(self, text: str) -> Operand:
        if text.startswith("{"):
            parts = [part.strip() for part in text.strip("{}").split(",")]
            return Vector(tuple(None if part == "_" else self._scalar(part) for part in parts))
        if text.startswith("("):
            return Group(tuple(self._scalar(part.strip()) for part in text.strip("()").split(",") if part.strip()))
        if text.startswith("["):
            match = _ADDRESS.match(text)
            if match is None:
                raise UnsupportedInstructionError(f"unsupported address: {text}")
            base, sign, offset = match.groups()
            return Address(self._scalar(base), int(f"{sign or ''}{offset or 0}".replace("+-", "-"), 0))
        if "|" in text:
            parts = [part.strip() for part in text.split("|")]
            return Vector(tuple(None if part == "_" else self._scalar(part) for part in parts))
        return self._scalar(text)

    def _scalar(self, text: str) -> Scalar:
        if re.match(r"-?\d", text):
            return Immediate(text)
        name = self._resolve(text)
        return Register(name) if name.startswith("%") or name in self.registers else Symbol(name)

    def _resolve(self, name: str) -> str:
        for scope in reversed(self._scopes):
            if name in scope.names:
                return scope.names[name]
        return name
