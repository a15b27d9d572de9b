"""Support for `torch.func` transforms and forward-mode differentiation of the operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .library import Autograd


def transforms_are_active() -> bool:
    """Whether a `torch.func` transform or `torch.vmap` is running, outside `torch.compile`."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def raise_on_forward_mode(*tensors: Tensor | None) -> None:
    """Raise if a tensor has a tangent: PyTorch would silently drop it.

    Raises:
        RuntimeError: If a tensor is a dual tensor.
    """
    if torch.compiler.is_compiling() or torch.autograd.forward_ad._current_level < 0:
        return
    unpack = torch.autograd.forward_ad.unpack_dual
    if any(isinstance(x, Tensor) and unpack(x).tangent is not None for x in tensors):
        raise RuntimeError("beit_fast operators have no forward-mode derivative; use attn_implementation='eager'")


def autograd_function(name: str, op: Callable[..., Any], autograd: Autograd) -> type[torch.autograd.Function]:
    """Make an `autograd.Function` of an operator: transforms reject what `register_autograd` makes.

    Args:
        name: class name, which error messages and profiles show.
        op: the operator.
        autograd: backward function of the operator, and what it saves.
    """

    def forward(*inputs: Any) -> Any:
        return op(*inputs)

    def save_nothing(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    methods = {
        "generate_vmap_rule": True,
        "forward": staticmethod(forward),
        "setup_context": staticmethod(autograd.setup_context or save_nothing),
        "backward": staticmethod(autograd.backward),
    }
    return type(name, (torch.autograd.Function,), methods)
