"""Transformers' BEiT and Data2VecVision, fast: `accelerate(model)` speeds up a model that is already there.

    from beit_fast.integrations.transformers import accelerate

    model = BeitForImageClassification.from_pretrained(...)
    print(accelerate(model))

Any model will do that contains such layers: UperNet, DPT and ZoeDepth have a BEiT backbone. Serves Transformers 4.57
and 5.x.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import transformers
from torch import nn

from ...layers.attention import BeitRelativePositionBias, BeitSelfAttention
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
from .fused_layers import CARRIERS, FUSED, INNER_BIASES, ORIGINALS, TRUNKS

_OWN = (BeitSelfAttention, BeitRelativePositionBias)


def accelerate(model: nn.Module, attn_implementation: str | None = None) -> AccelerationReport:
    """Let the BEiT and Data2VecVision layers of a Transformers model run attention that reads the bias from its table.

    In place: the classes of attention and bias modules are exchanged for subclasses with another forward. Parameters,
    hooks, names in the `state_dict`, configuration, `isinstance`, `deepcopy`, `pickle` and `save_pretrained` stay as
    they were, and so do outputs and gradients but for rounding. `restore` undoes it.

    A call that asks for attention weights (`output_attentions=True`), and in 4.57 one with a head mask, runs
    Transformers' own attention with a dense bias. A padding mask masks keys with every attention of Transformers, as
    its `"eager"` does; its `"sdpa"` in 5.x adds the mask to the bias as 0 and 1, so that masked keys are seen. A sample
    whose keys are all masked gives zeros.

    Args:
        model: any module; layers are found wherever they are in it.
        attn_implementation: None for a fused kernel where one serves the device and dtype at the time of a call, else
            PyTorch's attention with a dense bias; `"triton"` for the operator, and an error at the call where no kernel
            serves.

    Returns:
        What was replaced, what was left alone and why, and which kernel will run where the parameters are now. A second
        call replaces nothing, takes over `attn_implementation`, and says what is so already.

    Raises:
        TypeError: `model` is no module.
        ValueError: there are no such layers, or none could be replaced; the model is as it was.
    """
    check_request("accelerate", model, attn_implementation)
    found = _find(model, "accelerate")
    reasons = _reasons_against(model, found)
    changes = [_change_of(name, module, reasons.get(name, "")) for name, module in found.items()]
    check_some_change(model, changes)
    inner = {id(getattr(module, "relative_position_bias", None)) for module in found.values()}
    for change in changes:
        module = found[change.name]
        if change.change == REPLACED:
            _exchange_class(module, (INNER_BIASES if id(module) in inner else FUSED)[type(module)])
        if hasattr(type(module), "attn_implementation"):
            module.attn_implementation = attn_implementation
    return AccelerationReport(type(model).__name__, tuple(changes), kernel_lines(_places(found.values())))


def restore(model: nn.Module) -> AccelerationReport:
    """Undo `accelerate`: the layers are again what Transformers made them.

    Returns:
        What was restored; nothing where `accelerate` had done nothing.

    Raises:
        TypeError: `model` is no module.
        ValueError: there are no BEiT layers, or something else has changed the class of an accelerated module since;
            the model is as it was.
    """
    check_request("restore", model)
    found = _find(model, "restore")
    changed_since = [
        f"\n  {name} is a {type(module).__name__} now"
        for name, module in found.items()
        if isinstance(module, tuple(ORIGINALS)) and type(module) not in ORIGINALS
    ]
    if changed_since:
        raise ValueError(f"restore cannot undo what was done after accelerate:{''.join(changed_since)}")
    changes = []
    for name, module in found.items():
        if type(module) in ORIGINALS:
            _exchange_class(module, ORIGINALS[type(module)])
            vars(module).pop("attn_implementation", None)
            changes.append(ModuleChange(name, type(module).__name__, RESTORED))
    return AccelerationReport(type(model).__name__, tuple(changes))


def _find(model: nn.Module, caller: str) -> dict[str, Any]:
    """The attention and bias modules by name, or an error that says what was looked for and what is there."""
    found = _instances(model, *FUSED, *_OWN)
    if not found:
        wanted = ", ".join(sorted(original.__name__ for original in FUSED))
        there = ", ".join(sorted({type(module).__name__ for module in model.modules()}))
        timm_too = any(type(module).__module__.startswith("timm.") for module in model.modules())
        advice = "\nFor timm's models there is beit_fast.integrations.timm." if timm_too else ""
        raise ValueError(
            f"{caller} finds no BEiT layers in {type(model).__name__}.\n"
            f"Looked for, in Transformers {transformers.__version__}: {wanted}.\nFound: {there}.{advice}"
        )
    return found


def _instances(model: nn.Module, *classes: type[nn.Module]) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if isinstance(module, classes)}


def _change_of(name: str, module: nn.Module, reason: str) -> ModuleChange:
    kind = _known_class(module).__name__
    if isinstance(module, _OWN):
        return ModuleChange(name, kind, ALREADY, "is beit_fast's own")
    if _is_fast(module):
        return ModuleChange(name, kind, ALREADY)
    return ModuleChange(name, kind, LEFT_ALONE if reason else REPLACED, reason)


def _reasons_against(model: nn.Module, found: Mapping[str, nn.Module]) -> dict[str, str]:
    """Why modules are to be left alone: what is wrong with one of a trunk is a reason for all of it."""
    concerned = _instances(model, *FUSED, *CARRIERS)
    obstacles = {name: reason for name, module in concerned.items() if (reason := _obstacle(module))}
    trunks = [f"{name}." if name else "" for name in _instances(model, *TRUNKS)]

    def trunk_of(name: str) -> str:
        return max((trunk for trunk in trunks if f"{name}.".startswith(trunk)), key=len, default="")

    culprits = {trunk_of(name): name for name in obstacles}
    reasons = dict(obstacles)
    for name in found:
        culprit = culprits.get(trunk_of(name))
        if culprit is not None:
            reasons.setdefault(name, f"works together with {culprit}, which {obstacles[culprit]}")
    return reasons


def _obstacle(module: nn.Module) -> str:
    """What this module does unlike its class in Transformers, so that it can neither be replaced nor take a table."""
    known = _known_class(module)
    if _is_fast(module):
        return ""
    if known in FUSED and type(module) is not known:
        return f"is a {type(module).__name__}, a subclass of {known.__name__}"
    if known in CARRIERS and inspect.unwrap(type(module).forward) is not inspect.unwrap(known.forward):
        return f"is a {type(module).__name__}, a subclass of {known.__name__} with a forward of its own"
    if known in FUSED and "forward" in vars(module) and not _held_forwards(module):
        return "has a forward of its own"
    return ""


def _known_class(module: nn.Module) -> type[nn.Module]:
    """The class of Transformers, or of ours, that this module is an instance of."""
    known = (*FUSED, *CARRIERS, *_OWN)
    return next(cls for cls in type(module).__mro__ if cls in known)


def _is_fast(module: nn.Module) -> bool:
    return isinstance(module, tuple(ORIGINALS))


def _exchange_class(module: nn.Module, cls: type[nn.Module]) -> None:
    held = _held_forwards(module)
    module.__class__ = cls
    for name in held:
        vars(module)[name] = types.MethodType(cls.forward, module)


def _held_forwards(module: nn.Module) -> list[str]:
    """Attributes of the instance that hold its class's forward: the hooks of the library accelerate leave such."""
    return [
        name
        for name in ("forward", "_old_forward")
        if getattr(vars(module).get(name), "__func__", None) is type(module).forward
    ]


def _places(modules: Iterable[Any]) -> Iterator[tuple[str | None, torch.device, torch.dtype, int]]:
    """Implementation, device, dtype and head dimension of each accelerated attention."""
    for module in modules:
        if _is_fast(module) and hasattr(module, "attn_implementation"):
            weight = next((p for p in module.parameters() if p.is_floating_point()), None)
            if weight is not None:
                yield module.attn_implementation, weight.device, weight.dtype, _head_dim(module)


def _head_dim(module: Any) -> int:
    return module.head_dim if hasattr(module, "head_dim") else module.attention_head_size
