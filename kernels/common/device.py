"""The device of a tensor: architecture, number of SMs, the precision of fp32 products, and faults of the compiler."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch
import triton
from torch import Tensor

from . import compiler_hazards, gpu


def dot_precision(q: Tensor) -> str:
    """Return the precision of `tl.dot` for inputs like `q`."""
    # tf32 only if torch's own fp32 matrix products on CUDA may use it.
    if q.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32":
        return "tf32"
    return "ieee"


def device_of(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Make the tensor's device current."""
    # Triton launches on the current device, which may be another one.
    return torch.cuda.device_of(tensor) if tensor.is_cuda else contextlib.nullcontext()


def architecture_of(tensor: Tensor) -> str:
    """Return the architecture class of the tensor's device."""
    return _architecture(tensor.device.index) if tensor.is_cuda else gpu.INTERPRETER


def needs_copy_fence(tensor: Tensor) -> bool:
    """Return whether Triton omits the fence after asynchronous copies on this device."""
    return compiler_hazards.needs_copy_fence(capability_of(tensor), triton.__version__)


def is_pipelined(kernel: str, tensor: Tensor) -> bool:
    """Return whether `kernel` may copy tiles asynchronously on the tensor's device."""
    return compiler_hazards.is_pipelined(kernel, capability_of(tensor), triton.__version__)


def capability_of(tensor: Tensor) -> int:
    """Return the compute capability of the tensor's device, 90 for 9.0; 0 for a CPU and for ROCm."""
    return _capability(tensor.device.index) if tensor.is_cuda else 0


def num_sms_of(tensor: Tensor) -> int:
    """Return the number of SMs of the tensor's device."""
    # 0 on a CPU: more programs do not make the interpreter faster.
    return _num_sms(tensor.device.index) if tensor.is_cuda else 0


@functools.cache
def _architecture(device_index: int) -> str:
    return gpu.architecture_class(*divmod(_capability(device_index), 10))


@functools.cache
def _capability(device_index: int) -> int:
    if torch.version.hip is not None:
        return 0
    major, minor = torch.cuda.get_device_capability(device_index)
    return 10 * major + minor


@functools.cache
def _num_sms(device_index: int) -> int:
    return torch.cuda.get_device_properties(device_index).multi_processor_count
