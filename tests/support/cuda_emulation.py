"""CUDA patch embedding on CPU tensors, compiled against an emulator of a block.

`tests/cuda_emulation` has the emulator. It runs the whole operator, from argument checks to the last store.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import uuid
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import beit_fast  # noqa: F401  defines the operator

REPOSITORY = Path(__file__).resolve().parents[2]
SOURCES = REPOSITORY / "csrc"
EMULATOR = REPOSITORY / "tests" / "cuda_emulation"
TORCH = Path(torch.__file__).parent
LARGE, SMALL = 0, 2**31 - 1
"""Numbers of multiprocessors for which the launcher chooses large and small tiles."""


def compiler() -> str | None:
    """Find the C++ compiler."""
    return next(
        (found for name in (os.environ.get("CXX"), "c++", "g++") if name and (found := shutil.which(name))), None
    )


def content_key(folders: list[Path], *others: str) -> str:
    """Hash all C++ and CUDA sources in the folders, and other strings."""
    digest = hashlib.sha256("\0".join(others).encode())
    for file in sorted(file for folder in folders for file in folder.rglob("*") if file.is_file()):
        if file.suffix in (".h", ".cuh", ".cu", ".cpp"):
            digest.update(str(file.relative_to(REPOSITORY)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


def torch_includes() -> list[str]:
    """Return compiler arguments for the PyTorch headers, as system headers without warnings."""
    include = TORCH / "include"
    return ["-isystem", str(include), "-isystem", str(include / "torch" / "csrc" / "api" / "include")]


@functools.cache
def build() -> tuple[Path, str]:
    """Compile the library unless it is cached.

    Returns:
        Path of the library, and the compiler error or an empty text.
    """
    cxx = compiler()
    assert cxx is not None
    flags = ["-std=c++20", "-O2", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-fPIC", "-fvisibility=hidden"]
    flags += [f"-I{EMULATOR}", f"-I{SOURCES}", *torch_includes(), "-DTORCH_TARGET_VERSION=0x020b000000000000"]
    key = content_key([SOURCES / "cuda", EMULATOR], cxx, torch.__version__, *flags)
    library = REPOSITORY / "build" / "cuda-emulation" / f"{key}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        unfinished = library.with_suffix(f".{uuid.uuid4().hex}")  # test processes may build at the same time
        files = [*sorted(EMULATOR.glob("*.cpp")), SOURCES / "errors.cpp"]
        command = [cxx, "-shared", *flags, *map(str, files), "-o", str(unfinished), f"-L{TORCH / 'lib'}", "-ltorch_cpu"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            return library, done.stderr[-4000:]
        unfinished.replace(library)
    return library, ""


@functools.cache
def load() -> ctypes.CDLL:
    """Load the emulator, and register `_patch_embed_cuda` for CPU tensors."""
    path, failure = build()
    assert not failure, failure
    torch.ops.load_library(path)
    library = ctypes.CDLL(str(path))
    signatures = {
        "prepare": (None, ctypes.c_int, ctypes.c_bool, ctypes.c_uint, ctypes.c_void_p, ctypes.c_int64),
        "first_error": (ctypes.c_char_p,),
        "last_read_vectors": (ctypes.c_bool,),
        "quotient": (ctypes.c_uint32, ctypes.c_uint32, ctypes.c_int64),
        "place_of": (ctypes.c_uint32, ctypes.c_bool, ctypes.c_uint32, ctypes.c_uint32),
        "column_of": (ctypes.c_uint32, ctypes.c_uint32, ctypes.c_uint32),
        "pixel_offset": (
            ctypes.c_int64,
            *(ctypes.POINTER(ctypes.c_int64),) * 3,
            *(ctypes.c_int64, ctypes.c_uint32, ctypes.c_uint32),
        ),
    }
    for name, (result, *arguments) in signatures.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


def embed(
    arguments: dict[str, Any],
    num_sms: int = LARGE,
    *,
    allow_tf32: bool = False,
    copies_end_early: bool = False,
    seed: int = 0,
) -> Tensor:
    """Run the kernel, check its memory accesses, and return its tokens.

    `seed` chooses the order of the threads in a block. Copies to shared memory end as late as possible, or as early as
    possible with `copies_end_early`.
    """
    library = load()
    storage = arguments["pixels"].untyped_storage()
    library.prepare(num_sms, copies_end_early, seed, storage.data_ptr(), storage.nbytes())
    tokens = torch.ops.beit_fast._patch_embed_cuda(*arguments.values(), allow_tf32)
    error = library.first_error().decode()
    assert not error, error
    return tokens


def reads_vectors() -> bool:
    """Return whether the last call read pixels by vectors."""
    return bool(load().last_read_vectors())
