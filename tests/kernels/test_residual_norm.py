"""Triton kernels of residual, layer scale, drop path and LayerNorm against fp64."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from beit_fast.kernels.common.device import num_sms_of
from beit_fast.kernels.residual_norm import configs, launch
from beit_fast.ops import residual_norm
from beit_fast.ops.dispatch import availability

from ..support.residual_norm import (
    EPS,
    ROWS,
    ResidualCase,
    check_parity,
    eager_sum,
    fused,
    fused_sum,
    residual_case,
)
from .cases import DTYPES, HALF_DTYPES, assert_same_bits, device, storage_bytes
from .test_far_strides import address_space, new_memory_unfilled  # noqa: F401

DEVICE = device()
OPTIONAL = ("branch", "scale", "drop_path_scale", "weight", "bias")


def make_case(*shape: int, dtype: torch.dtype = torch.float32, without: tuple[str, ...] = ()) -> ResidualCase:
    """Draw a case of shape (B, N, E), by default (3, 5, 40)."""
    return residual_case(*shape, dtype=dtype, device=DEVICE, without=without)


def run(case: ResidualCase) -> list[Tensor]:
    """Return all results of both operators."""
    results = [*fused(case).values()]
    return results if case.branch is None else [*results, *fused_sum(case).values()]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(2, 7, 192), (1, 5, 384), (2, 3, 768), (3, 1, 1024), (2, 3, 1000), (4, 9, 33), (1, 1, 8), (2, 2, 4096)]
)
def test_residual_norm_sizes_match_fp64(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    case = make_case(*shape, dtype=dtype)
    check_parity(case)
    check_parity(case, fused_sum, eager_sum)


def test_residual_norm_size_one_returns_bias() -> None:
    """The deviation is 0, so that only the bias remains."""
    case = make_case(3, 5, 1)
    results = fused(case)
    assert case.bias is not None
    assert torch.equal(results["normalized"], case.bias.expand(3, 5, 1))
    check_parity(case, fused_sum, eager_sum)


@pytest.mark.parametrize("without", [names for n in range(6) for names in itertools.combinations(OPTIONAL, n)])
def test_residual_norm_optional_inputs_match_fp64(without: tuple[str, ...]) -> None:
    case = make_case(without=without)
    check_parity(case)
    if case.branch is not None:
        check_parity(case, fused_sum, eager_sum)


@pytest.mark.parametrize("without", [(), ("scale", "drop_path_scale"), ("weight",)])
@pytest.mark.parametrize("absent", ["grad_sum", "grad_normalized"])
def test_residual_norm_backward_missing_gradient_matches_fp64(absent: str, without: tuple[str, ...]) -> None:
    check_parity(make_case(without=(absent, *without)))


@pytest.mark.parametrize("output_mask", list(itertools.product([False, True], repeat=5)))
def test_residual_norm_backward_returns_only_requested_gradients(output_mask: tuple[bool, ...]) -> None:
    case = make_case(dtype=torch.bfloat16)
    everything, some = (_gradients(case, mask) for mask in ([True] * 5, output_mask))
    for wanted, partial, full in zip(output_mask, some, everything, strict=True):
        assert partial.dtype == full.dtype
        assert torch.equal(partial, full) if wanted else partial.shape == (0,)


def _gradients(case: ResidualCase, output_mask: list[bool] | tuple[bool, ...]) -> tuple[Tensor, ...]:
    inputs = (case.branch, case.scale, case.drop_path_scale, case.weight, case.bias)
    total, _, mean, rstd = residual_norm.residual_norm_op(case.residual, *inputs, EPS)
    return residual_norm.residual_norm_backward_op(
        case.grad_sum, case.grad_normalized, total, *inputs, mean, rstd, total.dtype, list(output_mask)
    )


@pytest.mark.parametrize(("trained", "count"), [(True, 2), (False, 0)])
def test_residual_norm_saves_branch_only_for_scale_gradient(trained: bool, count: int) -> None:
    case = make_case().map(Tensor.requires_grad_, "branch").map(lambda x: x.requires_grad_(trained), "scale")
    saved: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        residual_norm.residual_norm(case.residual, case.branch, case.scale)
        residual_norm.residual_add(case.residual, case.branch, case.scale)
    assert case.branch is not None
    assert saved.count(case.branch.data_ptr()) == count


def test_residual_norm_mean_and_rstd_of_rounded_sum() -> None:
    case = make_case(dtype=torch.bfloat16)
    total, _, mean, rstd = residual_norm.residual_norm_op(
        case.residual, case.branch, case.scale, case.drop_path_scale, None, None, EPS
    )
    variance, expected = torch.var_mean(total.double(), -1, correction=0)
    torch.testing.assert_close(mean.double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(rstd.double(), (variance + EPS).rsqrt(), rtol=1e-6, atol=0)


STRIDED = {
    "slices of wider rows": lambda x: torch.cat([x, x, x], -1)[..., x.shape[-1] : 2 * x.shape[-1]],
    "tokens first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "strided elements": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "one sample, repeated": lambda x: x[:1].expand_as(x),
    "one token, repeated": lambda x: x[:, :1].expand_as(x),
    "one element, repeated": lambda x: x[..., :1].expand_as(x),
    "at an odd address": lambda x: torch.cat([x.flatten()[:3], x.flatten()])[3:].view_as(x),
    "backwards": lambda x: x.flip(1).transpose(0, 1).contiguous().transpose(0, 1),
}


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("layout", STRIDED)
def test_residual_norm_strided_rows_same_bits(layout: str, name: str) -> None:
    """Results equal those of contiguous rows; memory around the rows does not change.

    Bug elsewhere: pytorch/pytorch#194719.
    """
    strided = make_case(3, 5, 48, dtype=torch.bfloat16).map(STRIDED[layout], name)
    before = {key: storage_bytes(x).clone() for key, x in strided.tensors().items()}
    results = run(strided)
    assert_same_bits(results, run(strided.map(Tensor.contiguous, name)))
    assert all(torch.equal(storage_bytes(x), before[key]) for key, x in strided.tensors().items())


def test_residual_norm_strided_vectors_same_bits() -> None:
    case = make_case()
    apart = case.map(lambda x: torch.stack([x, -x], -1)[..., 0], "scale", "weight", "bias")
    assert apart.scale is not None
    assert not apart.scale.is_contiguous()
    assert_same_bits(run(case), run(apart))


def test_residual_norm_backward_stride_zero_gradient_same_bits() -> None:
    case = make_case(without=("grad_sum", "grad_normalized"))
    leaves = [x.requires_grad_() for x in (case.residual, case.branch, case.scale)]
    total, normalized = residual_norm.residual_norm(*leaves, case.drop_path_scale, case.weight, case.bias, EPS)
    actual = torch.autograd.grad(total.sum() + normalized.sum(), leaves)
    ones = replace(case, grad_sum=torch.ones_like(total), grad_normalized=torch.ones_like(total))
    expected = fused(ones)
    assert_same_bits(list(actual), [expected[name] for name in ("dresidual", "dbranch", "dscale")])


@pytest.mark.parametrize("dtype", DTYPES)
def test_residual_norm_two_runs_same_bits(dtype: torch.dtype) -> None:
    case = make_case(3, 11, 200, dtype=dtype)
    assert_same_bits(run(case), run(case))


def test_residual_norm_sample_independent_of_batch() -> None:
    case = make_case(without=("scale", "weight", "bias"))
    together = fused(case)
    alone = fused(case.map(lambda x: x[1:2], *ROWS, "drop_path_scale"))
    assert_same_bits(list(alone.values()), [x[1:2] for x in together.values()])


@pytest.mark.parametrize("poisoned", ROWS)
def test_residual_norm_nan_in_one_sample_stays_in_it(poisoned: str) -> None:
    """Exclude the gradients of scale, weight and bias, which sum over samples."""
    case = make_case()
    dirty = case.map(lambda x: x.index_fill(0, torch.tensor([0], device=DEVICE), float("nan")), poisoned)
    clean_results, dirty_results = fused(case), fused(dirty)
    names = ("sum", "normalized", "dresidual", "dbranch")
    assert_same_bits([dirty_results[name][1:] for name in names], [clean_results[name][1:] for name in names])
    assert dirty_results["dresidual"][0].isnan().all()


@pytest.mark.parametrize("shape", [(0, 5, 40), (3, 0, 40)])
def test_residual_norm_without_rows_returns_empty_and_zeros(shape: tuple[int, int, int]) -> None:
    """Bugs elsewhere: Dao-AILab/flash-attention#1159, pytorch/pytorch#133780."""
    results = fused(make_case(*shape))
    assert all(results[name].shape == shape for name in ("sum", "normalized", "dresidual", "dbranch"))
    for name in ("dscale", "dweight", "dbias"):
        assert torch.equal(results[name], torch.zeros(40, device=DEVICE))
    results = fused_sum(make_case(*shape))
    assert torch.equal(results["dscale"], torch.zeros(40, device=DEVICE))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, -1e-3, 60000.1])
