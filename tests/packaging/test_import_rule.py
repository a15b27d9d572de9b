"""The import rule: import-linter for the package, syntax trees for kernels/."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from ..support.checkout import ROOT

pytestmark = pytest.mark.skipif(not (ROOT / "pyproject.toml").exists(), reason="runs from a checkout")

FORBIDDEN = {
    "ops to models": ("beit_fast/ops/validation.py", "from ..models import outputs"),
    "package to testing": ("beit_fast/models/beit.py", "from ..testing import timing"),
    "testing to commands": ("beit_fast/testing/timing.py", "from ..cli import collect_env"),
    "a circle of folders": ("beit_fast/utils/files.py", "from .. import native\nfrom ..cli import commands"),
    "a circle of files": ("beit_fast/layers/drop_path.py", "from . import block"),
    "inside a function": ("beit_fast/ops/validation.py", "def late():\n    from ..layers import block"),
    "a folder outside the rule": ("beit_fast/elsewhere/__init__.py", "from ..cli import commands"),
    "training to tuning": ("beit_fast/training/seeding.py", "from ..tuning import timer"),
    "models to training": ("beit_fast/models/outputs.py", "from ..training import seeding"),
    "tuning to commands": ("beit_fast/tuning/timer.py", "from ..cli import collect_env"),
    "models to integrations": ("beit_fast/models/outputs.py", "from ..integrations import report"),
}
"""Forbidden imports: the file to change and the lines to add."""

FORBIDDEN_TO_KERNELS = {
    "kernel to kernel": ("kernels/linear_gelu/launch.py", "from ..attention import configs"),
    "kernel to the package": ("kernels/common/gpu.py", "import beit_fast"),
    "package to kernels": ("beit_fast/layers/block.py", "def late():\n    from ..kernels.attention import launch"),
    "tuning to kernels outside a call": ("beit_fast/tuning/timer.py", "from ..kernels.common import launch"),
    "ops to kernels outside a call": ("beit_fast/ops/attention.py", "from ..kernels.attention import launch"),
    "package to aot": ("beit_fast/ops/attention.py", "def late():\n    from ..kernels.aot import compile"),
    "kernel to operators": ("kernels/common/gpu.py", "from ...ops import attention"),
    "aot to models": ("kernels/aot/verify/check.py", "from ....models import outputs"),
    "aot to tests": ("kernels/aot/verify/check.py", "from tests.support import oracle"),
    "package to tests": ("beit_fast/tuning/timer.py", "def late():\n    import tests.support.oracle"),
}


def kernel_import_errors(root: Path) -> list[str]:
    """Return forbidden imports of and from kernels/, and of the tests, one line each."""
    errors = []
    for file in sorted((root / "kernels").rglob("*.py")):
        folder = file.relative_to(root / "kernels").parts[0]
        allowed = {f"beit_fast.kernels.{name}" for name in ("common", folder)}
        if folder == "aot":
            allowed = {f"beit_fast.kernels.{path.name}" for path in (root / "kernels").iterdir()}
            allowed |= {"beit_fast.tuning", "beit_fast.utils"}
        for name, _ in imported_modules(file, root):
            owner = ".".join(name.split(".")[: 3 if name.startswith("beit_fast.kernels.") else 2])
            if name.split(".")[0] in ("beit_fast", "tests") and owner not in allowed:
                errors.append(f"{file.relative_to(root)} imports {name}")
    package = root / "beit_fast"
    for file in sorted(path for path in package.rglob("*.py") if "kernels" not in path.relative_to(package).parts):
        for name, inside_call in imported_modules(file, root):
            if name.split(".")[0] == "tests":
                errors.append(f"{file.relative_to(root)} imports {name}")
            if not name.startswith("beit_fast.kernels"):
                continue
            if (
                file.relative_to(package).parts[0] not in ("ops", "tuning")
                or not inside_call
                or name.startswith("beit_fast.kernels.aot")
            ):
                errors.append(f"{file.relative_to(root)} imports {name}")
    return errors


def imported_modules(file: Path, root: Path) -> list[tuple[str, bool]]:
    """Return the imported absolute names, and whether each is inside a function."""
    tree = ast.parse(file.read_text())
    functions = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    inner = {id(node) for function in functions for node in ast.walk(function)}
    folder = file.relative_to(root).parent.parts
    if folder[0] == "kernels":
        folder = ("beit_fast", *folder)  # by a link
    found: list[tuple[str, bool]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, id(node) in inner) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = folder[: len(folder) - node.level + 1] if node.level else ()
            parent = ".".join((*base, *filter(None, [node.module])))
            found += [(f"{parent}.{alias.name}", id(node) in inner) for alias in node.names]
    return found


def copy_tree(folder: Path) -> Path:
    """Copy the package, the kernels and the configuration of the linter."""
    for name in ("beit_fast", "kernels"):
        ignored = shutil.ignore_patterns("__pycache__", "*.so", "kernels")
        shutil.copytree(ROOT / name, folder / name, ignore=ignored if name == "beit_fast" else None)
    (folder / "beit_fast" / "kernels").symlink_to("../kernels")
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    code = "import sys; from importlinter.cli import lint_imports_command; lint_imports_command(['--no-cache'])"
    return subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)


def add_lines(file: Path, lines: str) -> None:
    """Add imports at the end of a file."""
    file.parent.mkdir(exist_ok=True)
    file.write_text(f"{file.read_text() if file.exists() else ''}\n{lines}\n")


@pytest.mark.parametrize("kind", FORBIDDEN)
def test_linter_forbidden_import_fails(kind, tmp_path):
    file, lines = FORBIDDEN[kind]
    add_lines(copy_tree(tmp_path) / file, lines)
    done = lint_imports(tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "BROKEN" in done.stdout


def test_linter_copied_tree_passes(tmp_path):
    done = lint_imports(copy_tree(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("kind", FORBIDDEN_TO_KERNELS)
def test_kernel_import_errors_forbidden_import_is_found(kind, tmp_path):
    file, lines = FORBIDDEN_TO_KERNELS[kind]
    add_lines(copy_tree(tmp_path) / file, lines)
    assert kernel_import_errors(tmp_path)


def test_kernel_import_errors_of_checkout_is_empty():
    assert kernel_import_errors(ROOT) == []


def test_kernels_folder_is_not_a_package():
    """A regular package would shadow the distribution `kernels`, which Transformers imports."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "docs/architecture.md"])
def test_import_layers_on_a_page_are_those_of_the_rule(page: str) -> None:
    rule = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"][0]["layers"]
    assert "```text\n" + "\n".join(rule) + "\n```" in (ROOT / page).read_text()
