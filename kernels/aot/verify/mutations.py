"""Ways to break the PTX of a kernel in one place."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

Replacement = str | Callable[[re.Match[str]], str]


class Mutant(NamedTuple):
    """A module with one change."""

    kind: str
    line: int  # of the module, from 1
    statement: str  # before the change
    ptx: str


def _shifted(bytes_: int) -> Callable[[re.Match[str]], str]:
    """Move an address by an offset that is in the text already, or is added to it."""
    return lambda found: f"{found[1]}+{int(found[2] or 0) + bytes_}]"


def _larger(amount: int) -> Callable[[re.Match[str]], str]:
    return lambda found: f"{found[1]}{int(found[2]) + amount}"


_SHARED = r"(?:shared(?:::cta)?)"

MUTATIONS: Mapping[str, tuple[str, Replacement]] = {
    # order
    "barrier dropped": (r"^[ \t]*bar(?:rier)?\.(?:cta\.)?sync[^;]*;", ""),
    "wait for copies dropped": (r"^[ \t]*cp\.async\.wait_group[^;]*;", ""),
    "wait for one group of copies less": (r"(cp\.async\.wait_group[ \t]+)(\d+)", _larger(1)),
    "commit of copies dropped": (r"^[ \t]*cp\.async\.commit_group;", ""),
    "fence between proxies dropped": (r"^[ \t]*fence\.proxy\.async[^;]*;", ""),
    "wait for warpgroup products dropped": (r"^[ \t]*wgmma\.wait_group[^;]*;", ""),
    "commit of warpgroup products dropped": (r"^[ \t]*wgmma\.commit_group[^;]*;", ""),
    "fence of warpgroup products dropped": (r"^[ \t]*wgmma\.fence[^;]*;", ""),
    "wait for an mbarrier dropped": (r"^[ \t]*mbarrier\.try_wait[^;]*;\s*@!complete bra\.uni waitLoop;", ""),
    "commit of tensor products dropped": (r"^[ \t]*@%p\d+ tcgen05\.commit[^;]*;", ""),
    "wait for loads of tensor memory dropped": (r"^[ \t]*tcgen05\.wait::ld[^;]*;", ""),
    "wait for stores of tensor memory dropped": (r"^[ \t]*tcgen05\.wait::st[^;]*;", ""),
    # addresses
    "global access 16 bytes further": (r"((?:ld|st)\.(?:volatile\.)?global\.[^\[;]*\[ *%rd\d+) \+ 0", r"\1 + 16"),
    "copy from 16 bytes further": (
        r"(cp\.async\.c[ga]\.shared\.global \[[^\]]*\], \[ *%rd\d+)(?: \+ 0)?( *\])",
        r"\1 + 16\2",
    ),
    "shared access 16 bytes further": (
        rf"((?:ld|st)\.{_SHARED}\.[^\[;]*\[ *%r\d+)(?: \+ 0|\+(\d+))? *\]",
        _shifted(16),
    ),
    "ldmatrix from 16 bytes further": (r"(ldmatrix[^\[;]*\[ *%r\d+)(?:\+(\d+))? *\]", _shifted(16)),
    "tensor memory 4 columns further": (r"(tcgen05\.(?:ld|st)[^\[;]*\[%r\d+) \+ 0", r"\1 + 4"),
    "operand of products 16 bytes further": (
        r"((?:or\.b64|add\.s64)[ \t]+%rd\d+, %rd\d+, )(461\d{16})(?=;)",
        _larger(1),
    ),
    # guards
    "guard of a global access dropped": (r"@%p\d+ ((?:ld|st)\.(?:volatile\.)?global)", r"\1"),
    "comparison includes equality": (r"setp\.lt\.s32", "setp.le.s32"),
    # operands
    "ldmatrix transposed": (r"(ldmatrix\.sync\.aligned\.m8n8\.x4)\.(shared)", r"\1.trans.\2"),
    "ldmatrix not transposed": (r"(ldmatrix\.sync\.aligned\.m8n8\.x4)\.trans\.(shared)", r"\1.\2"),
    "halves of a register exchanged": (r"(cvt\.rn\.(?:bf16|f16)x2\.f32[ \t]+%r\d+), (%r\d+), (%r\d+);", r"\1, \3, \2;"),
    "shuffle with another lane": (r"(shfl\.sync\.bfly\.b32[ \t]+%r\d+, %r\d+), 2,", r"\1, 1,"),
    "factors of a product exchanged": (
        r"(mma\.sync\.[^{]*\{[^}]*\}, )\{ *(%r\d+), (%r\d+), (%r\d+), (%r\d+) *\}",
        r"\1{ \3, \2, \4, \5 }",
    ),
}
"""Pattern and replacement by kind."""


def mutants(ptx: str) -> Iterator[Mutant]:
    """Yield every mutant of a module, by kind."""
    for kind, (pattern, replacement) in MUTATIONS.items():
        for found in re.finditer(pattern, ptx, re.MULTILINE):
            new = found.expand(replacement) if isinstance(replacement, str) else replacement(found)
            if new != found[0]:
                text = ptx[: found.start()] + new + ptx[found.end() :]
                yield Mutant(kind, ptx.count("\n", 0, found.start()) + 1, " ".join(found[0].split()), text)


def spread(found: list[Mutant], limit: int) -> list[Mutant]:
    """Return at most `limit` mutants of each kind, evenly spread over the module."""
    kept = []
    for kind in MUTATIONS:
        of_kind = [mutant for mutant in found if mutant.kind == kind]
        count = min(limit, len(of_kind))
        kept += [of_kind[place * len(of_kind) // count] for place in range(count)]
    return kept
