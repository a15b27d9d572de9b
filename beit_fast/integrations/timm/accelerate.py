"""timm's BEiT, sped up where it stands or converted.

`accelerate` changes the class of some of timm's modules and nothing else: parameters, names, hooks and settings stay,
so `features_only`, `set_input_size`, `forward_intermediates`, `reset_classifier`, optimizers and checkpoints go on as
before. `to_timm` and `from_timm` copy an image classifier from one package to the other.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...layers.attention_backends import attend
from ...layers.module_hooks import clone_if_hooked, runs_as_written
from ...position_bias import Window
from ..report import (
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
from .conversion import timm_beit

_FORWARD_ARGUMENTS = ("self", "x", "shared_rel_pos_bias")


class SharedTable(NamedTuple):
    """What blocks are handed in place of a dense shared bias."""

    table: Tensor  # [(2Wh-1)(2Ww-1)+3, H]
    window: Window


class TableRelativePositionBias(timm_beit.RelativePositionBias):
    """timm's shared bias, which hands its table to the blocks and gathers nothing."""

    def forward(self) -> SharedTable:
        return SharedTable(clone_if_hooked(self, self.relative_position_bias_table), self.window_size)


class FusedAttention(timm_beit.Attention):
    """timm's attention by `beit_fast.rel_pos_attention`, which reads the bias from its table.

    As under timm's own fused attention, `attn_drop` is not called: its probability is read.
    """

    attn_implementation: str | None = None

    def forward(self, x: Tensor, shared_rel_pos_bias: SharedTable | None = None) -> Tensor:
        packed = self._project(x).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = packed.unbind(2)  # [B, N, H, D]
        table, window = self._table(shared_rel_pos_bias)
        dropout_p = self.attn_drop.p if self.training else 0.0
        out = attend(q, k, v, table, window, None, self.scale, dropout_p, self.attn_implementation)
        return self.proj_drop(self.proj(out.flatten(2)))

    def _project(self, x: Tensor) -> Tensor:
        """`[B, N, 3 * H * D]`, query first."""
        if self.q_bias is None:
            return self.qkv(x)
        bias = torch.cat((self.q_bias, self.k_bias, self.v_bias))
        return self.qkv(x) + bias if self.qkv_bias_separate else F.linear(x, self.qkv.weight, bias)

    def _table(self, shared: SharedTable | None) -> tuple[Tensor | None, Window | None]:
        """The gather is linear, so two biases are one gather from the sum of their tables."""
        if isinstance(shared, Tensor):
            raise ValueError(
                f"an accelerated Attention was given a dense shared_rel_pos_bias {list(shared.shape)}: accelerate the "
                "whole Beit, whose shared bias then hands out its table, or restore() this part of it"
            )
        own = self.relative_position_bias_table
        if shared is None:
            return own, self.window_size
        return (shared.table if own is None else own + shared.table), shared.window


_ORIGINALS: dict[type[nn.Module], type[nn.Module]] = {
    FusedAttention: timm_beit.Attention,
    TableRelativePositionBias: timm_beit.RelativePositionBias,
}
_REPLACEMENTS = {original: replacement for replacement, original in _ORIGINALS.items()}


def accelerate(model: nn.Module, attn_implementation: str | None = None) -> AccelerationReport:
    """Let the attention of timm's BEiT read its bias from the table inside the kernel, in place.

        model = timm.create_model("beit_base_patch16_224", pretrained=True)
        print(accelerate(model))

    Outputs and gradients stay as they were but for rounding, and no `[H, N, N]` bias is made any more. All that timm
    does with the model works as before, but for `torch.jit.script`, which takes it after `restore`.

    Args:
        model: a `timm.models.beit.Beit`, or any module that contains one, such as what `features_only=True` gives.
        attn_implementation: None for a fused kernel where one serves the device and dtype at the time of a call, else
            PyTorch's attention with a dense bias; `"triton"` for the kernel, an error at the call where none serves.

    Returns:
        What was replaced, what was left alone and why, and which kernel will run where the parameters are now. A second
        call replaces nothing and takes over `attn_implementation`. Left alone is an attention or shared bias of another
        class, with a forward of its own or with hooks that would not be called as before, and all that shares a bias
        with such a one.

    Raises:
        TypeError: `model` is no module.
        ValueError: there is no attention of timm's BEiT, with what was looked for and found; none could be replaced; or
            timm's attention takes other arguments than those known here. The model is as it was.
    """
    check_request("accelerate", model, attn_implementation)
    _check_version()
    found = _find(model, "accelerate")
    reasons = _reasons_against(model, found)
    changes = [_change_of(name, module, reasons.get(name, "")) for name, module in found.items()]
    check_some_change(model, changes)
    for change in changes:
        module = found[change.name]
        if change.change == REPLACED:
            module.__class__ = _REPLACEMENTS[type(module)]
        if isinstance(module, FusedAttention):
            module.attn_implementation = attn_implementation
    return AccelerationReport(type(model).__name__, tuple(changes), kernel_lines(_places(found.values())))