def test_residual_norm_constant_rows_return_bias(value: float, dtype: torch.dtype) -> None:
    """The result is exact and not NaN, although the deviation is 0.

    eps is below the smallest fp16 value: pytorch/pytorch#41527.
    """
    case = make_case(2, 3, 1000, dtype=dtype, without=("branch",))
    case.residual = torch.full_like(case.residual, value)
    results = fused(case)
    assert case.bias is not None
    assert torch.equal(results["normalized"], case.bias.expand_as(case.residual))
    assert all(x.isfinite().all() for name, x in results.items() if name != "dresidual")


@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_residual_norm_squares_above_fp16_match_fp64(dtype: torch.dtype) -> None:
    check_parity(make_case(dtype=dtype, without=("branch",)).map(lambda x: 3000 * x, "residual"))


@pytest.mark.parametrize("dtype", HALF_DTYPES)
@pytest.mark.parametrize("wide", [("residual", "grad_sum"), ("scale", "weight", "bias"), ("branch",)])
def test_residual_norm_mixed_dtypes_are_promoted(wide: tuple[str, ...], dtype: torch.dtype) -> None:
    """Mix dtypes as autocast does; a gradient has the dtype of its input."""
    case = make_case(dtype=dtype).map(Tensor.float, *wide)
    results = check_parity(case, dtype=dtype)
    assert results["sum"].dtype == results["normalized"].dtype
    promoted = torch.float32 if set(wide) & {"residual", "branch", "scale"} else dtype
    assert results["sum"].dtype == promoted
    for name in ("residual", "branch", "scale", "weight", "bias"):
        assert results[f"d{name}"].dtype == getattr(case, name).dtype


