"""Patch embedding compiled by nvcc, executed on a CPU from its PTX."""

from __future__ import annotations

import ctypes
import functools
import re
import subprocess
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from beit_fast.kernels.aot.executor import kernel_code, launch
from beit_fast.kernels.aot.executor.dtypes import U8
from beit_fast.kernels.aot.executor.global_memory import GlobalMemory
from beit_fast.kernels.aot.executor.launch import Launch, Options

from .cuda_emulation import REPOSITORY, SOURCES, compiler, content_key
from .nvcc import compiled

SCALARS = {torch.uint8: 0, torch.float16: 1, torch.bfloat16: 2, torch.float32: 3}
ARITHMETIC = {torch.float16: 0, torch.bfloat16: 1, "tf32": 2, torch.float32: 3}
ROWS = {"large": 128, "small": 64}
THREADS = 128
PLAN = Path(__file__).with_name("patch_embed_plan.cpp")


class _Rows(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("type", ctypes.c_int32))


class _Call(ctypes.Structure):
    """`Call` of plan.cuh."""

    _fields_ = (
        ("pixels", ctypes.c_void_p),
        ("pixel_type", ctypes.c_int32),
        ("sizes", ctypes.c_int64 * 4),
        ("strides", ctypes.c_int64 * 4),
        ("patch_height", ctypes.c_int64),
        ("patch_width", ctypes.c_int64),
        ("weight", ctypes.c_void_p),
        ("weight_stride", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("bias", _Rows),
        ("cls", _Rows),
        ("mask_token", _Rows),
        ("positions", _Rows),
        ("mask", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("out_type", ctypes.c_int32),
        ("mean", ctypes.POINTER(ctypes.c_double)),
        ("deviation", ctypes.POINTER(ctypes.c_double)),
    )


@functools.cache
def _plan_library() -> ctypes.CDLL:
    """Compile the launcher's plan of a call."""
    cxx = compiler()
    assert cxx is not None
    library = REPOSITORY / "build" / "cuda" / f"{content_key([SOURCES / 'cuda', PLAN.parent], cxx)}-plan.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        unfinished = library.with_suffix(f".{uuid.uuid4().hex}")
        command = [cxx, "-std=c++20", "-O1", "-shared", "-fPIC", f"-I{SOURCES}", str(PLAN), "-o", str(unfinished)]
        subprocess.run(command, check=True)
        unfinished.replace(library)
    loaded = ctypes.CDLL(str(library))
    loaded.plan_call.restype = loaded.argument_bytes.restype = ctypes.c_int64
    loaded.plan_call.argtypes = (ctypes.POINTER(_Call), ctypes.c_int, ctypes.c_bool, ctypes.c_void_p)
    return loaded


def kernel_name(ptx: str, arithmetic: int, rows: int) -> str:
    names = re.findall(rf"\.entry\s+(\w+ArithmeticE{arithmetic}ENS0_4TileILi{rows}E\w+)", ptx)
    assert len(names) == 1
    return str(names[0])


def embed(
    arguments: dict[str, Any], capability: int, tile: str, options: Options, *, allow_tf32: bool = False
) -> tuple[Tensor, Launch]:
    """Execute the kernel on the inputs of `make_inputs`; return the tokens and the record of the launch."""
    pixels, weight = arguments["pixels"], arguments["weight"]
    dtype = weight.dtype
    arithmetic = ARITHMETIC["tf32" if allow_tf32 and dtype == torch.float32 else dtype]
    rows = _weight_rows(pixels, weight)
    batch, patches = len(pixels), (pixels.shape[2] // weight.shape[2]) * (pixels.shape[3] // weight.shape[3])
    token_dtypes = {value.dtype for name in ("cls", "mask_token", "pos") if (value := arguments[name]) is not None}
    out_dtype = functools.reduce(lambda a, b: a if a == b else torch.float32, token_dtypes, dtype)
    out = torch.empty(batch, patches + (arguments["cls"] is not None), len(weight), dtype=out_dtype)

    memory = GlobalMemory()

    def address(name: str, tensor: Tensor | None) -> int:
        if tensor is None:
            return 0
        return memory.add(name, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.element_size())

    def token_rows(name: str) -> _Rows:
        tensor = arguments[name]
        return _Rows(address(name, tensor), SCALARS[torch.float32 if tensor is None else tensor.dtype])

    def numbers(name: str) -> Any:
        values = arguments[name]
        return None if values is None else (ctypes.c_double * len(values))(*values)

    call = _Call(
        pixels=address("pixels", pixels),
        pixel_type=SCALARS[pixels.dtype],
        sizes=(ctypes.c_int64 * 4)(*pixels.shape),
        strides=(ctypes.c_int64 * 4)(*pixels.stride()),
        patch_height=weight.shape[2],
        patch_width=weight.shape[3],
        weight=address("weight", rows),
        weight_stride=rows.stride(0) * rows.element_size(),
        columns=len(weight),
        bias=token_rows("bias"),
        cls=token_rows("cls"),
        mask_token=token_rows("mask_token"),
        positions=token_rows("pos"),
        mask=address("mask", arguments["mask"]),
        out=address("out", out),
        out_type=SCALARS[out.dtype],
        mean=numbers("mean"),
        deviation=numbers("std"),
    )
    memory.written.add("out")
    library = _plan_library()
    block = np.zeros(library.argument_bytes(), U8)
    blocks = library.plan_call(call, arithmetic, tile == "large", block.ctypes.data)
    ptx = compiled("single" if dtype == torch.float32 else "half", capability, "ptx").read_text()
    code = kernel_code.load(ptx, kernel_name(ptx, arithmetic, ROWS[tile]))
    assert code.parameter_bytes == len(block)
    return out, launch.run(code, memory, block, (blocks, 1, 1), (THREADS, 1, 1), 0, options)


def _weight_rows(pixels: Tensor, weight: Tensor) -> Tensor:
    """Arrange the weight in the order of the pixels, with rows of whole 16-byte vectors."""
    if pixels.shape[1] > 1 and pixels.stride(1) < pixels.stride(3):  # channels last
        weight = weight.permute(0, 2, 3, 1)
    rows = weight.reshape(len(weight), -1)
    per_vector = 16 // rows.element_size()
    padded = rows.new_zeros(len(rows), -(-rows.shape[1] // per_vector) * per_vector)
    padded[:, : rows.shape[1]] = rows
    return padded
