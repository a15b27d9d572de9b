"""One choice of kernels for each forward pass of another library's model.

The layers of another library do not pass a choice on. The forward of a trunk therefore opens a scope, and its layers
share their choices within it. A layer outside a scope chooses for itself. Such a layer is called alone, or gradient
checkpointing runs it again in the backward pass, which has left the forward. Compiled code has no scope, because the
choice is a constant there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..layers.context import Kernels, choose_kernels, query_dtype
from ..layers.linear import runs_eagerly
from ..ops.functorch import transforms_are_active
from .same_name import inherited, subclass_of_same_name


class _Facts(NamedTuple):
    """What a choice depends on and may change within a forward."""

    implementation: str | None
    device: torch.device
    dtype: torch.dtype
    head_dim: int
    runs_eagerly: bool
    transforms_are_active: bool


_choices: ContextVar[dict[_Facts, Kernels] | None] = ContextVar("beit_fast_choices", default=None)


def choose_in_forward(implementation: str | None, device: torch.device, dtype: torch.dtype, head_dim: int) -> Kernels:
    """Choose the kernels for queries, once in each forward of a trunk.

    A repeated call with the same arguments returns the stored choice.

    Args:
        implementation: `"eager"`, `"sdpa"`, `"triton"` or None.
        device, dtype: Of the queries.
        head_dim: Elements of a head.

    Raises:
        ValueError: If the implementation is unknown, or `"triton"` is requested and no kernel serves.
    """
    if _is_captured():
        return choose_kernels(implementation, device, dtype, head_dim)
    choices = _choices.get()
    if choices is None:
        return choose_kernels(implementation, device, dtype, head_dim)
    facts = _Facts(implementation, device, dtype, head_dim, runs_eagerly(), transforms_are_active())
    if facts not in choices:
        choices[facts] = choose_kernels(implementation, device, dtype, head_dim)
    return choices[facts]


def kernels_for(hidden_states: Tensor, implementation: str | None, head_dim: int) -> Kernels:
    """Choose the kernels for queries that are computed from `hidden_states`."""
    return choose_in_forward(implementation, hidden_states.device, query_dtype(hidden_states), head_dim)


def in_scope(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the forward of a trunk to open a scope. Within another scope it opens none."""

    @functools.wraps(forward)
    def forward_in_scope(*args: Any, **kwargs: Any) -> Any:
        if _is_captured() or _choices.get() is not None:
            return forward(*args, **kwargs)
        token = _choices.set({})
        try:
            return forward(*args, **kwargs)
        finally:
            _choices.reset(token)

    return forward_in_scope


def _is_captured() -> bool:
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def scoped_class(original: type[nn.Module], methods: tuple[str, ...]) -> type[nn.Module]:
    """Return a subclass of a trunk whose `methods` open a scope."""
    return subclass_of_same_name(original, _scoped_methods, methods)


def _scoped_methods(original: type[nn.Module], methods: tuple[str, ...]) -> dict[str, Any]:
    return {name: in_scope(inherited(original, name)) for name in methods}
