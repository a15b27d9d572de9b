"""The jobs of `beit-fast tune`: shapes of models, and the calls that each kernel is measured with."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..position_bias import Window
from . import candidates, linear_case, residual_case
from .attention_case import Case, attention_case, oracle_by_sample
from .reference import error_budgets
from .tune import Job, Trial

ATTENTION_KERNELS = ("forward", "backward_dkv", "backward_dq", "backward_dbias")
GRADIENTS = ("dq", "dk", "dv", "dtable")
WANTED = {
    "backward_dkv": (False, True, True, False),
    "backward_dq": (True, False, False, False),
    "backward_dbias": (False, False, False, True),
    "backward": (True, True, True, True),
}
"""Gradients of q, k, v and table that each backward kernel computes, and all of them together."""


@dataclass(frozen=True)
class Shape:
    """One model at one image size, batch and dtype.

    Attributes:
        window: Patches `(height, width)`.
        batch: Images.
        dtype: dtype of the activations.
        heads: Attention heads.
        head_dim: Numbers of a head.
        hidden: Numbers of a token.
        intermediate: Outputs of the first linear layer of an MLP.
        biased: Whether attention has a relative position bias.
    """

    window: Window
    batch: int
    dtype: torch.dtype
    heads: int = 12
    head_dim: int = 64
    hidden: int = 768
    intermediate: int = 3072
    biased: bool = True

    @property
    def tokens(self) -> int:
        return self.window[0] * self.window[1] + 1

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.batch}x{self.tokens}, {self.heads} heads of {self.head_dim}, {dtype}"


def jobs_of(shapes: Sequence[Shape], device: torch.device) -> list[Job]:
    """List the jobs of all shapes; shapes that differ in nothing that a kernel sees share a job."""
    jobs = [
        job
        for shape in shapes
        for job in (*_attention_jobs(shape, device), *_residual_norm_jobs(shape, device), _linear_job(shape, device))
    ]
    return list({(job.kernel, job.variant, job.amount): job for job in jobs}.values())


def _attention_jobs(shape: Shape, device: torch.device) -> list[Job]:
    from ..kernels.attention import inputs as launch_inputs
    from ..kernels.common import gpu
    from ..kernels.common.device import dot_precision

    # One head of one sample is enough to ask the launcher for names and tables.
    case = _draw(replace(shape, batch=1, heads=1), device)
    prepared = launch_inputs.prepare(
        case.query, case.key, case.value, case.table, None, case.window, case.scale, 0.0, 0
    )
    variant, _ = launch_inputs.tuned_shape(prepared)
    arithmetic = gpu.arithmetic(shape.dtype.itemsize, dot_precision(case.query))
    jobs = []
    for kernel in ATTENTION_KERNELS if shape.biased else ATTENTION_KERNELS[:3]:
        tiles = candidates.attention_tiles(kernel, arithmetic, launch_inputs.shipped_tile(kernel, prepared))
        trial = functools.partial(attention_trial, kernel, shape, device)
        # With few programs the keys are split; a mask is another form of the kernel.
        others = [functools.partial(attention_trial, kernel, replace(shape, batch=1), device)]
        others.append(functools.partial(attention_trial, kernel, replace(shape, batch=2), device, masked=True))
        jobs.append(Job(kernel, str(shape), variant, shape.batch * shape.heads, tiles, trial, others))
    return jobs


def _draw(shape: Shape, device: torch.device, **options: Any) -> Case:
    return attention_case(
        shape.window,
        shape.dtype,
        batch=shape.batch,
        heads=shape.heads,
        head_dim=shape.head_dim,
        biased=shape.biased,
        device=device,
        requires_grad=False,
        **options,
    )


def attention_trial(kernel: str, shape: Shape, device: torch.device, masked: bool = False) -> Trial:
    """Draw an attention call that launches one kernel, with its fp64 reference.

    `kernel` may also be "backward": all kernels of the backward.
    """
    case = _draw(shape, device, masked=masked)
    names = ("out", *GRADIENTS) if shape.biased else ("out", *GRADIENTS[:3])
    exact, eager = (
        dict(zip(names, oracle_by_sample(case, dtype), strict=True)) for dtype in (torch.float64, shape.dtype)
    )
    run, results = _attention_call(kernel, case)
    exact = {name: value for name, value in exact.items() if name in results}
    return Trial(run, exact, error_budgets(exact, eager, ("out",), shape.dtype))


def _attention_call(kernel: str, case: Case) -> tuple[Callable[[], Mapping[str, Tensor]], tuple[str, ...]]:
    """Return a function that launches `kernel`, and its results' names.

    The function also launches the kernels that `kernel` depends on.
    """
    from ..kernels.attention import launch

    tensors = (case.query, case.key, case.value, case.table, case.key_mask)
    numbers = (case.window, case.scale, case.dropout_p, case.seed)
    if kernel == "forward":
        return lambda: {"out": launch.attention_forward(*tensors, *numbers)[0]}, ("out",)
    out, lse = launch.attention_forward(*tensors, *numbers)
    wanted = WANTED[kernel]
    present = GRADIENTS if case.table is not None else GRADIENTS[:3]
    names = tuple(name for name, flag in zip(GRADIENTS, wanted, strict=True) if flag and name in present)

    def run() -> Mapping[str, Tensor]:
        gradients = launch.attention_backward(case.grad_out, *tensors, out, lse, *numbers, wanted)
        return {name: value for name, value in zip(GRADIENTS, gradients, strict=True) if name in names}

    return run, names


def _residual_norm_jobs(shape: Shape, device: torch.device) -> list[Job]:
    from ..kernels.residual_norm import configs

    rows = shape.batch * shape.tokens
    shipped = {
        "residual_norm": (configs.forward_warps(shape.hidden),),
        "residual_norm_backward": (configs.backward_warps(shape.hidden), configs.PROGRAMS_PER_SM),
    }
    dtype = str(shape.dtype).removeprefix("torch.")
    return [
        Job(
            kernel,
            f"{rows}x{shape.hidden}, {dtype}",
            f"{dtype}-e{shape.hidden}",
            rows,
            candidates.residual_norm_tiles(kernel, tile),
            functools.partial(residual_norm_trial, kernel, shape, device),
        )
        for kernel, tile in shipped.items()
    ]


def residual_norm_trial(kernel: str, shape: Shape, device: torch.device) -> Trial:
    """Draw one call of residual and LayerNorm, and compute it in fp64."""
    from ..ops.residual_norm import residual_norm

    case = residual_case.residual_case(shape.batch, shape.tokens, shape.hidden, shape.dtype, device)
    exact, eager = residual_case.eager(case.to(torch.float64)), residual_case.eager(case)
    outputs = ("sum", "normalized")
    exact = {name: value for name, value in exact.items() if (name in outputs) == (kernel == "residual_norm")}
    budgets = error_budgets(exact, eager, outputs, shape.dtype)
    leaves = residual_case.leaves_of(case)
    ordered = [leaves[name] for name in ("residual", "branch", "scale", "weight", "bias")]
    residual, branch, scale, weight, bias = ordered

    def forward() -> tuple[Tensor, Tensor]:
        return residual_norm(residual, branch, scale, case.drop_path_scale, weight, bias, residual_case.EPS)

    if kernel == "residual_norm":
        return Trial(lambda: dict(zip(outputs, forward(), strict=True)), exact, budgets)
    results = forward()
    assert case.grad_sum is not None
    assert case.grad_normalized is not None
    incoming = [case.grad_sum.to(results[0].dtype), case.grad_normalized.to(results[1].dtype)]

    def backward() -> Mapping[str, Tensor]:
        gradients = torch.autograd.grad(results, ordered, incoming, retain_graph=True)
        return dict(zip((f"d{name}" for name in residual_case.LEAVES), gradients, strict=True))

    return Trial(backward, exact, budgets)


def _linear_job(shape: Shape, device: torch.device) -> Job:
    from ..kernels.common import gpu
    from ..kernels.common.device import architecture_of, dot_precision
    from ..kernels.linear_gelu import configs

    rows, example = shape.batch * shape.tokens, torch.empty(0, dtype=shape.dtype, device=device)
    precision = dot_precision(example)
    arithmetic = gpu.arithmetic(shape.dtype.itemsize, precision)
    shipped = configs.select(architecture_of(example), arithmetic, rows, shape.intermediate)
    dtype = str(shape.dtype).removeprefix("torch.")
    padded = -(-shape.hidden // 16) * 16
    return Job(
        "linear_gelu",
        f"{rows}x{shape.hidden}x{shape.intermediate}, {dtype}",
        f"{dtype}-{precision}-{padded}x{shape.intermediate}",
        rows,
        candidates.linear_gelu_tiles(arithmetic, shipped),
        functools.partial(linear_gelu_trial, rows, shape, device),
    )


def linear_gelu_trial(rows: int, shape: Shape, device: torch.device) -> Trial:
    """Draw one linear layer with GELU, and compute it in fp64."""
    from ..kernels.linear_gelu import launch

    x, weight, bias = linear_case.make_layer((rows,), shape.hidden, shape.intermediate, shape.dtype, device)
    assert bias is not None
    exact = {"out": linear_case.plain(x.double(), weight.double(), bias.double())}
    eager = {"out": linear_case.plain(x, weight, bias)}
    budgets = error_budgets(exact, eager, ("out",), shape.dtype)
    return Trial(lambda: {"out": launch.linear_gelu(x, weight, bias)}, exact, budgets)
