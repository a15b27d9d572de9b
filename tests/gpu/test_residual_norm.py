"""Residual, layer scale, drop path and LayerNorm on CUDA: sizes, autocast, `torch.compile`, opcheck.

tests/kernels has the small cases, which also run on CUDA if there is a GPU.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from beit_fast.ops import residual_norm

from ..support.oracle import relative_error
from ..support.residual_norm import (
    EPS,
    ResidualCase,
    check_parity,
    eager_sum,
    fused,
    fused_sum,
    leaves_of,
    residual_case,
)
from .calls import need_free_memory

ORDER = ("residual", "branch", "scale", "weight", "bias")


def make_case(*shape: int, dtype: torch.dtype = torch.bfloat16) -> ResidualCase:
    return residual_case(*shape, dtype=dtype, device="cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(64, 197, 768), (8, 1601, 1024), (1, 197, 768), (3, 577, 1000)])
def test_residual_norm_model_sizes_match_fp64(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    case = make_case(*shape, dtype=dtype)
    check_parity(case)
    check_parity(case, fused_sum, eager_sum)


def test_residual_norm_results_above_2_31_elements() -> None:
    """Expand one sample to a batch: every result must be the same.

    Bug elsewhere: fla-org/flash-linear-attention#1080.
    """
    batch, tokens, size = 2**31 // (1024 * 1024) + 2, 1024, 1024
    need_free_memory(12 * batch * tokens * size)
    case = make_case(1, tokens, size)
    many = case.map(lambda x: x.expand(batch, *x.shape[1:]), "residual", "branch", "grad_sum", "grad_normalized")
    many = many.map(lambda x: x.expand(batch).contiguous(), "drop_path_scale")
    expected, actual = fused(case), fused(many)
    assert actual["sum"].numel() > 2**31
    for name in ("sum", "normalized", "dresidual", "dbranch"):
        parts = actual[name].split(64)
        assert all(torch.equal(part, expected[name].expand_as(part)) for part in parts), name
    for name in ("dscale", "dweight", "dbias"):
        assert relative_error(actual[name], batch * expected[name].double()) < 2**-6, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_residual_norm_autocast_dtypes(dtype: torch.dtype) -> None:
    case = make_case(4, 197, 768, dtype=torch.float32).map(lambda x: x.to(dtype), "branch")
    with torch.autocast("cuda", dtype=dtype):
        results = fused(case)
    assert results["normalized"].dtype == dtype
    assert results["sum"].dtype == torch.float32
    expected = fused(case)["normalized"].to(dtype)
    torch.testing.assert_close(results["normalized"], expected, rtol=torch.finfo(dtype).eps, atol=1e-5)


def test_residual_norm_compile_fullgraph_with_dynamic_batch() -> None:
    torch.compiler.reset()

    def block(case: ResidualCase, leaves: dict[str, Tensor]) -> Tensor:
        residual, branch, scale, weight, bias = (leaves[name] for name in ORDER)
        total, normalized = residual_norm.residual_norm(
            residual, branch, scale, case.drop_path_scale, weight, bias, EPS
        )
        return residual_norm.residual_add(total, normalized.sin(), scale, case.drop_path_scale)

    compiled, stance = torch.compile(block, fullgraph=True), "default"
    for batch in (4, 7, 2):
        case = make_case(batch, 197, 768, dtype=torch.float32)
        leaves = leaves_of(case)
        for tensor in (leaves["residual"], leaves["branch"], case.drop_path_scale):
            torch._dynamo.mark_dynamic(tensor, 0)
        with torch.compiler.set_stance(stance):
            out = compiled(case, leaves)
            gradients = torch.autograd.grad(out, list(leaves.values()), case.grad_sum)
        expected = block(case, leaves)
        torch.testing.assert_close(out, expected)
        for gradient, wanted in zip(
            gradients, torch.autograd.grad(expected, list(leaves.values()), case.grad_sum), strict=True
        ):
            torch.testing.assert_close(gradient, wanted)
        stance = "fail_on_recompile"


def test_residual_norm_opcheck_passes() -> None:
    case = make_case(2, 3, 64)
    leaves = leaves_of(case)
    residual, branch, scale, weight, bias = (leaves[name] for name in ORDER)
    opcheck(residual_norm.residual_norm_op, (residual, branch, scale, case.drop_path_scale, weight, bias, EPS))
    opcheck(residual_norm.residual_add_op, (residual, branch, scale, case.drop_path_scale))


@pytest.mark.parametrize("value", [3.0, 0.1, 60000.1])
@pytest.mark.parametrize("size", [768, 1000, 1024])
def test_residual_norm_constant_rows_return_bias(size: int, value: float) -> None:
    """The division by the size must be exact, since eps is 1e-12.

    Bug elsewhere: pytorch/pytorch#41527.
    """
    case = residual_case(2, 5, size, torch.float32, "cuda", without=("branch",))
    case.residual = torch.full_like(case.residual, value)
    assert case.bias is not None
    assert torch.equal(fused(case)["normalized"], case.bias.expand(2, 5, -1))