def test_residual_norm_normalized_dtype_rounds_only_normalized() -> None:
    case = make_case()
    half, full = fused(case, torch.bfloat16), fused(case)
    assert half["sum"].dtype == torch.float32
    assert half["normalized"].dtype == torch.bfloat16
    assert_same_bits([half["sum"]], [full["sum"]])
    torch.testing.assert_close(half["normalized"].float(), full["normalized"], rtol=2**-7, atol=0)


def far_apart(case: ResidualCase, dimension: int, folder: Path) -> ResidualCase:
    """Copy the case with offsets above 2^31 elements along `dimension`."""
    sizes = case.residual.shape
    strides = [sizes[1] * sizes[2], sizes[2], 1]
    strides[dimension] = 2**31 // (sizes[dimension] - 1) + 8
    elements = sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True)) + 1

    def far(tensor: Tensor) -> Tensor:
        storage = address_space(2**31 + elements, tensor.dtype, folder)[2**31 :]
        return storage.as_strided(sizes, strides).copy_(tensor)

    return case.map(far, "branch", "grad_normalized")


@pytest.mark.usefixtures("new_memory_unfilled")
@pytest.mark.parametrize("dimension", [0, 1])
def test_residual_norm_offsets_above_2_31_elements_same_bits(dimension: int, tmp_path: Path) -> None:
    """Bugs elsewhere: fla-org/flash-linear-attention#1080, linkedin/Liger-Kernel#1335."""
    case = make_case(3, 4, 24, dtype=torch.float16)
    assert_same_bits(run(case), run(far_apart(case, dimension, tmp_path)))


