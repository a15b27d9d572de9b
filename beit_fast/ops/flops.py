"""Floating-point operations of the operators, for `torch.utils.flop_counter`.

That module imports Triton, so the formulas are registered only once something else imports it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from .attention import attention_backward_op, attention_op
from .import_hooks import when_imported
from .linear_gelu import linear_gelu_op
from .patch_embed import patch_embed_op


def attention_flops(batch: int, tokens: int, heads: int, head_dim: int, matmuls: int = 2) -> int:
    """Count the operations of attention, with `matmuls` products per head and sample.

    A product is `[N, D]` with `[D, N]`, or `[N, N]` with `[N, D]`.
    """
    return 2 * matmuls * batch * heads * tokens * tokens * head_dim


def _attention(q: Sequence[int], *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    batch, tokens, heads, head_dim = q
    return attention_flops(batch, tokens, heads, head_dim)


def _attention_backward(
    grad_out: Sequence[int], q: Sequence[int], *args: Any, out_shape: Any = None, **kwargs: Any
) -> int:
    batch, tokens, heads, head_dim = q
    return attention_flops(batch, tokens, heads, head_dim, matmuls=5)


def _patch_embed(pixels: Sequence[int], weight: Sequence[int], *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    patches = (pixels[2] // weight[2]) * (pixels[3] // weight[3])
    return 2 * pixels[0] * patches * weight[0] * weight[1] * weight[2] * weight[3]


def _linear_gelu(x: Sequence[int], weight: Sequence[int], *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return 2 * math.prod(x) * weight[0]


def _register(counter: ModuleType) -> None:
    formulas = {attention_op: _attention, attention_backward_op: _attention_backward, patch_embed_op: _patch_embed}
    formulas[linear_gelu_op] = _linear_gelu
    for op, formula in formulas.items():
        packet = op.overloadpacket
        if packet not in counter.flop_registry:
            counter.register_flop_formula(packet)(formula)


when_imported("torch.utils.flop_counter", _register)
