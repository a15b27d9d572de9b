"""Accelerate timm's BEiT in place.

`accelerate` changes the class of some timm modules and nothing else: no parameter, name, hook or setting. Therefore
`features_only`, `set_input_size`, `forward_intermediates`, `reset_classifier`, optimizers and checkpoints keep working.
"""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from ...layers.attention_backends import run_attention
from ...layers.module_hooks import clone_if_hooked, watches_keywords, watches_output
from ...position_bias import Window, gather_bias
from ...utils.names import AttentionImplementation
from ..bias_handle import BiasHandle, acts_as_dense, dense, show_dense
from ..class_swap import ClassSwap, Modules, Place
from ..forward_scope import choose_in_forward
from ..library_code import changed_function, changed_index, changed_sdpa, library_functions
from ..report import AccelerationReport
from ..same_name import original_of
from .conversion import timm_beit

_FORWARD_ARGUMENTS = ("self", "x", "shared_rel_pos_bias")
_ATTENTION_FORWARD = library_functions(timm_beit.Attention, "forward")
_ATTENTION_BIAS = library_functions(timm_beit.Attention, "_get_rel_pos_bias")
_SHARED_FORWARD = library_functions(timm_beit.RelativePositionBias, "forward")


@acts_as_dense
@BiasHandle.register
class SharedTable(NamedTuple):
    """The shared bias as its table, in place of a dense tensor."""

    table: Tensor  # [(2Wh-1)(2Ww-1)+3, H]
    window: Window

    def dense(self) -> Tensor:
        """Return the bias `[H, N, N]`, as timm's module does."""
        return gather_bias(self.table, self.window)

    def to(self, *args: Any, **kwargs: Any) -> SharedTable:
        """Return a handle of the moved table."""
        # Hooks of the package accelerate call `to` where they find one; a tensor's would move the dense bias.
        return SharedTable(self.table.to(*args, **kwargs), self.window)


@acts_as_dense
@BiasHandle.register
class SharedDense(NamedTuple):
    """The shared bias `[H, N, N]`, for hooks."""

    bias: Tensor

    def dense(self) -> Tensor:
        """Return the bias `[H, N, N]`."""
        return self.bias

    def to(self, *args: Any, **kwargs: Any) -> SharedDense:
        """Return a handle of the moved bias."""
        return SharedDense(self.bias.to(*args, **kwargs))


class TableRelativePositionBias(timm_beit.RelativePositionBias):
    """timm's shared bias, which returns its table and gathers nothing.

    If it has hooks, they see timm's dense bias and may replace it. timm's own forward also runs if
    `library_forward_reason` names a reason.
    """

    def library_forward_reason(self) -> str:
        """Return why timm's own forward must run, or an empty string."""
        if watches_output(self):
            return "has hooks, which expect a dense bias"
        return changed_function(_SHARED_FORWARD, timm_beit.RelativePositionBias) or changed_index(self)

    def __call__(self) -> SharedTable | SharedDense:
        bias = super().__call__()
        return bias if isinstance(bias, SharedTable) else SharedDense(bias)

    def forward(self) -> SharedTable | Tensor:
        if self.library_forward_reason():
            return super().forward()
        return SharedTable(clone_if_hooked(self, self.relative_position_bias_table), self.window_size)


class FusedAttention(timm_beit.Attention):
    """timm's attention with `beit_fast.rel_pos_attention`, which reads the bias from its table.

    timm's own forward runs if `library_forward_reason` names a reason, or if the shared bias is dense because its
    module was replaced. It also runs for hooks that read the shared bias. `attn_drop` is not called, as in timm's own
    fused attention: only its probability is read.
    """

    attn_implementation: str | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        args, kwargs = show_dense(self, args, kwargs)
        return super().__call__(*args, **kwargs)

    def forward(self, x: Tensor, shared_rel_pos_bias: SharedTable | SharedDense | Tensor | None = None) -> Tensor:
        takes_no_table = watches_keywords(self) or bool(library_forward_reason(self))
        # not isinstance of Tensor: torch.fx passes a Proxy
        if takes_no_table or not (shared_rel_pos_bias is None or isinstance(shared_rel_pos_bias, SharedTable)):
            return super().forward(x, dense(shared_rel_pos_bias))
        packed = self._project(x).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = packed.unbind(2)  # [B, N, H, D]
        table, window = self._table(shared_rel_pos_bias)
        dropout_p = self.attn_drop.p if self.training else 0.0
        out = fused_attention(q, k, v, table, window, dropout_p, self.attn_implementation)
        return self.proj_drop(self.proj(out.flatten(2)))

    def _project(self, x: Tensor) -> Tensor:
        """`[B, N, 3 * H * D]`, query first."""
        if self.q_bias is None:
            return self.qkv(x)
        bias = torch.cat((self.q_bias, self.k_bias, self.v_bias))
        return self.qkv(x) + bias if self.qkv_bias_separate else F.linear(x, self.qkv.weight, bias)

    def _table(self, shared: SharedTable | None) -> tuple[Tensor | None, Window | None]:
        """Return the sum of the tables and its window.

        The gather is linear, so tables can be added in place of biases.
        """
        own = self.relative_position_bias_table
        if shared is None:
            return own, self.window_size
        return (shared.table if own is None else own + shared.table), shared.window


