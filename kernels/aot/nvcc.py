"""nvcc: compile CUDA and C++ files without a GPU, once for each content."""

from __future__ import annotations

import functools
import hashlib
import os
import re
import shutil
import subprocess
import uuid
from collections.abc import Iterable
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
SOURCES = REPOSITORY / "csrc"
CACHE = REPOSITORY / "build" / "cuda"
SECONDS = 600
MISSING = "nvcc was not found (expected on the path, in CUDA_HOME, CUDA_PATH or /usr/local/cuda)"


def find_nvcc() -> str | None:
    """Find nvcc on the path or in the CUDA toolkit."""
    toolkits = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")] + ["/usr/local/cuda"]
    folders = [f"{toolkit}/bin" for toolkit in toolkits if toolkit]
    return shutil.which("nvcc", path=os.pathsep.join([os.environ.get("PATH", ""), *folders]))


@functools.cache
def nvcc_version() -> str | None:
    """Return nvcc's version (13.0.88), or None if it was not found."""
    nvcc = find_nvcc()
    if nvcc is None:
        return None
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"\bV(\d+(?:\.\d+)+)", text)
    if found is None:
        raise RuntimeError(f"{nvcc} --version names no version: {text}")
    return found[1]


def included_files(files: Iterable[Path], folder: Path = SOURCES) -> list[Path]:
    """Return files and the files of `folder` that they include, sorted.

    Files that are included indirectly count too.
    """
    found: set[Path] = set()
    waiting = list(files)
    while waiting:
        file = waiting.pop()
        if file not in found:
            found.add(file)
            names = re.findall(r'^\s*#\s*include\s+"([^"]+)"', file.read_text(), re.MULTILINE)
            waiting += [folder / name for name in names]
    return sorted(found)


def compiled(source: Path, suffix: str, *flags: str) -> Path:
    """Compile a file unless it is cached.

    Args:
        source: The file. It includes files of csrc/ alone, besides those of the system.
        suffix: Of the result.
        flags: Of nvcc, besides those that every file gets.

    Raises:
        RuntimeError: If nvcc was not found, or if it fails.
    """
    nvcc, version = find_nvcc(), nvcc_version()
    if nvcc is None or version is None:
        raise RuntimeError(MISSING)
    command = [nvcc, "-std=c++20", f"-I{SOURCES}", *flags]
    texts = [file.read_text() for file in included_files([source])]
    key = hashlib.sha256("\0".join((version, *flags, *texts)).encode()).hexdigest()[:16]
    output = CACHE / f"{key}-{source.stem}{suffix}"
    if not output.exists():
        output.parent.mkdir(parents=True, exist_ok=True)
        unfinished = output.with_suffix(f".{uuid.uuid4().hex}")  # processes may compile at the same time
        command += ["-o", str(unfinished), str(source)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"nvcc fails on {source.name}: {done.stderr[-4000:]}")
        unfinished.replace(output)
    return output
