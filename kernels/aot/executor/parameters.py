"""Bind the arguments of a launch to the parameters of a kernel. Triton's CUDA launcher binds them in the same way."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from .dtypes import U8, Array
from .floats import f64_to_bf16
from .global_memory import GlobalMemory
from .kernel_code import Code


class Argument(NamedTuple):
    """A name, Triton's type and the value."""

    name: str
    kind: str  # "*fp32", "i32", "fp32"
    value: Any


_INTEGERS = {
    **{f"i{bits}": bits // 8 for bits in (8, 16, 32, 64)},
    **{f"u{bits}": bits // 8 for bits in (8, 16, 32, 64)},
    "i1": 1,
    "u1": 1,
}
_FLOATS = {"fp32": "<f", "f32": "<f", "fp64": "<d", "fp16": "<e"}


def scalar_bytes(argument: Argument) -> bytes:
    """Return a non-pointer argument as the launcher passes it.

    Raises:
        OverflowError: If an integer does not fit its type.
    """
    kind = argument.kind
    if kind in _INTEGERS:
        size = _INTEGERS[kind]
        return int(argument.value).to_bytes(size, "little", signed=kind.startswith("i") and kind != "i1")
    if kind in _FLOATS:
        value = float(argument.value)
        if kind in ("fp32", "f32"):
            with np.errstate(over="ignore"):
                return np.array([value]).astype(np.float32).tobytes()
        return struct.pack(_FLOATS[kind], value)
    if kind == "bf16":
        return f64_to_bf16(np.array([float(argument.value)])).tobytes()
    raise NotImplementedError(f"{argument.name}: type {kind} is not supported")


def pointer_bytes(argument: Argument, memory: GlobalMemory) -> bytes:
    """Add a tensor to global memory and return its address; None is a null pointer."""
    value = argument.value
    if value is None:
        return bytes(8)
    if not isinstance(value, Tensor):
        raise TypeError(f"{argument.name} is {type(value).__name__} (expected a tensor)")
    if not value.device.type == "cpu":
        raise TypeError(f"{argument.name} is on {value.device} (expected cpu)")
    address = memory.add(argument.name, value.data_ptr(), value.shape, value.stride(), value.element_size())
    return address.to_bytes(8, "little")


def bind(code: Code, memory: GlobalMemory, arguments: Sequence[Argument]) -> Array:
    """Return the block of parameters.

    Raises:
        ValueError: If the number or the size of the arguments is not that of the parameters.
    """
    parameters = code.function.parameters
    if len(parameters) != len(arguments):
        raise ValueError(f"{code.function.name} has {len(parameters)} parameters (got {len(arguments)} arguments)")
    block = np.zeros(max(16, code.parameter_bytes), U8)
    for parameter, argument in zip(parameters, arguments, strict=True):
        is_pointer = argument.kind.startswith("*")
        data = pointer_bytes(argument, memory) if is_pointer else scalar_bytes(argument)
        if len(data) != parameter.size:
            raise ValueError(f"{argument.name} has {len(data)} bytes (expected {parameter.size})")
        start = code.parameter_offsets[parameter.name]
        block[start : start + len(data)] = np.frombuffer(data, U8)
        if is_pointer and parameter.name in code.written_parameters:
            memory.written.add(argument.name)
    return block
