"""Patch embedding compiled by nvcc, executed from its PTX."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from triton.runtime import driver

from ..executor.driver import ExecutorDriver
from ..executor.dtypes import U8
from ..executor.global_memory import GlobalMemory
from ..nvcc import compiled

FOLDER = Path(__file__).resolve().parent
KERNEL = FOLDER / "patch_embed_kernel.cu"
PLAN = FOLDER / "patch_embed_plan.cpp"
SCALARS = {torch.uint8: 0, torch.float16: 1, torch.bfloat16: 2, torch.float32: 3}
ARITHMETIC = {torch.float16: "kFloat16", torch.bfloat16: "kBFloat16", torch.float32: "kFloat32"}
ARITHMETIC_NUMBERS = {"kFloat16": 0, "kBFloat16": 1, "kTensorFloat32": 2, "kFloat32": 3}
THREADS = 128


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
    loaded = ctypes.CDLL(str(compiled(PLAN, ".so", "-shared", "-O1", "-Xcompiler", "-fPIC")))
    loaded.plan_call.restype = loaded.argument_bytes.restype = ctypes.c_int64
    loaded.plan_call.argtypes = (ctypes.POINTER(_Call), ctypes.c_int, ctypes.c_bool, ctypes.c_void_p)
    return loaded


def kernel_ptx(capability: int, arithmetic: str, tile: str) -> str:
    """Return the module with one kernel, compiled as in the library."""
    chosen = f"-DARITHMETIC={arithmetic}", f"-DTILE={tile.capitalize()}Tile"
    return compiled(KERNEL, ".ptx", "-ptx", "-O3", "-lineinfo", f"-arch=sm_{capability}", *chosen).read_text()


def launch(arguments: dict[str, Any], tile: str, *, allow_tf32: bool = False) -> Tensor:
    """Launch the kernel on the active executor, and return the tokens.

    The operator launches it in the same way.

    Args:
        arguments: Those of `tuning.patch_case.make_inputs`.
        tile: "large" or "small".
        allow_tf32: Whether fp32 products may use TF32.
    """
    active = driver.active
    assert isinstance(active, ExecutorDriver)
    dtype = arguments["weight"].dtype
    arithmetic = "kTensorFloat32" if allow_tf32 and dtype == torch.float32 else ARITHMETIC[dtype]
    program = active.load(kernel_ptx(active.capability, arithmetic, tile))
    memory, out = GlobalMemory(), _empty_tokens(arguments)
    rows = _weight_rows(arguments["pixels"], arguments["weight"])
    call = _call(arguments, rows, out, memory)
    memory.written.add("out")
    library = _plan_library()
    block = np.zeros(library.argument_bytes(), U8)
    blocks = library.plan_call(call, ARITHMETIC_NUMBERS[arithmetic], tile == "large", block.ctypes.data)
    assert program.parameter_bytes == len(block)
    active.launch(program, memory, block, (blocks, 1, 1), THREADS, 0)
    return out


def _empty_tokens(arguments: dict[str, Any]) -> Tensor:
    """Allocate the result: fp32 unless all dtypes are the same."""
    pixels, weight = arguments["pixels"], arguments["weight"]
    patches = (pixels.shape[2] // weight.shape[2]) * (pixels.shape[3] // weight.shape[3])
    dtypes = {value.dtype for name in ("cls", "mask_token", "pos") if (value := arguments[name]) is not None}
    dtype = weight.dtype if dtypes <= {weight.dtype} else torch.float32
    return torch.empty(len(pixels), patches + (arguments["cls"] is not None), len(weight), dtype=dtype)


def _call(arguments: dict[str, Any], rows: Tensor, out: Tensor, memory: GlobalMemory) -> _Call:
    """Return the call with its tensors' addresses in the executor's memory."""
    pixels, weight = arguments["pixels"], arguments["weight"]

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

    return _Call(
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


def _weight_rows(pixels: Tensor, weight: Tensor) -> Tensor:
    """Arrange the weight in the order of the pixels. Its rows consist of whole 16-byte vectors."""
    if pixels.shape[1] > 1 and pixels.stride(1) < pixels.stride(3):  # channels last
        weight = weight.permute(0, 2, 3, 1)
    rows = weight.reshape(len(weight), -1)
    per_vector = 16 // rows.element_size()
    padded = rows.new_zeros(len(rows), -(-rows.shape[1] // per_vector) * per_vector)
    padded[:, : rows.shape[1]] = rows
    return padded
