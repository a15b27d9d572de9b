"""Report of the changes that `accelerate` and `restore` made to a model."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from ..ops.dispatch import attention, availability

REPLACED = "replaced"
RESTORED = "restored"
ALREADY = "already fast"
LEFT_ALONE = "left alone"
_IMPLEMENTATIONS = ("triton", None)


@dataclass(frozen=True)
class ModuleChange:
    """The name, library class and change of a module.

    If there was no change, `reason` is the reason.
    """

    name: str
    kind: str
    change: str
    reason: str = ""


@dataclass(frozen=True)
class AccelerationReport:
    """The change of each attention and bias module of a model; `str()` returns a readable summary.

    Attributes:
        model: the model's class.
        modules: every attention and bias module, in the model's order.
        kernels: the kernel that will run for the parameters' device and dtype, and why faster kernels cannot.
    """

    model: str
    modules: tuple[ModuleChange, ...]
    kernels: tuple[str, ...] = ()

    def named(self, change: str) -> dict[str, str]:
        """Return the reasons of the modules with a given change.

        Each name has a reason or an empty string.

        Args:
            change: `"replaced"`, `"restored"`, `"already fast"` or `"left alone"`.
        """
        return {module.name: module.reason for module in self.modules if module.change == change}

    @property
    def replaced(self) -> list[str]:
        return list(self.named(REPLACED))

    @property
    def restored(self) -> list[str]:
        return list(self.named(RESTORED))

    @property
    def already_fast(self) -> list[str]:
        return list(self.named(ALREADY))

    @property
    def left_alone(self) -> dict[str, str]:
        return self.named(LEFT_ALONE)

    def __str__(self) -> str:
        groups: dict[tuple[str, str, str, str], int] = {}
        for module in self.modules:
            pattern = re.sub(r"\b\d+\b", "*", module.name) or "the model itself"
            group = (module.change, module.kind, pattern, module.reason)
            groups[group] = groups.get(group, 0) + 1
        lines = [
            f"  {change}: {count} {kind} ({pattern}){': ' * bool(reason)}{reason}"
            for (change, kind, pattern, reason), count in groups.items()
        ]
        return "\n".join([self.model, *(lines or ["  nothing to do"]), *(f"  {kernel}" for kernel in self.kernels)])


def check_request(caller: str, model: nn.Module, attn_implementation: str | None = None) -> None:
    """Raise TypeError or ValueError for unsupported arguments of `accelerate` and `restore`."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{caller} takes a torch.nn.Module, not a {type(model).__name__}")
    if attn_implementation not in _IMPLEMENTATIONS:
        raise ValueError(f"attn_implementation={attn_implementation!r} is not supported (expected 'triton' or None)")


def check_some_change(model: nn.Module, changes: Iterable[ModuleChange]) -> None:
    """Raise ValueError with every reason if no module can be replaced."""
    changes = list(changes)
    if all(change.change == LEFT_ALONE for change in changes):
        reasons = "".join(f"\n  {change.name or 'it'} ({change.kind}): {change.reason}" for change in changes)
        raise ValueError(f"accelerate cannot replace any BEiT layer of {type(model).__name__}:{reasons}")


def kernel_lines(places: Iterable[tuple[str | None, torch.device, torch.dtype, int]]) -> tuple[str, ...]:
    """Describe the kernel for each distinct implementation, device, dtype and head dimension.

    If the kernel is not fused, the line lists why fused kernels cannot run.
    """
    lines = []
    for implementation, device, dtype, head_dim in dict.fromkeys(places):
        if device.type == "meta":
            lines.append("attention: chosen at the call, because the parameters are on the meta device")
            continue
        report = attention.report(implementation, (), device, dtype, head_dim)
        unsupported = (
            f"\n    {name}: {'; '.join(reasons)}" for name, reasons in report.unsupported_reasons.items() if reasons
        )
        reasons = "" if availability.is_fused(report.would_run) else "".join(unsupported)
        lines.append(f"attention on {device} in {dtype}, head dimension {head_dim}: {report.would_run}{reasons}")
    return tuple(lines)
