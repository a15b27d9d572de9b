"""Examples import only public names of the package."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import beit_fast

from ..support.checkout import ROOT

PUBLIC = {
    "beit_fast",
    *(f"beit_fast.{name}" for name in ("checkpoint", "configuration", "image_processing", "inference", "kernels")),
    *(f"beit_fast.{name}" for name in ("layers", "ops", "parallel", "position_bias", "testing")),
    *("beit_fast.training", "beit_fast.training.tokenizers"),
    *(f"beit_fast.integrations.{name}" for name in ("mmseg", "timm", "transformers")),
}


def private_imports(text: str) -> list[str]:
    """List the private names of the package that a script imports."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name not in PUBLIC]
        elif isinstance(node, ast.ImportFrom):
            names = [alias.name for alias in node.names]
            if node.module == "beit_fast":
                names = [name for name in names if name not in beit_fast.__all__ and f"beit_fast.{name}" not in PUBLIC]
            elif node.module in PUBLIC:
                names = [name for name in names if name.startswith("_")]
            found += [f"{node.module}.{name}" for name in names]
    return [name for name in found if name.partition(".")[0] == "beit_fast"]


@pytest.mark.parametrize("script", sorted((ROOT / "examples").glob("*.py")), ids=lambda script: script.name)
def test_examples_import_public_names_only(script: Path) -> None:
    assert private_imports(script.read_text()) == []


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("from beit_fast.cli.commands import overlay", ["beit_fast.cli.commands.overlay"]),
        ("import beit_fast.ops.dispatch", ["beit_fast.ops.dispatch"]),
        ("from beit_fast import cli", ["beit_fast.cli"]),
        ("from beit_fast.position_bias import _private", ["beit_fast.position_bias._private"]),
        ("from beit_fast import BeitConfig, parallel", []),
    ],
)
def test_private_imports_finds_private_names(line: str, expected: list[str]) -> None:
    assert private_imports(line) == expected
