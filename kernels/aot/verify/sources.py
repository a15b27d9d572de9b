"""Hashes of the source that a kernel is compiled from. They show which results are out of date."""

from __future__ import annotations

import ast
import functools
import hashlib
import re
from pathlib import Path

from ..nvcc import SOURCES, included_files

FOLDER = Path(__file__).resolve().parents[2]
CUDA_FOLDER = SOURCES

MODULES = {
    "forward": "attention.forward",
    "combine_splits": "attention.forward",
    "pack_bias": "attention.pack_bias",
    "backward_preprocess": "attention.backward_preprocess",
    "backward_dkv": "attention.backward_dkv",
    "backward_dq": "attention.backward_dq",
    "backward_dbias": "attention.backward_dbias",
    "dbias_cls_column": "attention.backward_dbias",
    "dtable_patches": "attention.backward_dbias",
    "dtable_cls": "attention.backward_dbias",
    "linear_gelu": "linear_gelu.kernel",
    "residual_norm": "residual_norm.forward",
    "residual_norm_backward": "residual_norm.backward",
    "sum_partials": "residual_norm.backward",
    "patch_embed": "cuda/patch_embed/kernel.cuh",
}
"""The module of each kernel; for nvcc, its file in csrc/."""
PLAN = "cuda/patch_embed/plan.cuh"
"""The file that computes the arguments of a kernel that nvcc compiles."""


@functools.cache
def source_hash(kernel: str) -> str:
    """Return a hash of the kernel's module and of its imports.

    Only imports from this folder count. Comments, docstrings and formatting do not count: the compiler ignores them.
    """
    if MODULES[kernel].endswith(".cuh"):
        files = included_files([CUDA_FOLDER / name for name in (MODULES[kernel], PLAN)], CUDA_FOLDER)
        text = "\n".join(f"{file.name}\n{_without_comments(file.read_text())}" for file in files)
    else:
        names = sorted(_with_imports(MODULES[kernel]))
        text = "\n".join(f"{name}\n{_code(_file(name))}" for name in names)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def kernel_name(entry: str) -> str:
    """Return the key in MODULES of a compiled kernel's entry point."""
    if "patch_embed_kernel" in entry:  # a template's name in C++
        return "patch_embed"
    return entry.removesuffix("_kernel").removeprefix("attention_")


@functools.cache
def _with_imports(name: str) -> frozenset[str]:
    """Return a module and all modules of this folder that it imports. Indirect imports count too."""
    found = {name}
    package = name.split(".")[:-1]
    for node in ast.walk(ast.parse(_file(name).read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            parts = [*base, *(node.module.split(".") if node.module else [])]
            targets = [".".join(parts)] if node.module else [".".join([*parts, alias.name]) for alias in node.names]
            for target in targets:
                found |= _with_imports(target)
    return frozenset(found)


def _file(name: str) -> Path:
    return FOLDER.joinpath(*name.split(".")).with_suffix(".py")


def _code(file: Path) -> str:
    """Return the source as Python prints it, without docstrings."""
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
            value = body[0].value
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                del body[0]
    return ast.unparse(tree)


def _without_comments(text: str) -> str:
    """Return C++ without comments, with one space for any white space."""
    kept = re.sub(
        r"""("(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])')|//[^\n]*|/\*.*?\*/""",
        lambda found: found[1] or " ",
        text,
        flags=re.DOTALL,
    )
    return " ".join(kept.split())
