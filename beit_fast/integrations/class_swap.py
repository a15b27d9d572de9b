"""The engine under `accelerate` and `restore`: exchange the classes of modules for subclasses, in place."""

from __future__ import annotations

import types
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from .bias_handle import showing_class
from .forward_scope import scoped_class
from .report import (
    ALREADY,
    LEFT_ALONE,
    REPLACED,
    RESTORED,
    AccelerationReport,
    ModuleChange,
    check_request,
    check_some_change,
    kernel_lines,
)
from .same_name import original_of

Modules = dict[str, nn.Module]
"""Modules by their name in the model."""

Place = tuple[str | None, torch.device, torch.dtype, int]
"""Attention implementation, device, dtype and head dimension."""


class ClassSwap(ABC):
    """A library's BEiT modules, and the subclasses that take their place.

    Attributes:
        originals: the library's class for each replacement.
        trunks: the library's classes whose `trunk_methods` run all layers of a forward pass.
        blocks: the library's classes between a trunk and its attention, which get the shared bias by keyword.
    """

    originals: Mapping[type[nn.Module], type[nn.Module]]
    trunks: tuple[type[nn.Module], ...]
    trunk_methods: tuple[str, ...]
    blocks: tuple[type[nn.Module], ...]

    @staticmethod
    @abstractmethod
    def hide(module: nn.Module, name: str, value: Any) -> Any:
        """Replace a dense shared bias by a handle.

        `name` and `value` are a keyword argument of a block. Other values are returned unchanged.
        """

    @abstractmethod
    def find(self, model: nn.Module, caller: str) -> Modules:
        """Return attention and bias modules; ValueError if there are none."""

    @abstractmethod
    def unsupported_reasons(self, model: nn.Module, found: Modules) -> dict[str, str]:
        """Return the reason for each module that cannot be replaced."""

    @abstractmethod
    def library_class(self, module: nn.Module) -> type[nn.Module]:
        """Return the library's class that a module is an instance of."""

    @abstractmethod
    def replacement(self, module: nn.Module, found: Modules) -> type[nn.Module]:
        """Return the subclass that takes the place of a module's class."""

    @abstractmethod
    def place(self, module: nn.Module) -> Place | None:
        """Return where an accelerated attention module runs, or None for other modules."""

    def restore_error(self, module: nn.Module) -> str:
        """Return why an accelerated module cannot be restored, or an empty string."""
        changed = isinstance(module, tuple(self.originals)) and type(module) not in self.originals
        return f"is a {type(module).__name__} now" if changed else ""

    def already_fast(self, module: nn.Module) -> str | None:
        """Return a note if a module needs no replacement, otherwise None."""
        return "" if isinstance(module, tuple(self.originals)) else None

    def call_reason(self, module: nn.Module) -> str:
        """Return why the library's own attention runs, or an empty string."""
        return ""

    def accelerate(self, model: nn.Module, attn_implementation: str | None) -> AccelerationReport:
        """Exchange the classes of attention and bias modules and their trunks; see an integration's `accelerate`."""
        check_request("accelerate", model, attn_implementation)
        found = self.find(model, "accelerate")
        reasons = self.unsupported_reasons(model, found)
        changes = [self._change(name, module, reasons.get(name, "")) for name, module in found.items()]
        check_some_change(model, changes)
        replacements = {c.name: self.replacement(found[c.name], found) for c in changes if c.change == REPLACED}
        for name, module in found.items():
            if name in replacements:
                exchange_class(module, replacements[name])
            if hasattr(type(module), "attn_implementation"):
                vars(module)["attn_implementation"] = attn_implementation
        self._wrap_or_unwrap(model)
        return AccelerationReport(type(model).__name__, tuple(changes), kernel_lines(self._places(found)))

    def restore(self, model: nn.Module) -> AccelerationReport:
        """Give every accelerated module its own class again; see an integration's `restore`."""
        check_request("restore", model)
        found = self.find(model, "restore")
        errors = [f"\n  {name} {error}" for name, module in found.items() if (error := self.restore_error(module))]
        if errors:
            raise ValueError(f"restore cannot undo changes made after accelerate:{''.join(errors)}")
        changes = []
        for name, module in found.items():
            if type(module) in self.originals:
                exchange_class(module, self.originals[type(module)])
                vars(module).pop("attn_implementation", None)
                changes.append(ModuleChange(name, type(module).__name__, RESTORED))
        self._wrap_or_unwrap(model)
        return AccelerationReport(type(model).__name__, tuple(changes))

    def _change(self, name: str, module: nn.Module, reason: str) -> ModuleChange:
        kind, note = self.library_class(module).__name__, self.already_fast(module)
        if note is not None:
            return ModuleChange(name, kind, ALREADY, note or self.call_reason(module))
        if reason:
            return ModuleChange(name, kind, LEFT_ALONE, reason)
        return ModuleChange(name, kind, REPLACED, self.call_reason(module))

    def _wrap_or_unwrap(self, model: nn.Module) -> None:
        """Set the classes of trunks and blocks with accelerated modules.

        Others get their class back.

        The forward of a trunk opens a scope, within which the modules choose their kernels once. A block shows its
        hooks a dense bias.
        """
        for module in model.modules():
            if not isinstance(module, (*self.trunks, *self.blocks)):
                continue
            wanted = original_of(type(module))
            if any(isinstance(inner, tuple(self.originals)) for inner in module.modules()):
                is_trunk = isinstance(module, self.trunks)
                wanted = scoped_class(wanted, self.trunk_methods) if is_trunk else showing_class(wanted, self.hide)
            if type(module) is not wanted:
                exchange_class(module, wanted)

    def _places(self, found: Modules) -> Iterator[Place]:
        return (place for module in found.values() if (place := self.place(module)) is not None)


def exchange_class(module: nn.Module, cls: type[nn.Module]) -> None:
    """Set a module's class and rebind the copies of its forward.

    Hooks of the library accelerate store these copies.
    """
    held = held_forwards(module)
    module.__class__ = cls
    for name in held:
        vars(module)[name] = types.MethodType(cls.forward, module)


def held_forwards(module: nn.Module) -> list[str]:
    """Return the module's attributes that hold the forward of its class."""
    return [
        name
        for name in ("forward", "_old_forward")
        if getattr(vars(module).get(name), "__func__", None) is type(module).forward
    ]
