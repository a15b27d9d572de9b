"""What `accelerate` and `restore` did to a model, module by module."""

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
    """One module: its name in the model, its class before, what happened, and why where nothing did."""

    name: str
    kind: str
    change: str
    reason: str = ""


@dataclass(frozen=True)
class AccelerationReport:
    """What happened to each attention and bias module of a model; `str()` is for people.

    Attributes:
        model: the model's class.
        modules: every module that was looked at, in the model's order.
        kernels: what will run attention for the parameters' device and dtype, and why faster kernels will not.
    """

    model: str
    modules: tuple[ModuleChange, ...]
    kernels: tuple[str, ...] = ()

    def named(self, change: str) -> dict[str, str]:
        """The modules of one kind of change, `"replaced"`, `"restored"`, `"already fast"` or `"left alone"`.

        Each with the reason, empty where there is none.
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
    """Raise TypeError or ValueError for what `accelerate` and `restore` take from nobody."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{caller} takes a torch.nn.Module, not a {type(model).__name__}")
    if attn_implementation not in _IMPLEMENTATIONS:
        raise ValueError(f"attn_implementation is {attn_implementation!r}; accepted are 'triton' and None")


def check_some_change(model: nn.Module, changes: Iterable[ModuleChange]) -> None:
    """Raise ValueError with every reason where all modules would be left alone."""
    changes = list(changes)
    if all(change.change == LEFT_ALONE for change in changes):
        refusals = "".join(f"\n  {change.name or 'it'} ({change.kind}): {change.reason}" for change in changes)
        raise ValueError(f"accelerate can replace none of the BEiT layers of {type(model).__name__}:{refusals}")


def kernel_lines(places: Iterable[tuple[str | None, torch.device, torch.dtype, int]]) -> tuple[str, ...]:
    """What will run attention for each implementation, device, dtype and head dimension, once each.

    Where that is no fused kernel the line tells why none serves.
    """
    lines = []
    for implementation, device, dtype, head_dim in dict.fromkeys(places):
        if device.type == "meta":
            lines.append("attention: chosen at the call, since the parameters are on the meta device now")
            continue
        report = attention.report(implementation, (), device, dtype, head_dim)
        refusals = (f"\n    {name}: {'; '.join(reasons)}" for name, reasons in report.refusals.items() if reasons)
        reasons = "" if availability.is_fused(report.would_run) else "".join(refusals)
        lines.append(f"attention on {device} in {dtype}, head dimension {head_dim}: {report.would_run}{reasons}")
    return tuple(lines)
