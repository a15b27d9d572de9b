"""Accelerate the BEiT and Data2VecVision layers of a Transformers model in place.

    from beit_fast.integrations.transformers import accelerate

    model = BeitForImageClassification.from_pretrained(...)
    print(accelerate(model))

Any model that contains such layers is supported, such as UperNet, DPT and ZoeDepth with a BEiT backbone. Transformers
4.57 and 5.x are supported.
"""

from __future__ import annotations

import inspect
from typing import Any

import transformers
from torch import nn

from ...layers.attention import BeitRelativePositionBias, BeitSelfAttention
from ...utils.names import AttentionImplementation
from ..class_swap import ClassSwap, Modules, Place
from ..library_code import held_forwards
from ..report import AccelerationReport
from .fused_layers import (
    BLOCKS,
    CARRIERS,
    FUSED,
    INNER_BIASES,
    ORIGINALS,
    TRUNKS,
    JoinedAttentionMixin,
    SplitAttentionBase,
    hide_dense,
)
from .library_reasons import FromLibraryBias

_OWN = (BeitSelfAttention, BeitRelativePositionBias)


def accelerate(model: nn.Module, attn_implementation: AttentionImplementation | None = None) -> AccelerationReport:
    """Make Transformers' BEiT layers read the bias inside the attention kernel.

    The classes of attention and bias modules are exchanged for subclasses with another forward, in place. So is the
    class of the trunk around them, for one of the same name. Parameters, hooks, names in the `state_dict`, the
    configuration, `isinstance`, `deepcopy`, `pickle` and `save_pretrained` do not change. Outputs and gradients change
    only by rounding. `restore` undoes it.

    A call with `output_attentions=True`, and in 4.57 a call with a head mask, runs Transformers' attention with a dense
    bias. It returns what Transformers returns: weights under `"eager"`, and none under `"sdpa"`.

    Hooks see what they see in Transformers. Each call checks whether there are any. A bias module may have hooks, or an
    attention or layer may have hooks that read a bias among its arguments. While they do, the attention that takes this
    bias is Transformers' own. The same holds for `"eager"` attention of Data2VecVision whose dropout has hooks, and for
    a bias module that was replaced. It also holds while methods, or the attention function, are not those of
    Transformers.

    A padding mask excludes keys under every attention, as Transformers' `"eager"` does. Transformers' `"sdpa"`
    in 5.x adds the mask to the bias as 0 and 1, so that masked keys are attended to. A sample whose keys are all masked
    gives zeros.

    Args:
        model: a module; layers are found at any depth.
        attn_implementation: None for a fused kernel if one supports the device and dtype of a call, else PyTorch's
            attention with a dense bias. `"triton"` for the operator; the call raises an error if no kernel supports it.

    Returns:
        What was replaced, what was left alone and why, and which kernel will run for the present device and dtype. A
        second call replaces nothing and sets `attn_implementation`. A module whose hooks make Transformers' own
        attention run at present is listed with this reason.

    Raises:
        TypeError: If `model` is not a module.
        ValueError: If there are no such layers, or none can be replaced. The model does not change.
    """
    return _SWAP.accelerate(model, attn_implementation)


def restore(model: nn.Module) -> AccelerationReport:
    """Undo `accelerate`: give the layers their Transformers classes again.

    Returns:
        What was restored; nothing if `accelerate` was not called.

    Raises:
        TypeError: If `model` is not a module.
        ValueError: If there are no BEiT layers, or an accelerated module has another class or a forward of its own
            since. The model does not change.
    """
    return _SWAP.restore(model)


