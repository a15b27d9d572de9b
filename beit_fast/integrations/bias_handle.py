"""Biases that pass through the modules of a library as a table."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..layers.module_hooks import runs_as_written, watches_keywords, watches_output
from .library_code import has_own_forward
from .same_name import inherited, subclass_of_same_name


class BiasHandle(ABC):
    """What an accelerated bias module returns, in place of a dense bias."""

    @abstractmethod
    def dense(self) -> Tensor:
        """Return the library's dense bias.

        Its shape is `[H, N, N]` in timm and `[1, H, N, N]` in Transformers.
        """


Handle = TypeVar("Handle", bound=type)
_OPERATORS = ("add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "matmul", "rmatmul", "neg", "getitem")


def acts_as_dense(handle: Handle) -> Handle:
    """Let a class of handles stand for the dense bias.

    It does so in functions, operators and methods of torch.
    A module that was replaced after `accelerate`, or that a user patched, takes the bias for a tensor. Methods that
    change a tensor in place are left out, because they would change a copy.
    """

    def torch_function(cls: type, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*_all_dense(args), **_all_dense(kwargs or {}))

    def tensor_attribute(self: Any, name: str) -> Any:
        if name.startswith("_") or name.endswith("_") or not hasattr(Tensor, name):
            raise AttributeError(f"{type(self).__name__!r} has no attribute {name!r}; dense() returns a tensor")
        return getattr(self.dense(), name)

    methods: dict[str, Any] = {f"__{name}__": _operator(f"__{name}__") for name in _OPERATORS}
    methods |= {"__torch_function__": classmethod(torch_function), "__getattr__": tensor_attribute}
    for name, method in methods.items():
        setattr(handle, name, method)
    return handle


def _operator(name: str) -> Callable[..., Any]:
    def of_dense(self: Any, *others: Any) -> Any:
        return getattr(self.dense(), name)(*(dense(other) for other in others))

    return of_dense


def _all_dense(values: Any) -> Any:
    return tree_map(dense, values, is_leaf=lambda value: isinstance(value, BiasHandle))


def dense(bias: Any) -> Any:
    """Return a bias as a tensor; other values are returned unchanged."""
    return bias.dense() if isinstance(bias, BiasHandle) else bias


def show_dense(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Make biases in arguments dense if hooks or users may read them."""
    if runs_as_written(module):  # the common case, in well under a microsecond
        return args, kwargs
    own = has_own_forward(module)
    if any(isinstance(value, BiasHandle) for value in args) and (own or watches_output(module)):
        args = tuple(dense(value) for value in args)
    if own or watches_keywords(module):
        kwargs = {name: dense(value) for name, value in kwargs.items()}
    return args, kwargs


Hide = Callable[[nn.Module, str, Any], Any]
"""Return a handle for a dense bias in a keyword argument of a module, else the value."""

TakesHandle = Callable[[nn.Module], bool]
"""Whether the attention of a block takes a handle. It may have been replaced since `accelerate`."""


def showing_class(original: type[nn.Module], hide: Hide, takes_handle: TakesHandle) -> type[nn.Module]:
    """Return a subclass of a block with `showing_methods`.

    Args:
        original: The library's class.
        hide, takes_handle: Functions of a module, see `showing_methods`.
    """
    return subclass_of_same_name(original, _showing_original, hide, takes_handle)


def showing_methods(
    call: Callable[..., Any], forward: Callable[..., Any], hide: Hide, takes_handle: TakesHandle
) -> dict[str, Callable[..., Any]]:
    """Return methods of a block whose hooks see a dense bias.

    The forward gets a handle again, unless the attention inside does not take one.

    Args:
        call, forward: The methods of the library, which run inside.
        hide: Called with each keyword argument after the hooks.
        takes_handle: Called with the block. If false, the forward gets a dense bias.
    """

    def call_showing_dense(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = show_dense(self, args, kwargs)
        return call(self, *args, **kwargs)

    @functools.wraps(forward)
    def forward_hiding_dense(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not takes_handle(self):
            kwargs = {name: dense(value) for name, value in kwargs.items()}
        elif watches_keywords(self):
            kwargs = {name: hide(self, name, value) for name, value in kwargs.items()}
        return forward(self, *args, **kwargs)

    return {"__call__": call_showing_dense, "forward": forward_hiding_dense}


def _showing_original(
    original: type[nn.Module], hide: Hide, takes_handle: TakesHandle
) -> dict[str, Callable[..., Any]]:
    return showing_methods(inherited(original, "__call__"), inherited(original, "forward"), hide, takes_handle)