def restore(model: nn.Module) -> AccelerationReport:
    """Undo `accelerate`: the layers are again what timm made them.

    Returns:
        What was restored; nothing where `accelerate` had done nothing.

    Raises:
        TypeError: `model` is no module.
        ValueError: there is no attention of timm's BEiT, or an accelerated module was given a forward of its own since;
            the model is as it was.
    """
    check_request("restore", model)
    found = _find(model, "restore")
    replaced = {name: module for name, module in found.items() if type(module) in _ORIGINALS}
    held = [name for name, module in replaced.items() if "forward" in vars(module)]
    if held:
        raise ValueError(f"restore cannot undo what came after accelerate: a forward of its own of {', '.join(held)}")
    for module in replaced.values():
        vars(module).pop("attn_implementation", None)
        module.__class__ = _ORIGINALS[type(module)]
    changes = (ModuleChange(name, type(module).__name__, RESTORED) for name, module in replaced.items())
    return AccelerationReport(type(model).__name__, tuple(changes))


def _check_version() -> None:
    arguments = tuple(inspect.signature(timm_beit.Attention.forward).parameters)
    if arguments != _FORWARD_ARGUMENTS:
        import timm

        raise ValueError(
            f"the attention of BEiT in timm {timm.__version__} takes ({', '.join(arguments[1:])}); accepted: "
            f"({', '.join(_FORWARD_ARGUMENTS[1:])}), as in timm 1.0.31"
        )


def _find(model: nn.Module, caller: str) -> dict[str, nn.Module]:
    """Attentions and shared biases by name, or an error that says what was looked for and what is there."""
    known = tuple(_REPLACEMENTS)
    found: dict[str, nn.Module] = {name: x for name, x in model.named_modules() if isinstance(x, known)}
    if not any(isinstance(module, timm_beit.Attention) for module in found.values()):
        wanted = ", ".join(_class_name(original) for original in _REPLACEMENTS)
        there = ", ".join(sorted({_class_name(type(module)) for module in model.modules()}))
        raise ValueError(
            f"{caller} finds no attention of timm's BEiT in {type(model).__name__}.\n"
            f"Looked for: {wanted}.\nFound: {there}."
        )
    return found


def _change_of(name: str, module: nn.Module, reason: str) -> ModuleChange:
    kind = next(original for original in _REPLACEMENTS if isinstance(module, original)).__name__
    if type(module) in _ORIGINALS:
        return ModuleChange(name, kind, ALREADY)
    return ModuleChange(name, kind, LEFT_ALONE if reason else REPLACED, reason)


def _reasons_against(model: nn.Module, found: Mapping[str, nn.Module]) -> dict[str, str]:
    """Why modules are to be left alone: a shared bias and the attentions that are handed it go together."""
    reasons = {name: reason for name, module in found.items() if (reason := _obstacle(module))}
    for bias in [name for name, module in found.items() if isinstance(module, timm_beit.RelativePositionBias)]:
        prefix = bias.rpartition(".")[0]
        owner = model.get_submodule(prefix)
        if type(owner) is not timm_beit.Beit:
            reasons.setdefault(bias, f"belongs to a {_class_name(type(owner))}, which may read the dense bias")
        together = [name for name in found if name.startswith(f"{prefix}." if prefix else "")]
        culprit = next((name for name in together if name in reasons), None)
        if culprit is not None:
            for name in together:
                reasons.setdefault(name, f"shares a bias with {culprit}, which {reasons[culprit]}")
    return reasons


def _obstacle(module: nn.Module) -> str:
    """What this module does unlike its class in timm, so that it cannot be replaced."""
    if type(module) in _ORIGINALS:
        return ""
    if type(module) not in _REPLACEMENTS:
        return f"is a {_class_name(type(module))}, which may compute something else"
    if isinstance(module, timm_beit.RelativePositionBias):
        return "" if runs_as_written(module) else "has hooks or a forward of its own, which expect a dense bias"
    if "forward" in vars(module):
        return "has a forward of its own"
    drop = module.attn_drop
    if type(drop) is not nn.Dropout or drop.p >= 1:
        return f"has {drop} as attn_drop; accepted: Dropout with p below 1"
    return "" if runs_as_written(drop) else "has hooks or a forward of its own on attn_drop, which would not be called"


def _places(modules: Iterable[nn.Module]) -> Iterator[tuple[str | None, torch.device, torch.dtype, int]]:
    """Implementation, device, dtype and head dimension of each accelerated attention."""
    for module in modules:
        if isinstance(module, FusedAttention):
            weight = next(module.parameters())
            yield module.attn_implementation, weight.device, weight.dtype, round(module.scale**-2)


def _class_name(cls: type[nn.Module]) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
