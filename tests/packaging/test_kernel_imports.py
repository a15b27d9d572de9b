"""The import rule of kernels/: a folder imports `common` and itself, and the package imports nothing of `aot`."""

from __future__ import annotations

import ast
import tomllib
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
KERNELS = REPOSITORY / "kernels"
FOLDERS = sorted(path.name for path in KERNELS.iterdir() if path.is_dir() and path.name != "__pycache__")
ALLOWED = {folder: {"common", folder} for folder in FOLDERS} | {"aot": set(FOLDERS)}


def imported_folders(file: Path) -> set[str]:
    """Folders of kernels/ that a file of one of them imports from."""
    folders = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if not isinstance(node, ast.ImportFrom) or node.level == 0:
            continue
        path = (
            [file.parent.name, *(node.module or "").split(".")] if node.level == 1 else (node.module or "").split(".")
        )
        folders |= {path[0]} if path[0] else {alias.name for alias in node.names}
    return folders


@pytest.mark.parametrize("folder", FOLDERS)
def test_kernels_import_common_and_their_own_folder(folder: str) -> None:
    files = sorted((KERNELS / folder).glob("*.py"))
    wrong = {file.name: imported_folders(file) - ALLOWED[folder] for file in files}
    assert not {name: folders for name, folders in wrong.items() if folders}


def test_the_package_does_not_import_aot() -> None:
    package = REPOSITORY / "beit_fast"
    files = [file for file in package.rglob("*.py") if file.relative_to(package).parts[0] != "kernels"]
    assert files
    assert not [file for file in files if "kernels.aot" in file.read_text()]


def test_the_folder_kernels_is_not_a_package() -> None:
    """A regular package would shadow the distribution `kernels`, which Transformers imports."""
    assert not (KERNELS / "__init__.py").exists()


def test_mypy_relaxes_files_of_kernels_alone() -> None:
    """Launches and their arguments are checked, so that a misspelt field is an error without a GPU."""
    overrides = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["mypy"]["overrides"]
    (relaxed,) = [entry["module"] for entry in overrides if entry.get("check_untyped_defs") is False]
    compiled = {
        f"beit_fast.kernels.{file.parent.name}.{file.stem}"
        for file in KERNELS.glob("*/*.py")
        if "@triton.jit" in file.read_text()
    }
    assert set(relaxed) == compiled
