"""Residual, layer scale, drop path and LayerNorm: values, gradients, autocast and errors."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from beit_fast.ops import residual_norm
from beit_fast.ops.residual_norm import residual_add_op, residual_norm_backward_op, residual_norm_op

from ..support.residual_norm import EPS, ResidualCase, check_parity, eager_sum, fused, fused_sum, residual_case

OPTIONAL = ("branch", "scale", "drop_path_scale", "weight", "bias")


def inputs_of(case: ResidualCase, *, trained: bool = False) -> list[Tensor | None]:
    """Return the tensors of an operator call.

    If `trained`, all but `drop_path_scale` require gradients.
    """
    names = ("residual", *OPTIONAL)
    tensors = [getattr(case, name) for name in names]
    return [
        x if x is None or name == "drop_path_scale" else x.detach().clone().requires_grad_(trained)
        for name, x in zip(names, tensors, strict=True)
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("without", [names for n in range(6) for names in itertools.combinations(OPTIONAL, n)])
def test_residual_norm_matches_eager(without: tuple[str, ...], dtype: torch.dtype) -> None:
    case = residual_case(dtype=dtype, without=without)
    check_parity(case)
    if case.branch is not None:
        check_parity(case, fused_sum, eager_sum)


@pytest.mark.parametrize("without", [(), ("scale", "bias"), ("drop_path_scale",), ("branch",), ("weight", "bias")])
def test_residual_norm_gradcheck_passes(without: tuple[str, ...]) -> None:
    case = residual_case(2, 3, 5, torch.float64, without=without)
    inputs = inputs_of(case, trained=True)
    leaves = [x for x in inputs if x is not None and x.requires_grad]

    def run(*given: Tensor) -> tuple[Tensor, ...]:
        values = iter(given)
        arguments = [next(values) if x is not None and x.requires_grad else x for x in inputs]
        total, normalized = residual_norm.residual_norm(*arguments, EPS)
        added = () if case.branch is None else (residual_norm.residual_add(*arguments[:4]),)
        return total.clone(), normalized, *added

    assert torch.autograd.gradcheck(run, leaves)


@pytest.mark.parametrize("without", [(), ("branch",), ("scale", "weight"), ("drop_path_scale", "bias")])
def test_residual_norm_opcheck_passes(without: tuple[str, ...]) -> None:
    case = residual_case(2, 3, 16, without=without)
    leaves = inputs_of(case, trained=True)
    opcheck(residual_norm_op, (*leaves, EPS))
    opcheck(residual_norm_op, (*leaves, EPS, torch.bfloat16))
    if case.branch is not None:
        opcheck(residual_add_op, tuple(leaves[:4]))
    residual, *others = inputs_of(case)
    total, _, mean, rstd = residual_norm_op(residual, *others, EPS)
    total = residual if case.branch is None else total
    mask = [True, *(x is not None for x in (case.branch, case.scale, case.weight, case.bias))]
    for incoming, wanted in (
        ((case.grad_sum, case.grad_normalized), mask),
        ((None, case.grad_normalized), [False] * 5),
        ((case.grad_sum, None), [True, mask[1], False, False, False]),
    ):
        opcheck(residual_norm_backward_op, (*incoming, total, *others, mean, rstd, torch.bfloat16, wanted))


def test_residual_norm_backward_skips_unneeded_gradients() -> None:
    case = residual_case()
    residual, branch, scale, drop_path_scale, weight, bias = inputs_of(case)
    total, normalized = residual_norm.residual_norm(
        residual, branch, scale, drop_path_scale, weight.requires_grad_(), bias, EPS
    )
    (total.sum() + normalized.square().sum()).backward()
    assert weight.grad is not None
    assert all(x.grad is None for x in (residual, branch, scale, bias))
    assert not residual_norm.residual_add(residual, branch, scale, drop_path_scale).requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_residual_norm_autocast_returns_normalized_in_low_precision(dtype: torch.dtype) -> None:
    """The next matmul would round the fp32 LayerNorm to these numbers."""
    case = residual_case().map(lambda x: x.to(dtype), "branch")
    residual, *others = inputs_of(case, trained=True)
    expected_sum, expected = residual_norm.residual_norm(residual, *others, EPS)
    with torch.autocast("cpu", dtype=dtype):
        total, normalized = residual_norm.residual_norm(residual, *others, EPS)
        added = residual_norm.residual_add(residual, *others[:3])
    assert (total.dtype, normalized.dtype, added.dtype) == (torch.float32, dtype, torch.float32)
    assert torch.equal(total, expected_sum)
    assert torch.equal(normalized, expected.to(dtype))
    leaves = [x for x in (residual, *others) if x is not None and x.requires_grad]
    gradients = torch.autograd.grad(normalized.float().square().sum(), leaves)
    assert [gradient.dtype for gradient in gradients] == [leaf.dtype for leaf in leaves]
    with torch.autocast("cpu", dtype=dtype):
        assert residual_norm.residual_norm(residual.double(), eps=EPS)[1].dtype == torch.float64


def test_residual_norm_without_branch_returns_residual() -> None:
    case = residual_case(without=("branch",))
    total, normalized = residual_norm.residual_norm(case.residual, weight=case.weight, bias=case.bias, eps=EPS)
    assert total is case.residual
    expected = torch.nn.functional.layer_norm(case.residual, (40,), case.weight, case.bias, EPS)
    torch.testing.assert_close(normalized, expected)


def test_residual_norm_double_backward_raises() -> None:
    residual, *others = inputs_of(residual_case(), trained=True)
    for out in (
        residual_norm.residual_norm(residual, *others, EPS)[1],
        residual_norm.residual_add(residual, *others[:3]),
    ):
        (gradient,) = torch.autograd.grad(out.pow(2).sum(), others[0], create_graph=True)
        with pytest.raises(RuntimeError, match="no second derivative"):
            gradient.sum().backward()


def test_residual_norm_forward_mode_raises() -> None:
    residual, *others = inputs_of(residual_case())
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(residual, torch.ones_like(residual))
        with pytest.raises(RuntimeError, match="forward-mode"):
            residual_norm.residual_norm(dual, *others, EPS)
        with pytest.raises(RuntimeError, match="forward-mode"):
            residual_norm.residual_add(dual, *others[:3])


def test_residual_norm_inplace_change_before_backward_raises() -> None:
    residual, *others = inputs_of(residual_case(), trained=True)
    total, normalized = residual_norm.residual_norm(residual, *others, EPS)
    with torch.no_grad():
        total.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        normalized.sum().backward()


def test_residual_norm_bad_arguments_raise_every_reason() -> None:
    rows, vector = torch.zeros(2, 3, 8), torch.zeros(8)
    with pytest.raises(ValueError, match="residual_norm cannot serve") as error:
        residual_norm.residual_norm(
            rows, rows[:1], vector[:4], torch.zeros(3), vector.to("meta"), vector.long(), -1.0, torch.int32
        )
    for reason in (
        "residual float32[2, 3, 8] on cpu",
        "branch must have the shape of residual",
        "scale must be [E] = [8]",
        "drop_path_scale must be float32 [B] = [2]",
        "bias must be floating point",
        "all tensors must be on one device",
        "eps is -1.0, not at least 0",
        "dtype is torch.int32, not a floating-point type",
    ):
        assert reason in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ((torch.zeros(2, 3),), "residual must be [B, N, E] with at least one number a token"),
        ((torch.zeros(2, 3, 0),), "at least one number a token"),
        ((torch.zeros(2, 3, 8), None, torch.zeros(8)), "scale and drop_path_scale need a branch"),
        ((torch.zeros(2, 3, 8), None, None, torch.zeros(2)), "scale and drop_path_scale need a branch"),
        ((torch.zeros(2, 3, 8),) * 2 + (None, torch.zeros(2).half()), "drop_path_scale must be float32"),
        ((torch.zeros(2, 3, 8), None, None, None, None, None, float("nan")), "eps is nan"),
    ],
)
def test_residual_norm_bad_arguments_raise_with_reason(arguments: tuple[Tensor | None, ...], reason: str) -> None:
    with pytest.raises(ValueError, match="cannot serve") as error:
        residual_norm.residual_norm(*arguments)
    assert reason in str(error.value)


def test_backward_operators_bad_arguments_raise_every_reason() -> None:
    rows, vector, mean = torch.zeros(2, 3, 8), torch.zeros(8), torch.zeros(2, 3)
    with pytest.raises(ValueError, match="residual_norm_backward cannot serve") as error:
        residual_norm_backward_op(
            None, None, rows, None, vector, None, None, vector, mean[:1], mean, rows.dtype, [True] * 5
        )
    for reason in (
        "grad_sum or grad_normalized must be given",
        "the gradients of weight and bias need grad_normalized",
        "the gradient of weight needs weight",
        "the gradient of scale needs branch",
        "mean must be float32 [B, N]",
    ):
        assert reason in str(error.value)
    with pytest.raises(ValueError, match="the gradient of scale needs scale; the gradient of scale needs branch"):
        torch.ops.beit_fast.residual_add_backward(rows, None, None, None, rows.dtype, [True, True])


def test_residual_norm_meta_tensors_return_shapes() -> None:
    case = residual_case().map(
        lambda x: x.to("meta"), "residual", "branch", "scale", "drop_path_scale", "weight", "bias"
    )
    total, normalized, mean, rstd = residual_norm_op(*inputs_of(case), EPS, torch.float16)
    assert total.shape == normalized.shape == (3, 5, 40)
    assert (total.dtype, normalized.dtype) == (torch.float32, torch.float16)
    assert mean.shape == rstd.shape == (3, 5)
    assert total.device.type == "meta"


def test_residual_norm_compiles_once_for_every_batch() -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def block(
        residual: Tensor, branch: Tensor, scale: Tensor, drop_path_scale: Tensor, weight: Tensor, bias: Tensor
    ) -> Tensor:
        total, normalized = residual_norm.residual_norm(residual, branch, scale, drop_path_scale, weight, bias, EPS)
        return residual_norm.residual_add(total, normalized.sin(), scale, drop_path_scale)

    compiled = torch.compile(block, fullgraph=True, backend=counter)
    for batch in (2, 5, 3):
        inputs = inputs_of(residual_case(batch), trained=True)
        leaves = [x for x in inputs if x is not None and x.requires_grad]
        expected = torch.autograd.grad(block(*inputs).square().sum(), leaves)
        for tensor in (*inputs[:2], inputs[3]):
            torch._dynamo.mark_dynamic(tensor, 0)
        actual = torch.autograd.grad(compiled(*inputs).square().sum(), leaves)
        for gradient, wanted in zip(actual, expected, strict=True):
            torch.testing.assert_close(gradient, wanted)
    assert counter.frame_count == 1


def test_residual_norm_twice_returns_same_bits() -> None:
    case = residual_case(4, 9, 96)
    first, second = fused(case), fused(case)
    assert all(torch.equal(first[name], second[name]) for name in first)
