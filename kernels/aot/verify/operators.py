"""Operators with N(0, 1) inputs: their launchers, and what they should return."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from ....tuning.attention_case import GRADIENT_NAMES, attention_case, dropout_mask
from ....tuning.attention_case import Case as Inputs
from ....tuning.linear_case import make_layer, plain
from ....tuning.patch_case import convolution, in_precision, make_inputs
from ....tuning.reference import attention_oracle, error_budgets
from ....tuning.residual_case import EPS, LEAVES, ResidualCase, eager, eager_sum, leaves_of, residual_case
from ...attention import configs as attention_configs
from ...attention import launch as attention
from ...linear_gelu import launch as linear_gelu
from ...residual_norm import launch as residual_norm
from ..residual_norm_variants import ABSENT
from . import patch_embed
from .cases import DTYPES, AttentionCase, Case, LinearCase, NormCase, PatchCase
from .loops import num_sms_of
from .patch_table import ABSENT as ABSENT_TOKENS

DROPOUT_P = 0.2
SEED = 2**40 + 12345
PATCH_RESULTS = ("tokens",)

Results = dict[str, Tensor]


class Reference(NamedTuple):
    """What a case should return."""

    exact: Results  # in fp64
    budgets: dict[str, float]  # largest relative errors


class Prepared(NamedTuple):
    """A case with its inputs."""

    num_sms: int
    launch: Callable[[], Results]
    reference: Callable[[], Reference]  # computed once


def prepare(case: Case) -> Prepared:
    """Draw the inputs of a case."""
    if isinstance(case, AttentionCase):
        prepared = _prepare_attention(case)
    elif isinstance(case, PatchCase):
        prepared = _prepare_patch(case)
    else:
        prepared = _prepare_linear(case) if isinstance(case, LinearCase) else _prepare_norm(case)
    return prepared._replace(reference=functools.cache(prepared.reference))


def _reference(exact: Results, rounded: Results, dtype: torch.dtype) -> Reference:
    """Return exact results and the budgets of the operators' tests.

    A budget is a multiple of the error of PyTorch in the same dtypes, which computed `rounded`.
    """
    outputs = [name for name in exact if not name.startswith("d")]
    return Reference(exact, error_budgets(exact, rounded, outputs, dtype))


@contextlib.contextmanager
def as_on_gpu(case: Case) -> Iterator[None]:
    """Choose the case's precision of fp32 products and its bias layout."""
    products = torch.backends.cuda.matmul
    with contextlib.ExitStack() as stack:
        stack.callback(setattr, products, "fp32_precision", products.fp32_precision)
        products.fp32_precision = "tf32" if case.dtype == "tf32" else "ieee"
        if isinstance(case, AttentionCase) and case.layout == "extended" and not _needs_extended(case):
            # Windows that need this layout have so many patches that most cases take one that does not.
            stack.enter_context(mock.patch.object(attention_configs, "LARGEST_PATCH_BYTES", 0))
        yield


def _needs_extended(case: AttentionCase) -> bool:
    largest = attention_configs.LARGEST_PATCH_BYTES
    return attention_configs.packed_patch_bytes(case.window) > largest


def _prepare_attention(case: AttentionCase) -> Prepared:
    inputs = attention_case(
        case.window, DTYPES[case.dtype], batch=case.batch, heads=case.heads, head_dim=case.head_dim,
        biased=case.layout != "none", masked=case.key_mask, dropout_p=DROPOUT_P if case.dropout else 0.0, seed=SEED,
        requires_grad=False,
    )  # fmt: skip
    q, k, v = inputs.query, inputs.key, inputs.value

    def launch() -> Results:
        table, key_mask, window = inputs.table, inputs.key_mask, inputs.window
        numbers = inputs.scale, inputs.dropout_p, inputs.seed
        out, lse = attention.attention_forward(q, k, v, table, key_mask, window, *numbers)
        if not case.backward:
            return {"out": out}
        dq, dk, dv, dtable = (case.gradients in ("all", name) for name in GRADIENT_NAMES)
        gradients = attention.attention_backward(
            inputs.grad_out, q, k, v, table, key_mask, out, lse, window, *numbers, (dq, dk, dv, dtable)
        )
        results = {"out": out} | dict(zip(GRADIENT_NAMES, gradients, strict=True))
        return {name: result for name, result in results.items() if _is_wanted(case, name)}

    def reference() -> Reference:
        keep = dropout_mask(inputs)
        exact, rounded = (_attention_reference(case, inputs, dtype, keep) for dtype in (torch.float64, q.dtype))
        # Rounding fp32 to tf32 keeps 10 bits.
        return _reference(exact, rounded, torch.float16 if case.dtype == "tf32" else q.dtype)

    return Prepared(num_sms_of(case), launch, reference)


