"""Tensors whose values cannot be read as a dense array."""

from __future__ import annotations

import torch
from torch import Tensor


def unreadable_reason(tensor: Tensor) -> str:
    """Return why a tensor has no readable values, for an error.

    The string is empty for a dense tensor of any dtype and device except meta.
    """
    return layout_reason(tensor) or (
        "is on the device meta, which has no values (expected a tensor on a CPU or GPU)" if tensor.is_meta else ""
    )


def layout_reason(tensor: Tensor) -> str:
    """Return why a tensor is not dense, for an error.

    The string is empty if it is dense.
    """
    if tensor.is_nested:
        return "is a nested tensor (expected a dense one: torch.stack images of one size)"
    if tensor.layout != torch.strided:
        return f"has the layout {tensor.layout} (expected a dense tensor: call to_dense())"
    return ""
