"""The package's kernels, compiled for each architecture and executed on a CPU, against fp64."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton", reason="needs Triton")
if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
    pytest.skip("the Triton interpreter and compiler cannot share a process", allow_module_level=True)

from beit_fast.kernels.aot.compile import CAPABILITIES  # noqa: E402
from beit_fast.kernels.aot.executor.launch import Options  # noqa: E402
from beit_fast.kernels.aot.executor.launchers import on_gpu  # noqa: E402
from beit_fast.kernels.aot.executor.schedule import RANDOM, REVERSED, Schedule  # noqa: E402
from beit_fast.kernels.attention import launch as attention  # noqa: E402
from beit_fast.kernels.common.compiler_hazards import compiler_hazards  # noqa: E402
from beit_fast.kernels.linear_gelu import launch as linear_gelu  # noqa: E402
from beit_fast.kernels.residual_norm import launch as residual_norm  # noqa: E402

from ...support.cases import Case, attention_case, check_results  # noqa: E402
from ...support.oracle import assert_within_budget  # noqa: E402

each_capability = pytest.mark.parametrize(
    "capability",
    # sm_86 and sm_89 have the instructions of sm_80, in other tiles.
    [pytest.param(capability, marks=[pytest.mark.slow] * (capability in (86, 89))) for capability in CAPABILITIES],
)


def run_attention(case: Case, capability: int, options: Options, num_sms: int = 1) -> tuple[list[Tensor], int]:
    """Return out and gradients, and the number of launches with hazards."""
    inputs = (case.query, case.key, case.value, case.table, case.key_mask)
    numbers = (case.window, case.scale, case.dropout_p, case.seed)
    with on_gpu(capability, num_sms, options) as driver:
        out, lse = attention.attention_forward(*inputs, *numbers)
        gradients = attention.attention_backward(case.grad_out, *inputs, out, lse, *numbers, (True,) * 4)
    return [out, *gradients], sum(bool(launch.hazards) for launch in driver.launches)


@each_capability
def test_attention_equals_the_oracle_in_every_order(capability: int) -> None:
    """The tail is ragged, and every loop runs twice or more."""
    case = attention_case((9, 15), torch.bfloat16, batch=1, heads=1, head_dim=32, requires_grad=False)
    results, hazards = run_attention(case, capability, Options(collect=True))
    check_results(case, results[0], results[1:])
    is_refused = bool(compiler_hazards(capability, triton.__version__))
    assert bool(hazards) == is_refused, "the table of faults agrees with the executed code"
    if is_refused:
        return  # only lockstep gives right numbers
    again, hazards = run_attention(case, capability, Options(Schedule(RANDOM, 1), collect=True))
    assert hazards == 0
    assert all(torch.equal(a, b) for a, b in zip(results, again, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 120])
def test_attention_in_reversed_order_has_the_bits_of_lockstep(capability: int) -> None:
    case = attention_case((15, 15), torch.float16, batch=1, heads=2, head_dim=64, requires_grad=False)
    together, _ = run_attention(case, capability, Options())
    apart, _ = run_attention(case, capability, Options(Schedule(REVERSED)))
    check_results(case, apart[0], apart[1:])
    assert all(torch.equal(a, b) for a, b in zip(together, apart, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_masked_attention_with_dropout_and_splits_equals_the_oracle(capability: int) -> None:
    case = attention_case(
        (6, 11), torch.float16, batch=2, heads=1, head_dim=40, masked=True, dropout_p=0.2, seed=2**40 + 5,
        requires_grad=False,
    )  # fmt: skip
    results, _ = run_attention(case, capability, Options(), num_sms=132)
    check_results(case, results[0], results[1:])


def test_fp32_attention_without_a_table_equals_the_oracle() -> None:
    case = attention_case((5, 7), torch.float32, batch=1, heads=1, head_dim=24, biased=False, requires_grad=False)
    results, _ = run_attention(case, 86, Options())
    check_results(case, results[0], results[1:])


@pytest.mark.parametrize("capability", [80, 90])
def test_residual_norm_equals_fp64(capability: int) -> None:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).bfloat16()

    rows = (2, 5, 200)
    residual, branch, grad_total, grad_normalized = (normal(*rows) for _ in range(4))
    scale, weight, bias = (normal(rows[2]) for _ in range(3))
    drop_path_scale = torch.tensor([0.0, 1.25])
    with on_gpu(capability, 2):
        total, normalized = torch.empty(rows, dtype=torch.bfloat16), torch.empty(rows, dtype=torch.bfloat16)
        mean, rstd = torch.empty(rows[:2]), torch.empty(rows[:2])
        gradients = [torch.empty_like(tensor) for tensor in (residual, branch, scale, weight, bias)]
        inputs = (residual, branch, scale, drop_path_scale, weight, bias)
        residual_norm.fill_forward(*inputs, 1e-12, total, normalized, mean, rstd)
        saved = (total, branch, scale, drop_path_scale, weight, mean, rstd)
        residual_norm.fill_backward(grad_total, grad_normalized, *saved, gradients)

    leaves = [tensor.double().requires_grad_() for tensor in (residual, branch, scale, weight, bias)]
    exact = leaves[0] + drop_path_scale.double()[:, None, None] * leaves[2] * leaves[1]
    rounded = exact + (total.double() - exact).detach()  # the kernel normalizes the rounded sum
    expected = torch.nn.functional.layer_norm(rounded, rows[2:], leaves[3], leaves[4], 1e-12)
    grads = torch.autograd.grad((rounded, expected), leaves, (grad_total.double(), grad_normalized.double()))
    for name, got, want in zip(
        ("total", "normalized", "dresidual", "dbranch", "dscale", "dweight", "dbias"),
        (total, normalized, *gradients),
        (exact.detach(), expected.detach(), *grads),
        strict=True,
    ):
        assert_within_budget(name, got, want, want.bfloat16(), 2)


@each_capability
def test_linear_gelu_equals_fp64(capability: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(shape, generator=generator).bfloat16() for shape in ((70, 96), (80, 96), (80,)))
    # A hazard of a refused pair is counted, any other is raised.
    is_refused = bool(compiler_hazards(capability, triton.__version__))
    with on_gpu(capability, 1, Options(collect=is_refused)):
        out = linear_gelu.linear_gelu(x, weight, bias)

    def reference(dtype: torch.dtype) -> Tensor:
        product = torch.nn.functional.linear(x.to(dtype), weight.to(dtype), bias.to(dtype))
        return torch.nn.functional.gelu(product)

    assert_within_budget("out", out, reference(torch.float64), reference(torch.bfloat16), 2)
