"""One call of each operator with its reference, for the self-test."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.attention import rel_pos_attention
from ..ops.linear_gelu import linear_gelu
from ..ops.patch_embed import patch_embed
from ..position_bias import Window, gather_bias, relative_position_index
from . import linear_case, patch_case, residual_case
from .attention_case import GRADIENT_NAMES, Case, attention_case, oracle_by_sample
from .timer import Step

Results = dict[str, Tensor]


@dataclass(frozen=True)
class Problem:
    """One call of an operator.

    Attributes:
        run: Calls the operator; outputs and gradients by name.
        reference: Computes the same by eager operations in a dtype.
        outputs: Names of results that are not gradients.
        timed: Pairs of steps to time, by name: the operator and what it is compared with.
        baseline: What the operator is compared with.
    """

    run: Callable[[], Results]
    reference: Callable[[torch.dtype], Results]
    outputs: tuple[str, ...]
    timed: Mapping[str, tuple[Step, Step]] = field(default_factory=dict)
    baseline: str = "PyTorch"


def attention_problem(window: Window, dtype: torch.dtype, device: torch.device, **options: Any) -> Problem:
    """Draw a call of `rel_pos_attention`; `options` are those of `attention_case`."""
    case = attention_case(window, dtype, device=device, **options)
    leaves = case.leaves()
    names = GRADIENT_NAMES[: len(leaves)]

    def forward() -> Tensor:
        options: dict[str, Any] = {"key_mask": case.key_mask, "dropout_p": case.dropout_p, "seed": case.seed}
        return rel_pos_attention(case.query, case.key, case.value, case.table, case.window, **options)

    def run() -> Results:
        out = forward()
        gradients = torch.autograd.grad(out, leaves, case.grad_out)
        return {"out": out.detach(), **dict(zip(names, gradients, strict=True))}

    def reference(dtype: torch.dtype) -> Results:
        return dict(zip(("out", *names), oracle_by_sample(case, dtype), strict=True))

    return Problem(run, reference, ("out",), _attention_steps(case, forward), "SDPA with the dense bias")


def _attention_steps(case: Case, forward: Callable[[], Tensor]) -> dict[str, tuple[Step, Step]]:
    """Return the forward and the training step, each with SDPA's; none where SDPA computes something else."""
    if case.key_mask is not None or case.dropout_p > 0:
        return {}
    tokens = case.query.shape[1]
    dense = index = None
    if case.table is not None:
        index = relative_position_index(case.window, case.query.device)
        dense = gather_bias(case.table.detach().to(case.query.dtype), case.window, index)[None]
        # Rows of a multiple of 8 elements; memory-efficient SDPA pads them in each call otherwise.
        dense = F.pad(dense, (0, -tokens % 8))[..., :tokens]

    def sdpa(bias: Tensor | None) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (case.query, case.key, case.value))  # [B, H, N, D]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=case.scale)
        return out.transpose(1, 2).contiguous()

    def sdpa_with_gathered_bias() -> Tensor:
        if case.table is None:
            return sdpa(None)
        return sdpa(gather_bias(case.table.to(case.query.dtype), case.window, index)[None])

    def without_graph(attention: Callable[[], Tensor]) -> Step:
        def step() -> Tensor:
            with torch.no_grad():
                return attention()

        return step

    def training(attention: Callable[[], Tensor]) -> Step:
        return lambda: torch.autograd.grad(attention(), case.leaves(), case.grad_out)

    return {
        "forward": (without_graph(forward), without_graph(lambda: sdpa(dense))),
        "training": (training(forward), training(sdpa_with_gathered_bias)),
    }


def residual_norm_problem(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> Problem:
    """Draw a call of `residual_norm` with layer scale and drop path.

    `shape` is (B, N, E).
    """
    case = residual_case.residual_case(*shape, dtype=dtype, device=device)

    def run() -> Results:
        return residual_case.fused(case)

    def reference(dtype: torch.dtype) -> Results:
        return residual_case.eager(case if dtype == case.residual.dtype else case.to(dtype))

    steps = {"training": (run, lambda: residual_case.eager(case))}
    return Problem(run, reference, ("sum", "normalized"), steps)


def linear_gelu_problem(rows: int, inputs: int, outputs: int, dtype: torch.dtype, device: torch.device) -> Problem:
    """Draw a call of `linear_gelu`."""
    x, weight, bias = linear_case.make_layer((rows,), inputs, outputs, dtype, device)
    assert bias is not None

    def run() -> Results:
        return {"out": linear_gelu(x, weight, bias)}

    def reference(dtype: torch.dtype) -> Results:
        return {"out": linear_case.plain(x.to(dtype), weight.to(dtype), bias.to(dtype))}

    return Problem(run, reference, ("out",), {"forward": (run, lambda: linear_case.plain(x, weight, bias))})


def patch_embed_problem(
    image: int, patch: int, batch: int, embed: int, pixels: torch.dtype, dtype: torch.dtype, device: torch.device
) -> Problem:
    """Draw a call of `patch_embed` on square images.

    It has a CLS token, mask tokens and positions.
    """
    options: dict[str, Any] = {"batch": batch, "embed": embed, "pixel_dtype": pixels, "dtype": dtype, "device": device}
    arguments = patch_case.make_inputs((image, image), (patch, patch), **options)

    def run() -> Results:
        return {"tokens": patch_embed(**arguments)}

    def reference(dtype: torch.dtype) -> Results:
        return {"tokens": patch_case.convolution(**patch_case.in_precision(arguments, dtype))}

    step = {"forward": (run, lambda: patch_case.convolution(**arguments))}
    return Problem(run, reference, ("tokens",), step)
