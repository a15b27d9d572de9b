"""Whether an operator may replace the call of a module: only if no hook or overridden forward is skipped."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def runs_as_written(module: nn.Module) -> bool:
    """Whether `module` has no hooks and no forward of its own."""
    return "forward" not in vars(module) and not any(len(getattr(module, hooks)) for hooks in _HOOKS)


def clone_if_hooked(module: nn.Module, tensor: Tensor) -> Tensor:
    """Clone a tensor that leaves the forward of a hooked `module`.

    FSDP2 and ZeRO-3 free the parameters of a module in a hook after its forward. If the forward returns a parameter or
    a view of one, the caller then reads freed memory. The clone is differentiable and outlives the parameter.

    The hooks alone decide. The storage is not compared: it cannot be read in `torch.func` transforms, and that of a
    DTensor differs from that of its local part.

    Returns:
        `tensor` itself if `module` runs as written and there are no global hooks, else a clone of it.
    """
    hooked = not runs_as_written(module) or nn.modules.module._has_any_global_hook()
    return tensor.clone() if hooked else tensor


def hook_reasons(modules: Mapping[str, nn.Module]) -> list[str]:
    """List the modules that have hooks or their own forward. They must be called."""
    return [
        f"{name} has hooks or its own forward, which would be skipped"
        for name, module in modules.items()
        if not runs_as_written(module)
    ]
