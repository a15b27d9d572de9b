"""What attention really ran: calls of the fused operator, and any tensor of the size that it is there to avoid."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

_FUSED = torch.ops.beit_fast.rel_pos_attention.default


class AttentionSpy(TorchDispatchMode):
    """Watches operators below autograd; those inside the fused operator are its own business.

    Attributes:
        calls: of `rel_pos_attention`.
        tables: of those calls, how many had a bias table.
        square: shapes `[..., tokens, tokens]` that other operators gave.
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
