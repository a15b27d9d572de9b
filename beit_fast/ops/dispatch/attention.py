"""The one dispatcher of attention: a name chooses a function, and a backend that cannot serve says why.

`"eager"` and `"sdpa"` are the readable references and materialise the bias; `"triton"` is the operator
`beit_fast::rel_pos_attention`. None means `"triton"` where a fused kernel serves the device and dtype, else `"sdpa"`,
as in an export to ONNX, which has no such operator.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ...position_bias import Window, gather_bias
from ..functorch import rel_pos_attention
from . import availability

IMPLEMENTATIONS = ("eager", "sdpa", "triton")


def check_implementation(name: str | None) -> str | None:
    """`name` itself if it is an attention implementation or None, else ValueError."""
    if name is not None and name not in IMPLEMENTATIONS:
        raise ValueError(f"attn_implementation is {name!r}; accepted are {', '.join(map(repr, IMPLEMENTATIONS))}, None")
    return name


def resolve(implementation: str | None, device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """The implementation that will run: None is decided by device and dtype, `"triton"` is checked.

    Raises:
        ValueError: the name is unknown, or `"triton"` was asked for and no kernel serves; lists every kernel's reasons.
    """
    return _plan(implementation, device, dtype, head_dim)[0]


def kernel_name(implementation: str | None, device: torch.device | str, dtype: torch.dtype, head_dim: int) -> str:
    """What runs in the end: `"eager"`, `"sdpa"`, or the kernel behind `"triton"`, such as `"triton/cuda"`."""
    return _plan(implementation, torch.device(device), dtype, head_dim)[1]


def _plan(implementation: str | None, device: torch.device, dtype: torch.dtype, head_dim: int) -> tuple[str, str]:
    """(implementation, kernel) that will run: the same all through a process, exports to ONNX apart."""
    refusals = availability.onnx_refusals()
    if not refusals or implementation in ("eager", "sdpa"):
        return _decide(implementation, device, dtype, head_dim)
    if check_implementation(implementation) is None:
        return "sdpa", "sdpa"
    raise ValueError(
        f"attn_implementation={implementation!r} cannot serve: {'; '.join(refusals)}. "
        "Use 'sdpa' or 'eager', or None, which takes 'sdpa' there."
    )


# What torch.compiler.assume_constant_result sets; calling that imports Dynamo, which takes a second.
_plan._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _decide(implementation: str | None, device: torch.device, dtype: torch.dtype, head_dim: int) -> tuple[str, str]:
    check_implementation(implementation)
    if implementation in ("eager", "sdpa"):
        return implementation, implementation
    kernel = availability.serving_kernel(device, dtype, head_dim)
    if implementation is None and not availability.is_fused(kernel):
        return "sdpa", "sdpa"
    if kernel is None:
        reasons = "".join(
            f"\n  {name}: {'; '.join(availability.kernel_refusals(name, device, dtype, head_dim))}"
            for name in availability.KERNELS
        )
        raise ValueError(
            f"attn_implementation='triton' cannot serve {dtype} with head dimension {head_dim} on {device}:{reasons}\n"
            "Use 'sdpa' or 'eager', or None to choose by device and dtype."
        )
    return "triton", kernel


def describe_kernels(
    device: torch.device | str | None = None, dtype: torch.dtype = torch.float32, head_dim: int = 64
) -> list[tuple[str, bool, tuple[str, ...]]]:
    """Every kernel behind `"triton"` as (name, whether it serves, why not); each on its own device type if None."""

    def place(kernel: str) -> torch.device:
        return torch.device(device or ("cuda" if kernel == "triton/cuda" else "cpu"))

    rows = [
        (kernel, availability.kernel_refusals(kernel, place(kernel), dtype, head_dim))
        for kernel in availability.KERNELS
    ]
    return [(kernel, not reasons, reasons) for kernel, reasons in rows]


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor | None = None,
    window: Window | None = None,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    implementation: str | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Attention by the named implementation; shapes as in `beit_fast.rel_pos_attention`.

    `bias` is the dense `[H, N, N]` of the table where the caller already has it; `"triton"` never reads it. Dropout
    takes its random numbers from torch's CPU generator (`"triton"`) or the device's (`"eager"`, `"sdpa"`).
    """
    resolved = resolve(implementation, q.device, q.dtype, q.shape[-1])
    if resolved == "triton":
        seed = int(torch.randint(2**62, ()).item()) if dropout_p > 0 else 0
        return rel_pos_attention(q, k, v, table, window, key_mask, scale, dropout_p, seed)
    if bias is None and table is not None and window is not None:
        bias = dense_bias(table, window)
    if resolved == "sdpa":
        return _sdpa(q, k, v, bias, key_mask, scale, dropout_p)
    return eager_attention(q, k, v, bias, key_mask, scale, dropout_p)[0]