class _TransformersSwap(ClassSwap):
    originals = ORIGINALS
    trunks = tuple(TRUNKS)
    trunk_methods = ("forward",)
    blocks = BLOCKS
    bias_names = ("shared_position_bias", "relative_position_bias")
    library = "Transformers'"
    hide = staticmethod(hide_dense)

    @staticmethod
    def takes_handle(block: nn.Module) -> bool:
        inner = block._modules["attention"]
        if isinstance(inner, BLOCKS):
            return _TransformersSwap.takes_handle(inner)
        return isinstance(inner, (JoinedAttentionMixin, SplitAttentionBase))

    def find(self, model: nn.Module, caller: str) -> Modules:
        found = _instances(model, *FUSED, *_OWN)
        if not found:
            wanted = ", ".join(sorted(original.__name__ for original in FUSED))
            present = ", ".join(sorted({type(module).__name__ for module in model.modules()}))
            has_timm = any(type(module).__module__.startswith("timm.") for module in model.modules())
            advice = "\nFor timm's models use beit_fast.integrations.timm." if has_timm else ""
            raise ValueError(
                f"{caller} finds no BEiT layers in {type(model).__name__}.\n"
                f"Expected, in Transformers {transformers.__version__}: {wanted}.\nFound: {present}.{advice}"
            )
        return found

    def unsupported_reasons(self, model: nn.Module, found: Modules) -> dict[str, str]:
        """Return the reasons; one for a module of a trunk holds for the whole trunk."""
        concerned = _instances(model, *FUSED, *CARRIERS)
        own = {name: reason for name, module in concerned.items() if (reason := _unsupported_reason(module))}
        trunks = [f"{name}." if name else "" for name in _instances(model, *TRUNKS)]

        def trunk_of(name: str) -> str:
            return max((trunk for trunk in trunks if f"{name}.".startswith(trunk)), key=len, default="")

        causes = {trunk_of(name): name for name in own}
        reasons = dict(own)
        for name in found:
            cause = causes.get(trunk_of(name))
            if cause is not None:
                reasons.setdefault(name, f"works together with {cause}, which {own[cause]}")
        return reasons

    def library_class(self, module: nn.Module) -> type[nn.Module]:
        return _known_class(module)

    def already_fast(self, module: nn.Module) -> str | None:
        return "part of beit_fast" if isinstance(module, _OWN) else super().already_fast(module)

    def replacement(self, module: nn.Module, found: Modules) -> type[nn.Module]:
        inner = any(getattr(other, "relative_position_bias", None) is module for other in found.values())
        return (INNER_BIASES if inner else FUSED)[type(module)]

    def place(self, module: nn.Module) -> Place | None:
        if not isinstance(module, tuple(ORIGINALS)) or not hasattr(module, "attn_implementation"):
            return None
        attention: Any = module
        weight = next((p for p in attention.parameters() if p.is_floating_point()), None)
        head_dim = attention.head_dim if hasattr(attention, "head_dim") else attention.attention_head_size
        return None if weight is None else (attention.attn_implementation, weight.device, weight.dtype, head_dim)

    def call_reason(self, module: nn.Module) -> str:
        own = ""
        if isinstance(module, (JoinedAttentionMixin, SplitAttentionBase, FromLibraryBias)):
            own = module.library_forward_reason()
        return own or super().call_reason(module)


_SWAP = _TransformersSwap()


def _instances(model: nn.Module, *classes: type[nn.Module]) -> Modules:
    return {name: module for name, module in model.named_modules() if isinstance(module, classes)}


def _unsupported_reason(module: nn.Module) -> str:
    """Return the reason why a module cannot be replaced.

    The reason is a difference from the Transformers class, or an empty string. A module with such a difference cannot
    take a table either.
    """
    known = _known_class(module)
    if isinstance(module, tuple(ORIGINALS)):
        return ""
    if known in FUSED and type(module) is not known:
        return f"is a {type(module).__name__}, a subclass of {known.__name__}"
    if known in CARRIERS and inspect.unwrap(type(module).forward) is not inspect.unwrap(known.forward):
        return f"is a {type(module).__name__}, a subclass of {known.__name__} with a forward of its own"
    if known in FUSED and "forward" in vars(module) and not held_forwards(module):
        return "has a forward of its own"
    return ""


def _known_class(module: nn.Module) -> type[nn.Module]:
    known = (*FUSED, *CARRIERS, *_OWN)
    return next(cls for cls in type(module).__mro__ if cls in known)
