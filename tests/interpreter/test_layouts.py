"""Strides and layouts of the inputs change nothing: results equal those of contiguous inputs, bit for bit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl

from beit_fast.kernels.attention import launch
from beit_fast.kernels.attention.primitives import row_offsets

from .cases import Case, bitwise_equal, make_case, run_backward, run_forward


def assert_same_results(left: Case, right: Case) -> None:
    out_left, lse_left = run_forward(left)
    out_right, lse_right = run_forward(right)
    assert bitwise_equal(out_left, out_right)
    assert bitwise_equal(lse_left, lse_right)
    gradients_left = run_backward(left, out_left, lse_left)
    gradients_right = run_backward(right, out_right, lse_right)
    for left_gradient, right_gradient in zip(gradients_left, gradients_right, strict=True):
        assert bitwise_equal(left_gradient, right_gradient)
        assert right_gradient.is_contiguous()


@pytest.fixture
def case() -> Case:
    return make_case((4, 5), torch.bfloat16, batch=2, heads=3, head_dim=24)


def test_slices_of_a_packed_projection(case: Case) -> None:
    packed = torch.stack([case.query, case.key, case.value], dim=2)  # [B, N, 3, H, D]
    query, key, value = packed.unbind(2)
    assert not query.is_contiguous()
    assert_same_results(case, replace(case, query=query, key=key, value=value))


def test_heads_before_tokens(case: Case) -> None:
    swapped = {
        name: getattr(case, name).transpose(1, 2).contiguous().transpose(1, 2)
        for name in ("query", "key", "value", "grad_out")
    }
    assert_same_results(case, replace(case, **swapped))


def test_last_dimension_without_unit_stride(case: Case) -> None:
    swapped = {
        name: getattr(case, name).transpose(2, 3).contiguous().transpose(2, 3)
        for name in ("query", "key", "value", "grad_out")
    }
    assert swapped["query"].stride(-1) != 1
    assert_same_results(case, replace(case, **swapped))


def test_rows_that_start_at_odd_addresses(case: Case) -> None:
    padded = torch.nn.functional.pad(case.query, (3, 2))[..., 3:-2]
    assert_same_results(case, replace(case, query=padded))


def test_queries_shared_by_the_batch(case: Case) -> None:
    shared = case.query[:1].expand_as(case.query)
    assert shared.stride(0) == 0
    assert_same_results(replace(case, query=shared.contiguous()), replace(case, query=shared))


def test_gradient_of_a_sum_has_stride_zero(case: Case) -> None:
    """`out.sum().backward()`: Dao-AILab/flash-attention#355 and pytorch/pytorch#194719."""
    ones = torch.ones((), dtype=case.query.dtype).expand(case.query.shape)
    assert ones.stride() == (0, 0, 0, 0)
    assert_same_results(replace(case, grad_out=ones.contiguous()), replace(case, grad_out=ones))


def test_gradient_that_the_batch_shares(case: Case) -> None:
    shared = case.grad_out[:1].expand_as(case.grad_out)
    assert_same_results(replace(case, grad_out=shared.contiguous()), replace(case, grad_out=shared))


@pytest.mark.parametrize("layout", ["columns of a wider mask", "one mask for the batch", "transposed"])
def test_key_mask_layouts(case: Case, layout: str) -> None:
    mask = torch.rand(2, 21, generator=torch.Generator().manual_seed(2)) > 0.4
    if layout == "columns of a wider mask":
        strided = mask.repeat_interleave(2, dim=1)[:, ::2]
    elif layout == "one mask for the batch":
        strided = mask[:1].expand(2, 21)
    else:
        strided = mask.t().contiguous().t()
    assert not strided.is_contiguous()
    assert_same_results(replace(case, key_mask=strided.contiguous()), replace(case, key_mask=strided))


def test_table_layouts(case: Case) -> None:
    assert case.table is not None
    transposed = case.table.t().contiguous().t()
    assert_same_results(case, replace(case, table=transposed))
    wider = torch.cat([case.table, case.table], dim=1)[:, :3]
    assert_same_results(case, replace(case, table=wider))


def test_log_sum_exp_and_out_may_be_strided(case: Case) -> None:
    out, lse = run_forward(case)
    expected = run_backward(case, out, lse)
    strided_out = out.transpose(1, 2).contiguous().transpose(1, 2)
    strided_lse = lse.transpose(1, 2).contiguous().transpose(1, 2)
    for actual, wanted in zip(run_backward(case, strided_out, strided_lse), expected, strict=True):
        assert bitwise_equal(actual, wanted)


@pytest.mark.parametrize("dimension", [0, 2])
def test_singleton_stride_beyond_32_bits(dimension: int) -> None:
    """A dimension of size 1 may have any stride: fla-org/flash-linear-attention#1080."""
    case = make_case((3, 4), torch.float32, batch=1, heads=1)
    far = {}
    for name in ("query", "key", "value", "grad_out"):
        tensor = getattr(case, name)
        strides = list(tensor.stride())
        strides[dimension] = 2**33 + 8
        far[name] = tensor.as_strided(tensor.shape, strides)
    assert_same_results(case, replace(case, **far))


@triton.jit
def row_offsets_kernel(result, batch_index, head_index, first_token, strides, BLOCK: tl.constexpr):
    tokens = first_token + tl.arange(0, BLOCK)
    offsets = row_offsets(tl.cast(batch_index, tl.int64), tl.cast(head_index, tl.int64), tokens, strides)
    tl.store(result + tl.arange(0, BLOCK), offsets)


@pytest.mark.parametrize(
    ("batch", "head", "token", "strides"),
    [
        (3, 0, 0, (2**30, 768, 64)),
        (40_000, 11, 196, (197 * 2304, 2304, 64)),
        (0, 0, 5000, (2**31 - 1, 2**20, 64)),
        (0, 7, 0, (8, 8, 2**29)),
        (2, 1, 3, (2**40, 2**35, 2**33)),
    ],
)
def test_row_offsets_do_not_wrap_at_32_bits(batch: int, head: int, token: int, strides: tuple[int, int, int]) -> None:
    """fla-org/flash-linear-attention#1080, linkedin/Liger-Kernel#1335: the arithmetic, without the memory."""
    result = torch.zeros(16, dtype=torch.int64)
    row_offsets_kernel[(1,)](result, batch, head, token, strides, BLOCK=16)
    expected = [batch * strides[0] + (token + i) * strides[1] + head * strides[2] for i in range(16)]
    assert max(expected) > 2**31
    assert result.tolist() == expected


class GridRecorder:
    """Stands in for a kernel and remembers the grids it was launched with."""

    def __init__(self) -> None:
        self.grids: list[tuple[int, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]):
        self.grids.append(grid)
        return lambda *arguments, **named: None


def test_more_than_65535_planes_stay_in_the_first_grid_dimension(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA limits y and z to 65535: fla-org/flash-linear-attention#172, flashinfer-ai/flashinfer#3125."""
    recorder = GridRecorder()
    for module in (launch.forward, launch.backward):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, recorder)
    planes = 70_000
    case = make_case((1, 1), torch.float16, batch=planes // 2, heads=2, head_dim=8)
    out, lse = run_forward(case)
    run_backward(case, out, lse)
    assert len(recorder.grids) == 9  # the table is expanded twice
    assert all(len(grid) == 1 for grid in recorder.grids)
    assert sum(grid[0] == planes for grid in recorder.grids) == 4  # forward, delta, dK/dV, dQ