def dense_bias(table: Tensor, window: Window) -> Tensor:
    """The bias `[H, N, N]` for `"eager"` and `"sdpa"`, at least fp32: its gradient is then summed in fp32 too."""
    return gather_bias(table.to(torch.promote_types(table.dtype, torch.float32)), window)


def eager_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Attention written out, with a dense bias `[H, N, N]`: the output `[B, N, H, D]` and the weights `[B, H, N, N]`.

    Products in the dtype of q, softmax in fp32 (fp64 for fp64 inputs), weights after softmax and dropout.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    query, key, value = (x.transpose(1, 2) for x in (q, k, v))  # [B, H, N, D]
    scores = torch.matmul(query, key.transpose(2, 3)) * scale  # [B, H, N, N]
    if bias is not None:
        scores = scores + bias.to(scores.dtype)
    if key_mask is not None:
        scores = scores.masked_fill(~_non_empty(key_mask)[:, None, None, :], float("-inf"))
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(value.dtype)
    if key_mask is not None:
        weights = weights.masked_fill(~key_mask.any(-1)[:, None, None, None], 0.0)
    weights = F.dropout(weights, dropout_p, training=dropout_p > 0)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


def _sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    key_mask: Tensor | None,
    scale: float | None,
    dropout_p: float,
) -> Tensor:
    query, key, value = (x.transpose(1, 2) for x in (q, k, v))  # [B, H, N, D]
    mask = None if bias is None else bias.to(q.dtype).unsqueeze(0)  # [1, H, N, N]
    if key_mask is not None:
        allowed = _non_empty(key_mask)[:, None, None, :]
        mask = allowed if mask is None else mask.masked_fill(~allowed, float("-inf"))
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout_p, scale=scale)
    if key_mask is not None:
        out = out.masked_fill(~key_mask.any(-1)[:, None, None, None], 0.0)
    out = out.transpose(1, 2)
    if torch.compiler.is_exporting():  # what takes SDPA's place may have other strides, so a copy must be in the graph
        return out.clone(memory_format=torch.contiguous_format)
    return out.contiguous()


def _non_empty(key_mask: Tensor) -> Tensor:
    """The mask, all True for samples that mask every key: their softmax stays finite and their output is zeroed."""
    return key_mask | ~key_mask.any(-1, keepdim=True)


@dataclass(frozen=True)
class AttentionReport:
    """Which attention ran in a model, and why others did not; `str()` is for people.

    Attributes:
        requested: the `attn_implementation` asked for, None if left to device and dtype.
        layers: the kernel that last ran in each layer, None where a layer has not run outside `torch.compile`.
        would_run: the kernel that would run for the parameters' device and dtype.
        refusals: for every kernel behind `"triton"`, why it does not serve there; empty where it does.
    """

    requested: str | None
    layers: tuple[str | None, ...]
    would_run: str
    refusals: dict[str, tuple[str, ...]]

    @property
    def kernel(self) -> str:
        """The kernel that ran, several joined by commas, or the one that would run where none has."""
        ran = sorted({kernel for kernel in self.layers if kernel is not None})
        return ", ".join(ran) if ran else self.would_run

    def __str__(self) -> str:
        count = sum(kernel is not None for kernel in self.layers)
        state = f"ran in {count} of {len(self.layers)} layers" if count else "has not run yet, would run"
        lines = [f"attention: {self.kernel} ({state}; attn_implementation={self.requested!r})"]
        lines += [f"  {name}: {'; '.join(reasons) or 'available'}" for name, reasons in self.refusals.items()]
        return "\n".join(lines)


def report(
    requested: str | None,
    layers: Sequence[str | None],
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
) -> AttentionReport:
    """The report of a model with these parameters' device and dtype."""
    refusals = {name: availability.kernel_refusals(name, device, dtype, head_dim) for name in availability.KERNELS}
    try:
        would_run = kernel_name(requested, device, dtype, head_dim)
    except ValueError:
        would_run = "none"
    return AttentionReport(requested, tuple(layers), would_run, refusals)
