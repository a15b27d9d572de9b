"""The engine under `accelerate` and `restore`: exchange the classes of modules for subclasses, in place."""

from __future__ import annotations

import types
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from .bias_handle import showing_class
from .forward_scope import scoped_class
from .library_code import has_own_forward, held_forwards
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
        bias_names: the attributes of trunks and blocks that hold the bias of the attention inside.
        library: the library's name in the genitive.
    """

    originals: Mapping[type[nn.Module], type[nn.Module]]
    trunks: tuple[type[nn.Module], ...]
    trunk_methods: tuple[str, ...]
    blocks: tuple[type[nn.Module], ...]
    bias_names: tuple[str, ...]
    library: str

    @staticmethod
    @abstractmethod
    def hide(module: nn.Module, name: str, value: Any) -> Any:
        """Replace a dense shared bias by a handle.

        `name` and `value` are a keyword argument of a block. Other values are returned unchanged.
        """

    @staticmethod
    @abstractmethod
    def takes_handle(block: nn.Module) -> bool:
        """Return whether the attention of a block is accelerated."""

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
        if not isinstance(module, tuple(self.originals)):
            return ""
        if type(module) not in self.originals:
            return f"is a {type(module).__name__} now"
        return "has a forward of its own" if has_own_forward(module) else ""

    def already_fast(self, module: nn.Module) -> str | None:
        """Return a note if a module needs no replacement, otherwise None."""
        return "" if isinstance(module, tuple(self.originals)) else None

    def call_reason(self, module: nn.Module) -> str:
        """Return why the library's own code runs, or an empty string."""
        return "has a forward of its own" if has_own_forward(module) else ""

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
        changes = self._with_call_reasons(model, changes, found)
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
            return ModuleChange(name, kind, ALREADY, note)
        return ModuleChange(name, kind, LEFT_ALONE if reason else REPLACED, reason)

    def _with_call_reasons(self, model: nn.Module, changes: list[ModuleChange], found: Modules) -> list[ModuleChange]:
        """Add why the library's own attention runs at present."""
        given = self._dense_biases(model)
        reasoned = []
        for change in changes:
            module = found[change.name]
            reason = "" if change.reason else self.call_reason(module) or given.get(module, "")
            note = f"{reason}; {self.library} own attention runs until this changes"
            reasoned.append(replace(change, reason=note) if reason else change)
        return reasoned

    def _dense_biases(self, model: nn.Module) -> dict[nn.Module, str]:
        """Return a reason for each accelerated attention that takes a dense bias."""
        accelerated = tuple(self.originals)
        reasons: dict[nn.Module, str] = {}
        for owner in model.modules():
            if not isinstance(owner, (*self.trunks, *self.blocks)):
                continue
            for name in self.bias_names:
                bias = owner._modules.get(name)
                if bias is not None and not isinstance(bias, accelerated):
                    reason = f"takes the dense bias of a {type(bias).__module__}.{type(bias).__qualname__}"
                    reasons |= {m: reason for m in owner.modules() if hasattr(type(m), "attn_implementation")}
        return reasons

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
                wanted = (
                    scoped_class(wanted, self.trunk_methods)
                    if is_trunk
                    else showing_class(wanted, self.hide, self.takes_handle)
                )
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
