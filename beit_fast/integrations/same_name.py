"""Subclasses of a library's module class under the same name."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

Make = Callable[..., dict[str, Any]]
"""Return the attributes of a subclass; the arguments are the original class and options."""

_made: dict[tuple[type[nn.Module], Make, tuple[Any, ...]], type[nn.Module]] = {}


def subclass_of_same_name(original: type[nn.Module], make: Make, *options: Any) -> type[nn.Module]:
    """Return a subclass with the attributes of `make(original, *options)`.

    It has the name and module of the original. Transformers writes the name to `config.json`, and finds by both the
    outputs that a model can return. A second call returns the same class.

    Args:
        original: The class.
        make: A function of a module, so that instances can be pickled.
        options: Hashable values.
    """
    key = (original, make, options)
    if key not in _made:
        _made[key] = _subclass(original, make, options)
    return _made[key]


def original_of(cls: type[nn.Module]) -> type[nn.Module]:
    """Return the original of a made subclass, else the class."""
    original: type[nn.Module] = vars(cls).get("made_from", cls)
    return original


def inherited(original: type[nn.Module], name: str) -> Callable[..., Any]:
    """Return a method that calls the original's, which may be patched later."""

    @functools.wraps(getattr(original, name))
    def method(*args: Any, **kwargs: Any) -> Any:
        return getattr(original, name)(*args, **kwargs)

    return method


def _subclass(original: type[nn.Module], make: Make, options: tuple[Any, ...]) -> type[nn.Module]:

    def reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
        reduced: Any = original.__reduce_ex__(self, protocol)
        # a class of this name cannot be pickled by its name
        return _rebuild, (original, make, options), *reduced[2:]

    names = ("__module__", "__qualname__", "__doc__")
    attributes = {name: getattr(original, name) for name in names} | {"__reduce_ex__": reduce, "made_from": original}
    return type(original.__name__, (original,), attributes | make(original, *options))


def _rebuild(original: type[nn.Module], make: Make, options: tuple[Any, ...]) -> nn.Module:
    cls = subclass_of_same_name(original, make, *options)
    return cls.__new__(cls)
