"""Limits of the layout: package entries, lines per file, lines per function."""

from __future__ import annotations

import ast
import subprocess
from pathlib import Path

import pytest

from ..support.checkout import ROOT

pytestmark = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="runs from a checkout")

MOST_ENTRIES, MOST_FILE_LINES, MOST_FUNCTION_LINES, MOST_KERNEL_LINES = 20, 400, 60, 130


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
