"""Strided inputs: results have the same bits as for contiguous inputs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ..support.cases import Case
from .cases import assert_same_bits, assert_same_results, inputs_unchanged, make_case, run_backward, run_forward
from .layouts import SAME_VALUES, SHARED, SHARED_GRADIENT


@pytest.fixture
def case() -> Case:
    return make_case((4, 5), torch.bfloat16, batch=2, heads=3, head_dim=24)


@pytest.mark.parametrize("layout", [name for name in SAME_VALUES if name != "contiguous"])
def test_attention_strided_inputs_same_bits(case: Case, layout: str) -> None:
    strided = case.map_rows(SAME_VALUES[layout])
    assert torch.equal(strided.query, case.query)
    assert strided.query.stride() != case.query.stride() or strided.query.storage_offset() > 0
    with inputs_unchanged(strided):
        assert_same_results(case, strided)


def test_attention_slices_of_packed_projection_same_bits(case: Case) -> None:
    packed = torch.stack([case.query, case.key, case.value], dim=2)  # [B, N, 3, H, D]
    query, key, value = packed.unbind(2)
    assert query.untyped_storage().data_ptr() == value.untyped_storage().data_ptr()
    assert_same_results(case, replace(case, query=query, key=key, value=value))


@pytest.mark.parametrize("layout", SHARED)
def test_attention_stride_zero_inputs_same_bits(case: Case, layout: str) -> None:
    shared = case.map_rows(SHARED[layout])
    assert 0 in shared.query.stride()
    assert_same_results(case.map_rows(lambda tensor: SHARED[layout](tensor).contiguous()), shared)


@pytest.mark.parametrize("layout", SHARED_GRADIENT)
def test_backward_stride_zero_gradient_same_bits(case: Case, layout: str) -> None:
    """Use expanded gradients, as `out.sum().backward()` passes.

    Bugs elsewhere: Dao-AILab/flash-attention#355, pytorch/pytorch#194719.
    """
    shared = SHARED_GRADIENT[layout](case.grad_out)
    assert 0 in shared.stride()
    assert_same_results(replace(case, grad_out=shared.contiguous()), replace(case, grad_out=shared))


def columns_of_a_wider_mask(mask: Tensor) -> Tensor:
    return torch.stack([mask, ~mask], dim=2).flatten(1)[:, ::2]


def one_mask_for_the_batch(mask: Tensor) -> Tensor:
    return mask[:1].expand_as(mask)


def transposed_mask(mask: Tensor) -> Tensor:
    return mask.t().contiguous().t()


@pytest.mark.parametrize("layout", [columns_of_a_wider_mask, one_mask_for_the_batch, transposed_mask])
def test_attention_strided_key_mask_same_bits(case: Case, layout) -> None:
    mask = torch.rand(2, 21, generator=torch.Generator().manual_seed(2)) > 0.4
    strided = layout(mask.to(case.query.device))
    assert not strided.is_contiguous()
    assert_same_results(replace(case, key_mask=strided.contiguous()), replace(case, key_mask=strided))


def transposed_table(table: Tensor) -> Tensor:
    return table.t().contiguous().t()


def columns_of_a_wider_table(table: Tensor) -> Tensor:
    return torch.stack([table, torch.full_like(table, float("nan"))], dim=2).flatten(1)[:, ::2]


def one_column_for_all_heads(table: Tensor) -> Tensor:
    return table[:, :1].expand_as(table)


@pytest.mark.parametrize("layout", [transposed_table, columns_of_a_wider_table, one_column_for_all_heads])
def test_attention_strided_table_same_bits(case: Case, layout) -> None:
    assert case.table is not None
    strided = layout(case.table)
    assert not strided.is_contiguous()
    assert_same_results(replace(case, table=strided.contiguous()), replace(case, table=strided))


def test_backward_strided_out_and_lse_same_bits(case: Case) -> None:
    out, lse = run_forward(case)
    expected = run_backward(case, out, lse)
    strided_out = out.transpose(1, 2).contiguous().transpose(1, 2)
    strided_lse = lse.transpose(1, 2).contiguous().transpose(1, 2)
    assert_same_bits(list(run_backward(case, strided_out, strided_lse)), list(expected))