def fused_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor | None,
    window: Window | None,
    dropout_p: float,
    attn_implementation: str | None,
) -> Tensor:
    """Choose a kernel and run attention; a leaf in graphs of `torch.fx`.

    Args:
        q, k, v: `[B, N, H, D]`.
        table: `[rows, H]` of `window`, or None.
        window: Patches `(height, width)`, or None.
        dropout_p: Dropout probability of the attention weights.
        attn_implementation: `"triton"`, or None.

    Returns:
        `[B, N, H, D]`.

    Raises:
        ValueError: If `"triton"` is requested and no kernel serves.
    """
    backend = choose_in_forward(attn_implementation, q.device, q.dtype, q.shape[-1]).attention
    return run_attention(backend, q, k, v, table, window, None, None, dropout_p)


torch.fx.wrap("fused_attention")


def library_forward_reason(attention: timm_beit.Attention) -> str:
    """Return why timm's own forward must run, or an empty string.

    All of it can change after `accelerate`, so it is checked at each call.
    """
    if not attention.fused_attn:
        return "has fused_attn=False"
    drop: Any = attention._modules["attn_drop"]  # faster than through nn.Module.__getattr__
    if type(drop) is not nn.Dropout or drop.p >= 1:
        return f"has {drop} as attn_drop (expected Dropout with p below 1)"
    changed = changed_function(_ATTENTION_FORWARD, timm_beit.Attention) or changed_sdpa()
    if changed or attention.relative_position_bias_table is None:
        return changed
    return changed_function(_ATTENTION_BIAS, type(attention), attention) or changed_index(attention)


_ORIGINALS: dict[type[nn.Module], type[nn.Module]] = {
    FusedAttention: timm_beit.Attention,
    TableRelativePositionBias: timm_beit.RelativePositionBias,
}
_REPLACEMENTS = {original: replacement for replacement, original in _ORIGINALS.items()}


def accelerate(model: nn.Module, attn_implementation: AttentionImplementation | None = None) -> AccelerationReport:
    """Make timm's BEiT attention read its bias inside the kernel, in place.

        model = timm.create_model("beit_base_patch16_224", pretrained=True)
        print(accelerate(model))

    Outputs and gradients change only by rounding, and no `[H, N, N]` bias is built. Everything that timm does with the
    model works as before, except `torch.jit.script`, which needs `restore` first. `torch.fx` traces the model, with
    `fused_attention` as a leaf.

    Hooks see what they see in timm. Each call checks for them. timm's own attention runs, with a dense bias, while the
    shared bias has hooks or an attention has hooks with `with_kwargs=True`. It also runs while `fused_attn` is False:
    timm then calls `attn_drop`, and hooks on it see the attention weights. The same holds for attention whose shared
    bias was replaced by a dense one, and while methods or a `relative_position_index` are not timm's.

    Args:
        model: a `timm.models.beit.Beit`, or a module that contains one, such as the result of `features_only=True`.
        attn_implementation: None for a fused kernel if one supports the device and dtype of a call, else PyTorch's
            attention with a dense bias. `"triton"` for the operator; the call raises an error if no kernel supports it.

    Returns:
        What was replaced, what was left alone and why, and which kernel will run for the present device and dtype. A
        second call replaces nothing and sets `attn_implementation`. Modules of another class or with a forward of their
        own are left alone, and so are the modules that share a bias with them. A replaced module that runs timm's own
        attention at present is listed with the reason.

    Raises:
        TypeError: If `model` is not a module.
        ValueError: If there is no attention of timm's BEiT, none can be replaced, or timm's attention takes other
            arguments than in timm 1.0.31. The model does not change.
    """
    _check_version()
    return _SWAP.accelerate(model, attn_implementation)


