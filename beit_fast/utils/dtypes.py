"""Dtypes by their names."""

from __future__ import annotations

import torch

from .names import dtype_name

_DTYPES = {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}


def find_dtype(name: str) -> torch.dtype | None:
    """Return the dtype of a name such as "bfloat16", "torch.bfloat16" or "bf16"; None if there is none."""
    return _DTYPES.get(dtype_name(name))
