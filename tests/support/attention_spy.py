"""Record choices of kernels, calls of the fused attention operator, and dense bias tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from beit_fast.ops.dispatch import attention

_FUSED = torch.ops.beit_fast.rel_pos_attention.default


class AttentionSpy(TorchDispatchMode):
    """Record operators below autograd, except those inside the fused operator.

    Attributes:
        calls: Number of calls of `rel_pos_attention`.
        tables: Number of those calls with a bias table.
        square: Shapes `[..., tokens, tokens]` that other operators returned.
    """

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.tokens = tokens
        self.calls = 0
        self.tables = 0
        self.square: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is _FUSED:
            self.calls += 1
            self.tables += args[3] is not None
            return function(*args, **(kwargs or {}))
        result = function(*args, **(kwargs or {}))
        for x in pytree.tree_leaves(result):
            if isinstance(x, Tensor) and x.shape[-2:] == (self.tokens, self.tokens):
                self.square.append(tuple(x.shape))
        return result


def record_choices(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, torch.dtype]]:
    """Record the device type and dtype of each later call of the attention dispatcher."""
    calls: list[tuple[str, torch.dtype]] = []
    choose = attention.choose

    def recording(implementation: Any, device: torch.device, dtype: torch.dtype, head_dim: int) -> tuple[str, str]:
        calls.append((device.type, dtype))
        return choose(implementation, device, dtype, head_dim)

    monkeypatch.setattr(attention, "choose", recording)
    return calls