def restore(model: nn.Module) -> AccelerationReport:
    """Undo `accelerate`: give the layers their timm classes again.

    Returns:
        What was restored; nothing if `accelerate` was not called.

    Raises:
        TypeError: If `model` is not a module.
        ValueError: If there is no attention of timm's BEiT, or an accelerated module was given a forward of its own
            since. The model does not change.
    """
    return _SWAP.restore(model)


class _TimmSwap(ClassSwap):
    originals = _ORIGINALS
    trunks = (timm_beit.Beit,)
    trunk_methods = ("forward_features", "forward_intermediates")
    blocks = (timm_beit.Block,)
    bias_names = ("rel_pos_bias",)
    library = "timm's"

    @staticmethod
    def hide(module: nn.Module, name: str, value: Any) -> Any:
        return SharedDense(value) if name == "shared_rel_pos_bias" and isinstance(value, Tensor) else value

    @staticmethod
    def takes_handle(block: nn.Module) -> bool:
        return isinstance(block._modules["attn"], FusedAttention)

    def find(self, model: nn.Module, caller: str) -> Modules:
        known = tuple(_REPLACEMENTS)
        found: Modules = {name: module for name, module in model.named_modules() if isinstance(module, known)}
        if not any(isinstance(module, timm_beit.Attention) for module in found.values()):
            wanted = ", ".join(_class_name(original) for original in _REPLACEMENTS)
            present = ", ".join(sorted({_class_name(type(module)) for module in model.modules()}))
            raise ValueError(
                f"{caller} finds no attention of timm's BEiT in {type(model).__name__}.\n"
                f"Expected: {wanted}.\nFound: {present}."
            )
        return found

    def unsupported_reasons(self, model: nn.Module, found: Modules) -> dict[str, str]:
        """Return the reasons; a shared bias and the attention modules that take it go together."""
        reasons = {name: reason for name, module in found.items() if (reason := _unsupported_reason(module))}
        for bias in [name for name, module in found.items() if isinstance(module, timm_beit.RelativePositionBias)]:
            prefix = bias.rpartition(".")[0]
            owner = model.get_submodule(prefix)
            if original_of(type(owner)) is not timm_beit.Beit:
                reasons.setdefault(bias, f"belongs to a {_class_name(type(owner))}, which may read the dense bias")
            together = [name for name in found if name.startswith(f"{prefix}." if prefix else "")]
            cause = next((name for name in together if name in reasons), None)
            if cause is not None:
                for name in together:
                    reasons.setdefault(name, f"shares a bias with {cause}, which {reasons[cause]}")
        return reasons

    def library_class(self, module: nn.Module) -> type[nn.Module]:
        return next(original for original in _REPLACEMENTS if isinstance(module, original))

    def replacement(self, module: nn.Module, found: Modules) -> type[nn.Module]:
        return _REPLACEMENTS[type(module)]

    def place(self, module: nn.Module) -> Place | None:
        if not isinstance(module, FusedAttention):
            return None
        weight = next(module.parameters())
        return module.attn_implementation, weight.device, weight.dtype, round(module.scale**-2)

    def call_reason(self, module: nn.Module) -> str:
        if isinstance(module, TableRelativePositionBias):
            return module.library_forward_reason()
        own = library_forward_reason(module) if isinstance(module, FusedAttention) else ""
        return own or super().call_reason(module)

    def restore_error(self, module: nn.Module) -> str:
        held = type(module) in _ORIGINALS and "forward" in vars(module)
        return "has a forward of its own" if held else super().restore_error(module)


_SWAP = _TimmSwap()


def _check_version() -> None:
    arguments = tuple(inspect.signature(timm_beit.Attention.forward).parameters)
    if arguments != _FORWARD_ARGUMENTS:
        import timm

        raise ValueError(
            f"the attention of BEiT in timm {timm.__version__} takes ({', '.join(arguments[1:])}); expected "
            f"({', '.join(_FORWARD_ARGUMENTS[1:])}), as in timm 1.0.31"
        )


def _unsupported_reason(module: nn.Module) -> str:
    """Return the reason why a module cannot be replaced.

    The reason is a difference from the timm class, or an empty string.
    """
    if type(module) in _ORIGINALS:
        return ""
    if type(module) not in _REPLACEMENTS:
        return f"is a {_class_name(type(module))}, which may compute something else"
    return "has a forward of its own" if "forward" in vars(module) else ""


def _class_name(cls: type[nn.Module]) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
