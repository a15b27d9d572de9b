"""Operator library `beit_fast` and the helper that registers an operator in it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch

from .dispatch.availability import INTERPRETED
from .validation import raise_errors, raise_type_errors

library = torch.library.Library("beit_fast", "FRAGMENT")

Arguments = TypeVar("Arguments", bound=tuple[Any, ...])
"""A typed tuple of an operator's arguments, see `arguments.py`."""


TYPE_ERRORS = (AttributeError, RuntimeError, TypeError)
"""What a call raises if an argument has a wrong type."""


def _no_reasons(arguments: Any) -> Sequence[str]:
    return ()


class Kernel(NamedTuple):
    """Kernel function of an operator, and the reasons why it cannot serve.

    Both are functions of the operator's argument tuple.
    """

    run: Callable[[Any], Any]
    unsupported_reasons: Callable[[Any], Sequence[str]] = _no_reasons


class Autograd(NamedTuple):
    """Backward function of an operator and what it saves.

    Both are functions as `torch.library.register_autograd` takes them.
    """

    backward: Callable[..., Any]
    setup_context: Callable[..., None] | None = None


def call_op(op: Callable[..., Any], name: str, arguments: Arguments, errors: Callable[[Arguments], list[str]]) -> Any:
    """Call an operator and list every error of its arguments. Torch and the native library raise only the first."""
    try:
        return op(*arguments)
    except TYPE_ERRORS:
        raise_type_errors(name, arguments)
        raise
    except ValueError as error:
        first_error = error
    found = errors(arguments) if f"beit_fast::{name}: expected" in str(first_error) else []
    if found:
        raise_errors(name, found, arguments)
    raise first_error


def register_op(
    schema: str,
    arguments: type[Arguments],
    *,
    errors: Callable[[Arguments], list[str]],
    fallback: Kernel,
    fake: Callable[[Arguments], Any],
    triton: Kernel | None = None,
    cuda: Kernel | None = None,
    autograd: Autograd | None = None,
    vmap: Callable[..., tuple[Any, Any]] | None = None,
    autocast: Callable[[Arguments, torch.dtype], tuple[Any, ...]] | None = None,
) -> Any:
    """Define an operator and register its kernels and rules.

    Args:
        schema: `name(arguments) -> results`.
        arguments: tuple type with the schema's names, order and defaults. Every function below takes one.
        errors: returns the errors of the arguments; checked before each kernel and in the fake.
        fallback: PyTorch operations for any device without a kernel of its own.
        fake: empty results, for tracing.
        triton: kernel for CUDA; also for CPU in Triton's interpreter.
        cuda: kernel for CUDA that is not Triton's.
        autograd: backward function. Without one the operator has no gradient formula.
        vmap: rule for `torch.vmap`, as `torch.library.register_vmap` takes it.
        autocast: the arguments cast to autocast's dtype.

    Returns:
        The operator `torch.ops.beit_fast.<name>.default`.
    """
    name = schema.partition("(")[0]
    qualified_name = f"beit_fast::{name}"
    library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    op = getattr(torch.ops.beit_fast, name).default

    def checked(kernel: Kernel) -> Callable[..., Any]:
        return _checked(kernel, name, arguments, errors)

    # CompositeExplicitAutograd rather than CPU: the native library adds CPU kernels without overriding anything.
    library.impl(name, checked(fallback), "CompositeExplicitAutograd")
    if cuda is not None:
        library.impl(name, checked(cuda), "CUDA")
    if triton is not None:
        for key in ("CUDA", "CPU") if INTERPRETED else ("CUDA",):
            library.impl(name, checked(triton), key)
    torch.library.register_fake(qualified_name, checked(Kernel(fake)), lib=library)
    if autograd is not None:
        torch.library.register_autograd(
            qualified_name, autograd.backward, setup_context=autograd.setup_context, lib=library
        )
    if vmap is not None:
        torch.library.register_vmap(qualified_name, vmap, lib=library)
    if autocast is not None:
        for device_type in ("cpu", "cuda"):
            _register_autocast(op, name, arguments, autocast, device_type)
    return op


def _checked(
    kernel: Kernel, name: str, arguments: type[Arguments], errors: Callable[[Arguments], list[str]]
) -> Callable[..., Any]:
    """Wrap a kernel: it takes the operator's arguments and raises one error that lists everything that is wrong."""

    def call(*args: Any, **kwargs: Any) -> Any:
        given = arguments(*args, **kwargs)
        reasons = [*errors(given), *kernel.unsupported_reasons(given)]
        if reasons:
            raise_errors(name, reasons, given)
        return kernel.run(given)

    return call


def _register_autocast(
    op: Any,
    name: str,
    arguments: type[Arguments],
    autocast: Callable[[Arguments, torch.dtype], tuple[Any, ...]],
    device_type: str,
) -> None:
    """Register by hand: torch's helper casts every tensor, the bias table too, and to a fixed dtype."""
    key = f"Autocast{torch._C._dispatch_key_for_device(device_type)}"
    autocast_keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def call(*args: Any, **kwargs: Any) -> Any:
        dtype = torch.get_autocast_dtype(device_type)
        with torch._C._ExcludeDispatchKeyGuard(autocast_keys):
            return op(*autocast(arguments(*args, **kwargs), dtype))

    library.impl(name, call, key)
