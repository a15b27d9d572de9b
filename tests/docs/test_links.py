"""Relative links, fenced blocks and navigation of README and docs, and the size of README."""

from __future__ import annotations

from pathlib import Path

import pytest

from ..support.checkout import ROOT
from .pages import PAGES, Block, anchors_of, blocks_of, links_of, read

LANGUAGES = ("python", "bash", "shell", "text", "console")
"""Languages of fences: `test_code_blocks.py` runs the first three; the others contain output and drawings."""

CODE_SIGNS = ("import ", "from ", "def ", "pip ", "beit-fast ", "python ", "make ", "$ ", ">>> ")
"""Prefixes of code lines and commands."""

READMES = [
    "CONTRIBUTING.md",
    "kernels/README.md",
    "csrc/README.md",
    "benchmarks/README.md",
    "examples/digits/README.md",
]


@pytest.mark.parametrize("page", [*PAGES, *READMES])
def test_relative_links_resolve(page: str) -> None:
    broken = [target for target in links_of(read(page)) if not resolves(ROOT / page, target)]
    assert broken == []


@pytest.mark.parametrize("page", PAGES)
def test_fences_name_a_tested_language(page: str) -> None:
    assert [str(block) for block in blocks_of(page) if block.language not in LANGUAGES] == []


@pytest.mark.parametrize("page", PAGES)
def test_output_fences_contain_no_code(page: str) -> None:
    hidden = [(str(block), line) for block in blocks_of(page, "text", "console") for line in code_lines(block)]
    assert hidden == []


@pytest.mark.parametrize("page", PAGES)
def test_pages_have_no_indented_code(page: str) -> None:
    """Markdown renders lines indented by four after an empty line as code, unless they continue a list."""
    text = read(page)
    fenced = {number for block in blocks_of(page) for number in lines_of(block)}
    lines = text.splitlines()
    indented = [
        line
        for number, line in enumerate(lines, 1)
        if line.startswith("    ") and number not in fenced and (number == 1 or not lines[number - 2].strip())
    ]
    assert indented == []


def test_readme_is_at_most_120_lines_of_100_columns() -> None:
    lines = read("README.md").splitlines()
    assert len(lines) <= 120
    assert [line for line in lines if len(line) > 100] == []


def test_navigation_lists_every_page() -> None:
    yaml = pytest.importorskip("yaml")
    navigation = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    listed = {f"docs/{page}" for entry in navigation for page in entry.values()}
    assert listed == set(PAGES) - {"README.md"}


def resolves(page: Path, target: str) -> bool:
    """Return whether a link is external, or its file and anchor exist."""
    if "://" in target or target.startswith("mailto:"):
        return True
    path, _, anchor = target.partition("#")
    file = (page.parent / path).resolve() if path else page
    if not file.exists() or not file.is_relative_to(ROOT):
        return False
    return not anchor or (file.suffix == ".md" and anchor in anchors_of(file))


def code_lines(block: Block) -> list[str]:
    return [line for line in block.text.splitlines() if line.lstrip().startswith(CODE_SIGNS)]


def lines_of(block: Block) -> range:
    return range(block.line, block.line + len(block.text.splitlines()))