class Grids:
    """Fake kernels that record their grids."""

    arg_names = ()

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.launched: list[tuple[int, ...]] = []
        for module in (launch.forward, launch.backward):
            for name in [name for name in vars(module) if name.endswith("_kernel")]:
                monkeypatch.setattr(module, name, self)

    def __getitem__(self, grid: tuple[int, ...]):
        self.launched.append(grid)
        return lambda *positional, **named: None


def test_residual_norm_many_rows_use_first_grid_dimension(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA limits y and z to 65535: fla-org/flash-linear-attention#172."""
    grids = Grids(monkeypatch)
    _gradients(make_case(700, 100, 1, dtype=torch.float16), [True] * 5)
    share = configs.share_rows(70_000, num_sms_of(torch.empty(0, device=DEVICE)))
    assert grids.launched == [(70_000,), (share.programs,), (1,)]


@pytest.mark.parametrize("num_sms", [0, 1, 132])
def test_share_rows_covers_all_rows(num_sms: int) -> None:
    for row_count in (*range(1, 40), 197, 12608, 2**30):
        programs, rows = configs.share_rows(row_count, num_sms)
        assert rows % configs.BACKWARD_ROWS == 0
        assert (programs - 1) * rows < row_count <= programs * rows < 2**31
        assert programs <= max(configs.PROGRAMS_PER_SM * num_sms, configs.INTERPRETED_PROGRAMS)


def test_availability_limits_equal_kernel_limits() -> None:
    assert availability.LARGEST_ROW_SIZE == configs.LARGEST_SIZE
    assert availability.LARGEST_ROW_COUNT == configs.LARGEST_ROW_COUNT


def test_residual_norm_unsupported_inputs_raise_every_reason() -> None:
    rows = torch.zeros(2, 3, 5000, dtype=torch.float64, device=DEVICE)
    with pytest.raises(ValueError, match="residual_norm cannot serve residual float64") as error:
        residual_norm.residual_norm(rows, rows[:, :2], eps=-1.0)
    for reason in (
        "branch must have the shape of residual",
        "eps is -1.0, not at least 0",
        "expected float16, bfloat16 or float32",
        "rows of 5000 numbers are longer than 4096",
    ):
        assert reason in str(error.value)
    with pytest.raises(ValueError, match=r"residual_add cannot serve .*expected float16"):
        residual_norm.residual_add(rows[..., :8], rows[..., :8])
    many = torch.zeros(1, 1, 1, device=DEVICE).expand(2**20, 2**11, 1)
    with pytest.raises(ValueError, match=f"{2**31} rows are more than {2**30}"):
        residual_norm.residual_add(many, many)


@pytest.mark.parametrize("without", [(), ("branch", "bias"), ("scale", "drop_path_scale", "weight")])
def test_residual_norm_opcheck_passes(without: tuple[str, ...]) -> None:
    case = make_case(2, 3, 16, without=without)
    tensors = (case.branch, case.scale, case.drop_path_scale, case.weight, case.bias)
    leaves = [
        x if x is None or x is case.drop_path_scale else x.clone().requires_grad_() for x in (case.residual, *tensors)
    ]
    opcheck(residual_norm.residual_norm_op, (*leaves, EPS))
    total, _, mean, rstd = residual_norm.residual_norm_op(case.residual, *tensors, EPS)
    total = case.residual if case.branch is None else total
    mask = [True, *(x is not None for x in (case.branch, case.scale, case.weight, case.bias))]
    gradients = (case.grad_sum, case.grad_normalized)
    opcheck(residual_norm.residual_norm_backward_op, (*gradients, total, *tensors, mean, rstd, total.dtype, mask))
    if case.branch is not None:
        opcheck(residual_norm.residual_add_op, tuple(leaves[:4]))
        arguments = (
            case.grad_sum,
            case.branch,
            case.scale,
            case.drop_path_scale,
            total.dtype,
            [True, case.scale is not None],
        )
        opcheck(residual_norm.residual_add_backward_op, arguments)
