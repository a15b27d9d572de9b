"""nvcc, and patch embedding compiled by it."""

from __future__ import annotations

import subprocess
import uuid
from pathlib import Path

import pytest

from beit_fast.kernels.aot.nvcc import find_nvcc

from .cuda_emulation import REPOSITORY, SOURCES, content_key, torch_includes

PATCH_EMBED = SOURCES / "cuda" / "patch_embed"
FLAGS = ["-std=c++20", "-O3", f"-I{SOURCES}", *torch_includes(), "-DUSE_CUDA"]
FLAGS += ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-Xcompiler", "-Wall,-Wextra,-Werror"]
SECONDS = 300


NVCC = find_nvcc()
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="nvcc, a part of the CUDA toolkit, was not found")


def compiled(file: str, capability: int) -> Path:
    """Compile a source file to a cubin unless it is cached."""
    assert NVCC is not None
    version = subprocess.run([NVCC, "--version"], capture_output=True, text=True, check=True).stdout
    key = content_key([SOURCES / "cuda"], version, *FLAGS)
    output = REPOSITORY / "build" / "cuda" / f"{key}-{file}-{capability}.cubin"
    if not output.exists():
        output.parent.mkdir(parents=True, exist_ok=True)
        unfinished = output.with_suffix(f".{uuid.uuid4().hex}")
        source = str(PATCH_EMBED / f"{file}.cu")
        run_nvcc("-cubin", f"-arch=sm_{capability}", "-o", str(unfinished), source)
        unfinished.replace(output)
    return output


def run_nvcc(*arguments: str) -> None:
    command = [str(NVCC), *FLAGS, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "warning" not in done.stderr, done.stderr[-4000:]
