"""Limits of the layout: package entries, lines per file and function, words per summary."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest

from ..support.checkout import ROOT

pytestmark = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="runs from a checkout")

MOST_ENTRIES, MOST_FILE_LINES, MOST_FUNCTION_LINES, MOST_KERNEL_LINES = 20, 400, 60, 130
MOST_SUMMARY_WORDS = 12
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def tracked(*patterns: str) -> list[Path]:
    listed = subprocess.run(["git", "ls-files", *patterns], cwd=ROOT, capture_output=True, text=True, check=True)
    return [ROOT / name for name in listed.stdout.splitlines() if (ROOT / name).exists()]


def is_kernel(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return any("triton.jit" in ast.unparse(decorator) for decorator in function.decorator_list)


def test_package_has_at_most_20_entries():
    entries = {file.relative_to(ROOT / "beit_fast").parts[0] for file in tracked("beit_fast")}
    assert len(entries) <= MOST_ENTRIES, sorted(entries)


def test_files_have_at_most_400_lines():
    lines = {str(file.relative_to(ROOT)): len(file.read_text().splitlines()) for file in tracked("*.py")}
    assert {name: count for name, count in lines.items() if count > MOST_FILE_LINES} == {}


def test_functions_have_at_most_60_lines_and_kernels_130():
    too_long = {}
    for file in tracked("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                count = (node.end_lineno or 0) - node.lineno + 1
                if count > (MOST_KERNEL_LINES if is_kernel(node) else MOST_FUNCTION_LINES):
                    too_long[f"{file.relative_to(ROOT)}:{node.name}"] = count
    assert too_long == {}


def summary_words(docstring: str) -> int:
    """Count the words up to the first full stop, colon or semicolon."""
    opening = re.split(r"[.!?:;](?=\s|$)", docstring, maxsplit=1)[0]
    return len(opening.split())


@pytest.mark.parametrize(
    ("docstring", "count"),
    [
        ("Return `a.b` of the device.", 5),
        ("Return the\n    device\n\n    Args:", 4),
        ("The bias: its table `[rows, H]`.", 2),
        ("Time a step; see `a`.", 3),
    ],
)
def test_summary_words_of_a_docstring_end_at_its_first_stop(docstring, count):
    assert summary_words(docstring) == count


def test_docstrings_open_with_at_most_12_words():
    too_long = {}
    for file in tracked("beit_fast/*.py", "kernels/*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            docstring = ast.get_docstring(node) if isinstance(node, DOCUMENTED) else None
            if docstring is not None and summary_words(docstring) > MOST_SUMMARY_WORDS:
                too_long[f"{file.relative_to(ROOT)}:{getattr(node, 'name', 'module')}"] = docstring.splitlines()[0]
    assert too_long == {}
