"""The pages of the documentation, their fenced blocks, links and anchors."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from ..support.checkout import ROOT

PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
"""Paths of the pages, relative to the root of the checkout."""

_FENCE = re.compile(r"^(?P<indent> *)(?P<ticks>`{3,}|~{3,})(?P<language>[^`\n]*)$")
_LINK = re.compile(r"!?\[(?:[^\[\]]|\[[^\]]*\])*\]\((?P<target>[^()\s]+)\)")
_HEADING = re.compile(r"^#{1,6} (?P<title>.+)$")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: str
    line: int
    """Number of its first content line, from 1."""
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks_of(page: str, *languages: str) -> list[Block]:
    """The fenced blocks of a page, in order; only those of `languages` if any are given."""
    blocks, lines = [], read(page).splitlines()
    number = 0
    while number < len(lines):
        fence = _FENCE.match(lines[number])
        number += 1
        if fence is None:
            continue
        start = number
        while lines[number].strip() != fence["ticks"]:
            number += 1
        blocks.append(Block(page, start + 1, fence["language"].strip(), "\n".join(lines[start:number]) + "\n"))
        number += 1
    return [block for block in blocks if not languages or block.language in languages]


def without_fences(text: str) -> str:
    """Remove fenced blocks."""
    return re.sub(r"^ *(```+|~~~+).*?^ *\1 *$", "", text, flags=re.MULTILINE | re.DOTALL)


def prose_of(text: str) -> str:
    """Remove fenced blocks and inline code, which do not contain links."""
    return re.sub(r"`[^`\n]*`", "", without_fences(text))


def links_of(text: str) -> list[str]:
    """The targets of links and images."""
    return [match["target"] for match in _LINK.finditer(prose_of(text))]


def anchors_of(path: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    text = without_fences(path.read_text(encoding="utf-8"))
    titles = [match["title"] for line in text.splitlines() if (match := _HEADING.match(line))]
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}
