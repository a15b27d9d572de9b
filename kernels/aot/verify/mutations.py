"""Ways to break the PTX of a kernel in one place."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

Replacement = str | Callable[[re.Match[str]], str]
Mutations = Mapping[str, tuple[str, Replacement]]
"""Pattern and replacement by kind."""


class Mutant(NamedTuple):
    """A module with one change."""

    kind: str
    line: int  # of the module, from 1
    statement: str  # before the change
    ptx: str


class Limits(NamedTuple):
    """Largest numbers of mutants of each kind and kernel."""

    order: int | None = None  # of the kinds of `ORDER`; None for all
    other: int = 2


def _shifted(bytes_: int) -> Replacement:
    """Move an address by an offset. The offset is in the text already, or is added to it."""
    return lambda found: f"{found[1]}+{int(found[2] or 0) + bytes_}]"


def _larger(amount: int) -> Replacement:
    return lambda found: f"{found[1]}{int(found[2]) + amount}"


def _flipped(found: re.Match[str]) -> str:
    return f"{found[1]}{1 - int(found[2])}{found[3]}"


def _computed(kind: str, name: str, value: int | None = None) -> Replacement:
    """Compute an operand, the second group, from itself: the instruction reads a register of its own."""

    def replace(found: re.Match[str]) -> str:
        operands = ", ".join(["changed", found[2], *([] if value is None else [str(value)])])
        return f"{{ .reg .{kind} changed; {name}.{kind} {operands}; {found[1]}changed{found[3]} }}"

    return replace


_SHARED = r"shared(?:::cta)?"
_MATRIX = r"matrix\.sync\.aligned\.m8n8\.x\d"
_TENSOR = r"@%p\d+ tcgen05\.mma[^\[]*\[[^\]]*\]"  # a product, up to its sums
_PRODUCT = rf"(?:wgmma\.mma_async[^{{]*\{{[^}}]*\}}|{_TENSOR})"
_FIRST = rf"({_PRODUCT}, )(%rd\d+)(, %rd\d+,[^;]*;)"
_SECOND = rf"({_PRODUCT}, (?:%rd\d+|\{{[^}}]*\}}|\[[^\]]*\]), )(%rd\d+)(,[^;]*;)"
_SHAPE = r"[^;]*?, )(%r\d+)(, %p\d+;)"
_OTHER_SWIZZLE = _computed("b64", "xor", 3 << 62)
_OTHER_STRIDE = _computed("b64", "xor", 1 << 32)
_16_BYTES = _computed("s64", "add", 1)  # descriptors count in 16 bytes

ORDER: Mutations = {
    "barrier dropped": (r"^[ \t]*bar(?:rier)?\.(?:cta\.|warp\.)?sync[^;]*;", ""),
    "wait for copies dropped": (r"^[ \t]*cp\.async\.wait_group[^;]*;", ""),
    "wait for one group of copies less": (r"(cp\.async\.wait_group[ \t]+)(\d+)", _larger(1)),
    "commit of copies dropped": (r"^[ \t]*cp\.async\.commit_group;", ""),
    "fence between proxies dropped": (r"^[ \t]*fence\.proxy\.async[^;]*;", ""),
    "wait for warpgroup products dropped": (r"^[ \t]*wgmma\.wait_group[^;]*;", ""),
    "wait for one group of warpgroup products less": (r"(wgmma\.wait_group\.sync\.aligned[ \t]+)(\d+)", _larger(1)),
    "commit of warpgroup products dropped": (r"^[ \t]*wgmma\.commit_group[^;]*;", ""),
    "fence of warpgroup products dropped": (r"^[ \t]*wgmma\.fence[^;]*;", ""),
    "wait for an mbarrier dropped": (r"^[ \t]*mbarrier\.try_wait[^;]*;\s*@!complete bra\.uni waitLoop;", ""),
    "wait for the other phase of an mbarrier": (
        r"(mbarrier\.try_wait[^\[;]*\[[^\]]*\], )(%r\d+)(;)",
        _computed("b32", "xor", 1),
    ),
    "invalidation of an mbarrier dropped": (r"^[ \t]*@%p\d+ mbarrier\.inval[^;]*;", ""),
    "commit of tensor products dropped": (r"^[ \t]*@%p\d+ tcgen05\.commit[^;]*;", ""),
    "wait for loads of tensor memory dropped": (r"^[ \t]*tcgen05\.wait::ld[^;]*;", ""),
    "wait for stores of tensor memory dropped": (r"^[ \t]*tcgen05\.wait::st[^;]*;", ""),
}
"""Changes of the order in which threads, copies and products run."""

_ADDRESSES: Mutations = {
    "global access 16 bytes further": (
        r"((?:ld|st)\.(?:volatile\.)?global\.[^\[;]*\[ *%rd\d+)(?: \+ 0|\+(\d+))? *\]",
        _shifted(16),
    ),
    "copy from 16 bytes further": (
        r"(cp\.async\.c[ga]\.shared\.global \[[^\]]*\], \[ *%rd\d+)(?: \+ 0)?( *\])",
        r"\1 + 16\2",
    ),
    "copy to 16 bytes further": (r"(cp\.async\.c[ga]\.shared\.global \[ *%r\d+)(?: \+ 0)?( *\])", r"\1 + 16\2"),
    "shared access 16 bytes further": (
        rf"((?:ld|st)\.{_SHARED}\.[^\[;]*\[ *(?:%r\d+|global_smem))(?: \+ 0|\+(\d+))? *\]",
        _shifted(16),
    ),
    "matrix access 16 bytes further": (rf"((?:ld|st){_MATRIX}[^\[;]*\[ *%r\d+)(?:\+(\d+))? *\]", _shifted(16)),
    "tensor memory 4 columns further": (r"(tcgen05\.(?:ld|st)[^\[;]*\[%r\d+) \+ 0", r"\1 + 4"),
    "sums of tensor products 4 columns further": (r"(tcgen05\.mma[^\[;]*\[ *%r\d+ \+ )(\d+)", _larger(4)),
    "factor in tensor memory 4 columns further": (rf"({_TENSOR}, \[ *%r\d+ \+ )(\d+)", _larger(4)),
    "first factor of products 16 bytes further": (_FIRST, _16_BYTES),
    "second factor of products 16 bytes further": (_SECOND, _16_BYTES),
    "other stride of the first factor": (_FIRST, _OTHER_STRIDE),
    "other stride of the second factor": (_SECOND, _OTHER_STRIDE),
    "other swizzle of the first factor": (_FIRST, _OTHER_SWIZZLE),
    "other swizzle of the second factor": (_SECOND, _OTHER_SWIZZLE),
}

_GUARDS: Mutations = {
    "guard of a global access dropped": (r"@%p\d+ ((?:ld|st)\.(?:volatile\.)?global)", r"\1"),
    "guard of a copy dropped": (r"(cp\.async\.c[ga][^;]*\], )(0x\w+), %r\d+;", r"\1\2;"),
    "comparison includes equality": (r"setp\.([lg])t\.([su]\d\d)", r"setp.\1e.\2"),
}

_OPERANDS: Mutations = {
    "matrix access transposed": (rf"((?:ld|st){_MATRIX})\.({_SHARED})", r"\1.trans.\2"),
    "matrix access not transposed": (rf"((?:ld|st){_MATRIX})\.trans\.({_SHARED})", r"\1.\2"),
    "first factor of products transposed": (rf"({_PRODUCT}, %rd\d+, %rd\d+, [^,]+, 1, 1, )(\d)(, \d;)", _flipped),
    "second factor of products transposed": (rf"({_PRODUCT}, [^;]*, 1, 1, (?:\d, )?)(\d)(;)", _flipped),
    "first factor of tensor products transposed": (rf"({_TENSOR}{_SHAPE}", _computed("b32", "xor", 1 << 15)),
    "second factor of tensor products transposed": (rf"({_TENSOR}{_SHAPE}", _computed("b32", "xor", 1 << 16)),
    "sums kept or not": (rf"({_PRODUCT}[^;]*, )(%p\d+)((?:, \d)*;)", _computed("pred", "not")),
    "halves of a register exchanged": (r"(cvt\.rn\.(?:bf16|f16)x2\.f32[ \t]+%r\d+), (%r\d+), (%r\d+);", r"\1, \3, \2;"),
    "shuffle with another lane": (r"(shfl\.sync\.bfly\.b32[ \t]+%r\d+, %r\d+), 2,", r"\1, 1,"),
    "rows of a first factor exchanged": (
        r"(mma\.sync\.[^{]*\{[^}]*\}, )\{ *(%r\d+), (%r\d+), (%r\d+), (%r\d+) *\}",
        r"\1{ \3, \2, \4, \5 }",
    ),
    "halves of a second factor exchanged": (
        r"(mma\.sync\.[^{]*\{[^}]*\}, \{[^}]*\}, )\{ *(%r\d+), (%r\d+) *\}",
        r"\1{ \3, \2 }",
    ),
}

MUTATIONS: Mutations = {**ORDER, **_ADDRESSES, **_GUARDS, **_OPERANDS}


def mutants(ptx: str) -> Iterator[Mutant]:
    """Yield every mutant of a module, by kind."""
    for kind, (pattern, replacement) in MUTATIONS.items():
        for found in re.finditer(pattern, ptx, re.MULTILINE):
            new = found.expand(replacement) if isinstance(replacement, str) else replacement(found)
            if new != found[0]:
                text = ptx[: found.start()] + new + ptx[found.end() :]
                statement = found[0] if len(found[0]) < 120 else found[0][:60] + " ... " + found[0][-40:]
                yield Mutant(kind, _line(ptx, found), " ".join(statement.split()), text)


def _line(ptx: str, found: re.Match[str]) -> int:
    """Return the line of the first character that is not white space."""
    return ptx.count("\n", 0, found.start() + len(found[0]) - len(found[0].lstrip())) + 1


def spread(found: list[Mutant], limits: Limits) -> list[Mutant]:
    """Return some mutants of each kind, evenly spread over the module."""
    kept = []
    for kind in MUTATIONS:
        of_kind = [mutant for mutant in found if mutant.kind == kind]
        limit = limits.order if kind in ORDER else limits.other
        count = len(of_kind) if limit is None else min(limit, len(of_kind))
        kept += [of_kind[place * len(of_kind) // count] for place in range(count)]
    return kept
