"""Whether the code and data that acceleration replaces are still the library's.

Users patch methods and change buffers, before or after `accelerate`. Each call asks: identities of functions, and the
version of a buffer.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from ..ops.functorch import transforms_are_active
from ..position_bias import Window, relative_position_index

_Checked = tuple[weakref.ref[Tensor], int, Window, bool]
_checked: dict[int, _Checked] = {}
"""By the id of an index: itself, its version, the window, and whether it is the window's."""


Functions = Mapping[str, Callable[..., Any] | None]
"""Functions of a library by name. None in place of one that was patched before the import."""


def library_functions(owner: type[nn.Module], *names: str) -> Functions:
    """Return methods of a class by name, as its file defines them."""
    return {name: _from_own_file(getattr(owner, name), owner) for name in names}


def changed_function(functions: Functions, owner: type[nn.Module], module: nn.Module | None = None) -> str:
    """Return which function is not the library's now, or an empty string.

    Args:
        functions: The result of `library_functions`.
        owner: The class whose functions are compared.
        module: An instance whose own attributes come before those of its class, or None.
    """
    for name, function in functions.items():
        current = getattr(owner, name)
        changed = current is not function and (function is None or _replaced_by_us(current) is not function)
        if changed or (module is not None and name in vars(module)):
            return f"has a {name} that is not the library's"
    return ""


def changed_sdpa() -> str:
    """Return a reason if `F.scaled_dot_product_attention` was patched, or an empty string."""
    patched = F.scaled_dot_product_attention is not torch._C._nn.scaled_dot_product_attention
    return "calls a scaled_dot_product_attention that is not torch's" if patched else ""


def held_forwards(module: nn.Module) -> list[str]:
    """Return the module's attributes that hold the forward of its class."""
    return [
        name
        for name in ("forward", "_old_forward")
        if getattr(vars(module).get(name), "__func__", None) is type(module).forward
    ]


def has_own_forward(module: nn.Module) -> bool:
    """Whether a user gave an instance a forward. The wrapper of the library accelerate is not one."""
    held = vars(module)
    return "forward" in held and "_old_forward" not in held and not held_forwards(module)


def changed_index(module: Any) -> str:
    """Return a reason if a timm module has another index, or "".

    Its bias is then not the one of its table and window.
    The values of its `relative_position_index` are read once for each version of the buffer.
    """
    height, width = module.window_size
    if _is_index_of(module._buffers.get("relative_position_index"), height, width):
        return ""
    return f"has a relative_position_index that is not the one of its window {(height, width)}"


def _is_index_of(index: Any, height: int, width: int) -> bool:
    # A subclass, as in torch.export, and the tensors of a transform have no values to read.
    if type(index) is not Tensor or index.is_meta or transforms_are_active():
        return isinstance(index, Tensor)
    version = -1 if index.is_inference() else index._version
    known = _checked.get(id(index))
    if known is not None and known[0]() is index and known[1:3] == (version, (height, width)):
        return known[3]
    with torch.no_grad(), _disable_current_modes():
        wanted = relative_position_index((height, width), index.device)
        same = index.shape == wanted.shape and bool((index == wanted).all())
    key = id(index)
    _checked[key] = weakref.ref(index, lambda _: _checked.pop(key, None)), version, (height, width), same
    return same


# Dynamo then asks once, when it compiles; torch.compiler.assume_constant_result imports it to set this attribute.
vars(_is_index_of)["_dynamo_marked_constant"] = True


def _from_own_file(function: Any, owner: type[nn.Module]) -> Any:
    """Return a function that is defined beside its class, or None; decorators of the same library may be around it."""
    library, inner = owner.__module__.partition(".")[0], function
    while hasattr(inner, "__wrapped__") and _file_of(inner).partition(".")[0] in (library, "torch"):
        inner = inner.__wrapped__
    return function if _file_of(inner) == owner.__module__ else None


def _file_of(function: Any) -> str:
    return str(getattr(function, "__globals__", {}).get("__name__", ""))


def _replaced_by_us(function: Any) -> Any:
    """Return what a patch of `register` calls."""
    return getattr(function, "__wrapped__", None) if _file_of(function).startswith(_PACKAGE) else None


_PACKAGE = f"{__name__.partition('.')[0]}."