def _attention_reference(case: AttentionCase, inputs: Inputs, dtype: torch.dtype, keep: Tensor | None) -> Results:
    backward = case.backward
    q, k, v = (x.detach().to(dtype).requires_grad_(backward) for x in (inputs.query, inputs.key, inputs.value))
    table = inputs.table
    if table is not None:
        table = table.detach().to(torch.promote_types(dtype, torch.float32)).clone().requires_grad_(backward)
    out = attention_oracle(q, k, v, table, inputs.window, inputs.key_mask, inputs.scale, keep, inputs.dropout_p)
    leaves = [q, k, v] if table is None else [q, k, v, table]
    gradients = torch.autograd.grad(out, leaves, inputs.grad_out.to(dtype)) if backward else ()
    results = dict(zip(("out", *GRADIENT_NAMES), (out.detach(), *gradients), strict=False))
    return {name: result for name, result in results.items() if _is_wanted(case, name)}


def _is_wanted(case: AttentionCase, name: str) -> bool:
    """Return whether a result is compared."""
    if name == "dtable" and case.layout == "none":
        return False
    return name == "out" or case.gradients in ("all", name)


def _prepare_linear(case: LinearCase) -> Prepared:
    dtype = DTYPES[case.dtype]
    x, weight, bias = make_layer((case.rows,), case.inputs, case.outputs, dtype, biased=case.bias)

    def reference() -> Reference:
        exact = {"out": plain(x.double(), weight.double(), None if bias is None else bias.double())}
        return _reference(exact, {"out": plain(x, weight, bias)}, torch.float16 if case.dtype == "tf32" else dtype)

    return Prepared(1, lambda: {"out": linear_gelu.linear_gelu(x, weight, bias)}, reference)


def _prepare_patch(case: PatchCase) -> Prepared:
    dtype = DTYPES[case.dtype]
    inputs = make_inputs(
        case.image, case.patch, batch=case.batch, embed=case.columns, pixel_dtype=DTYPES.get(case.pixels, torch.uint8),
        dtype=dtype, token_dtype=DTYPES[case.tokens], layout=case.layout, absent=ABSENT_TOKENS[case.form],
    )  # fmt: skip

    def reference() -> Reference:
        exact = convolution(**in_precision(inputs, torch.float64))
        eager = convolution(**inputs) if case.dtype != "tf32" else _convolution_in_tf32(**inputs)
        return _reference(dict.fromkeys(PATCH_RESULTS, exact), dict.fromkeys(PATCH_RESULTS, eager), dtype)

    def launch() -> Results:
        return dict.fromkeys(PATCH_RESULTS, patch_embed.launch(inputs, case.tile, allow_tf32=case.dtype == "tf32"))

    return Prepared(1, launch, reference)


def _convolution_in_tf32(pixels: Tensor, weight: Tensor, mean: Any, std: Any, **tokens: Any) -> Tensor:
    """Compute `convolution` of an fp32 weight as tf32 does. Both factors are rounded to 10 bits."""
    pixels = pixels.float()
    if mean is not None:
        pixels = pixels - torch.tensor(mean)[:, None, None]
    if std is not None:
        pixels = pixels / torch.tensor(std)[:, None, None]
    return convolution(pixels.half().float(), weight.half().float(), mean=None, std=None, **tokens)


def _prepare_norm(case: NormCase) -> Prepared:
    dtype, row_dtype = DTYPES[case.dtype], DTYPES[case.row_dtype]
    absent = ABSENT[case.form]
    without: list[str] = [name for name in ("branch", "scale", "drop_path_scale", "weight", "bias") if name in absent]
    if case.form == "sum alone" or case.form == "gradient of the sum alone":
        without += ["weight", "bias", "grad_normalized"]
    inputs = residual_case(case.batch, case.tokens, case.size, row_dtype, without=tuple(dict.fromkeys(without)))
    if inputs.branch is not None:
        inputs = dataclasses.replace(inputs, branch=inputs.branch.to(dtype))

    def reference() -> Reference:
        compute = eager if inputs.grad_normalized is not None else eager_sum
        coarsest = max(dtype, row_dtype, key=lambda one: torch.finfo(one).eps)
        return _reference(compute(inputs.to(torch.float64)), compute(inputs), coarsest)

    return Prepared(case.num_sms, functools.partial(_launch_norm, inputs), reference)


def _launch_norm(inputs: ResidualCase) -> Results:
    """Launch forward and backward as the operators do."""
    residual, branch, is_norm = inputs.residual, inputs.branch, inputs.grad_normalized is not None
    total = None if branch is None else torch.empty_like(residual)
    normalized = torch.empty_like(residual) if is_norm else None
    mean, rstd = (torch.empty(residual.shape[:2]) if is_norm else None for _ in range(2))
    vectors = inputs.scale, inputs.drop_path_scale
    affine = inputs.weight, inputs.bias
    residual_norm.fill_forward(residual, branch, *vectors, *affine, EPS, total, normalized, mean, rstd)
    leaves = leaves_of(inputs)
    gradients = {name: torch.empty_like(leaf.detach()) for name, leaf in leaves.items()}
    rows = inputs.grad_sum, inputs.grad_normalized, residual if total is None else total, branch
    residual_norm.fill_backward(*rows, *vectors, inputs.weight, mean, rstd, [gradients.get(name) for name in LEAVES])
    results = {"sum": residual if total is None else total}
    if normalized is not None:
        results["normalized"] = normalized
    return results | {f"d{name}": gradient for name, gradient in gradients.items()}
