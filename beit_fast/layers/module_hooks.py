"""Hooks of modules, looked up at each call: whether an operator may replace the call."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

_GLOBAL = nn.modules.module
_SHARDING = "torch.distributed."
"""Hooks of this package move parameters. They do not read tensors inside other objects."""


def has_hooks(module: nn.Module) -> bool:
    """Whether a call of `module` runs hooks: its own, or global ones of all modules."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or has_global_hooks()
    )


def has_global_hooks() -> bool:
    """Whether torch has hooks of all modules. Profilers and FLOP counters register them."""
    # torch's own _has_any_global_hook stays true after a hook with keyword arguments is removed.
    return bool(
        _GLOBAL._global_forward_hooks
        or _GLOBAL._global_forward_pre_hooks
        or _GLOBAL._global_backward_hooks
        or _GLOBAL._global_backward_pre_hooks
    )


def runs_as_written(module: nn.Module) -> bool:
    """Whether a call runs the forward of the class and no hooks."""
    return "forward" not in vars(module) and not has_hooks(module)


def watches_output(module: nn.Module) -> bool:
    """Whether hooks or a wrapper may read what a module returns.

    Hooks of FSDP2 are not counted, nor is the wrapper of the library accelerate. Both pass other objects on.
    """
    if runs_as_written(module):
        return False
    wrapped = "forward" in vars(module) and "_old_forward" not in vars(module)
    return wrapped or _any_reads(_hooks_of(module))


def watches_keywords(module: nn.Module) -> bool:
    """Whether hooks may read the keyword arguments of a call of `module`."""
    if not (
        module._forward_pre_hooks_with_kwargs
        or module._forward_hooks_with_kwargs
        or _GLOBAL._global_forward_hooks_with_kwargs
    ):
        return False
    own = (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs)
    after = (module._forward_hooks, module._forward_hooks_with_kwargs)
    everywhere = (_GLOBAL._global_forward_hooks, _GLOBAL._global_forward_hooks_with_kwargs)
    return _any_reads(hooks[key] for hooks, keys in (own, after, everywhere) for key in keys if key in hooks)


def clone_if_hooked(module: nn.Module, tensor: Tensor) -> Tensor:
    """Clone a tensor that leaves the forward of a hooked `module`.

    FSDP2 and ZeRO-3 free the parameters of a module in a hook after its forward. If the forward returns a parameter or
    a view of one, the caller then reads freed memory. The clone is differentiable and outlives the parameter.

    The hooks alone decide. The storage is not compared: it cannot be read in `torch.func` transforms, and that of a
    DTensor differs from that of its local part.

    Returns:
        `tensor` itself if `module` runs as written, else a clone of it.
    """
    return tensor if runs_as_written(module) else tensor.clone()


def hook_reasons(modules: Mapping[str, nn.Module]) -> list[str]:
    """List the modules that have hooks or their own forward. They must be called."""
    if has_global_hooks():
        return ["torch has global module hooks, which would be skipped"]
    return [
        f"{name} has hooks or its own forward, which would be skipped"
        for name, module in modules.items()
        if not runs_as_written(module)
    ]


def _hooks_of(module: nn.Module) -> Iterable[Any]:
    own = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    everywhere = (
        _GLOBAL._global_forward_hooks,
        _GLOBAL._global_forward_pre_hooks,
        _GLOBAL._global_backward_hooks,
        _GLOBAL._global_backward_pre_hooks,
    )
    return (hook for hooks in (*own, *everywhere) for hook in hooks.values())


def _any_reads(hooks: Iterable[Any]) -> bool:
    return any(not str(getattr(hook, "__module__", "")).startswith(_SHARDING) for hook in hooks)
