"""Whether calling a module does just what its class says, so that an operator may stand in for the call: a leaf."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def runs_as_written(module: nn.Module) -> bool:
    """Whether `module` has no hooks and no forward of its own."""
    return "forward" not in vars(module) and not any(len(getattr(module, hooks)) for hooks in _HOOKS)


def hook_obstacles(modules: Mapping[str, nn.Module]) -> list[str]:
    """Which of these modules, by name, must be called because of hooks or a forward of their own."""
    return [
        f"{name} has hooks or a forward of its own, which would not be called"
        for name, module in modules.items()
        if not runs_as_written(module)
    ]
