"""The device of a tensor: architecture class, number of SMs, and the precision of fp32 products."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch
from torch import Tensor

from . import gpu


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


def num_sms_of(tensor: Tensor) -> int:
    """Return the number of SMs of the tensor's device."""
    # 0 on a CPU: more programs do not make the interpreter faster.
    return _num_sms(tensor.device.index) if tensor.is_cuda else 0


@functools.cache
def _architecture(device_index: int) -> str:
    if torch.version.hip is not None:
        return gpu.SMALL
    return gpu.architecture_class(*torch.cuda.get_device_capability(device_index))


@functools.cache
def _num_sms(device_index: int) -> int:
    return torch.cuda.get_device_properties(device_index).multi_processor_count
