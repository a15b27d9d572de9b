"""Floating-point operations of the operators, for `torch.utils.flop_counter`.

That module imports Triton, so it is not imported here: the formulas are handed over when somebody else imports it.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch

_COUNTER = "torch.utils.flop_counter"


def attention_flops(batch: int, tokens: int, heads: int, head_dim: int, matmuls: int = 2) -> int:
    """Operations of `matmuls` products of `[N, D]` with `[D, N]` (or `[N, N]` with `[N, D]`) per head and sample."""
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


def _register(counter: ModuleType) -> None:
    formulas = {"rel_pos_attention": _attention, "rel_pos_attention_backward": _attention_backward}
    for name, formula in (formulas | {"patch_embed": _patch_embed}).items():
        packet = getattr(torch.ops.beit_fast, name)
        if packet not in counter.flop_registry:
            counter.register_flop_formula(packet)(formula)


class _RegisterOnImport(importlib.abc.MetaPathFinder):
    """Finds `torch.utils.flop_counter` once, as Python would, and registers the formulas when it has been executed."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != _COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                _register(module)

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


if _COUNTER in sys.modules:
    _register(sys.modules[_COUNTER])
else:
    sys.meta_path.insert(0, _RegisterOnImport())
