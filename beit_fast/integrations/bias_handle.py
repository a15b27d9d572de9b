"""Biases that pass through the modules of a library as a table."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ..layers.module_hooks import has_hooks, watches_keywords, watches_output
from .same_name import inherited, subclass_of_same_name


class BiasHandle(ABC):
    """What an accelerated bias module returns, in place of a dense bias."""

    @abstractmethod
    def dense(self) -> Tensor:
        """Return the library's bias `[1, H, N, N]`."""


def dense(bias: Any) -> Any:
    """Return a bias as a tensor; other values are returned unchanged."""
    return bias.dense() if isinstance(bias, BiasHandle) else bias


def show_dense(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Make the biases in arguments dense if hooks may read them."""
    if not has_hooks(module):  # the common case, in well under a microsecond
        return args, kwargs
    if any(isinstance(value, BiasHandle) for value in args) and watches_output(module):
        args = tuple(dense(value) for value in args)
    if watches_keywords(module):
        kwargs = {name: dense(value) for name, value in kwargs.items()}
    return args, kwargs


Hide = Callable[[nn.Module, str, Any], Any]
"""Return a handle for a dense bias in a keyword argument of a module, else the value."""


def showing_class(original: type[nn.Module], hide: Hide) -> type[nn.Module]:
    """Return a subclass of a block with `showing_methods`.

    Args:
        original: The library's class.
        hide: A function of a module; called with each keyword argument after the hooks.
    """
    return subclass_of_same_name(original, _showing_original, hide)


def showing_methods(call: Callable[..., Any], forward: Callable[..., Any], hide: Hide) -> dict[str, Callable[..., Any]]:
    """Return methods of a block whose hooks see a dense bias.

    The forward gets a handle again, since the modules inside expect one.

    Args:
        call, forward: The methods of the library, which run inside.
        hide: Called with each keyword argument after the hooks.
    """

    def call_showing_dense(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = show_dense(self, args, kwargs)
        return call(self, *args, **kwargs)

    @functools.wraps(forward)
    def forward_hiding_dense(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if watches_keywords(self):
            kwargs = {name: hide(self, name, value) for name, value in kwargs.items()}
        return forward(self, *args, **kwargs)

    return {"__call__": call_showing_dense, "forward": forward_hiding_dense}


def _showing_original(original: type[nn.Module], hide: Hide) -> dict[str, Callable[..., Any]]:
    return showing_methods(inherited(original, "__call__"), inherited(original, "forward"), hide)
