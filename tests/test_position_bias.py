"""Geometry of the relative position bias against the paper's definition."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from beit_fast.position_bias import (
    gather_bias,
    reduce_bias,
    relative_position_index,
    resize_position_embeddings,
    resize_table,
    table_rows,
    token_count,
)

from .support.oracle import dense_bias, paper_index

windows = st.tuples(st.integers(1, 7), st.integers(1, 7))


@given(windows)
@settings(max_examples=49, deadline=None)
def test_relative_position_index_matches_paper(window):
    assert torch.equal(relative_position_index(window), paper_index(window))


def test_relative_position_index_of_checkpoint_window():
    index = relative_position_index((14, 14))
    assert index.shape == (197, 197)
    assert index[0, 1:].unique().tolist() == [729]
    assert index[1:, 0].unique().tolist() == [730]
    assert index[0, 0].item() == 731
    assert table_rows((14, 14)) == 732
    assert token_count((14, 14)) == 197


@given(windows, st.integers(1, 3))
@settings(max_examples=30, deadline=None)
def test_gather_bias_matches_paper(window, heads):
    table = torch.randn(table_rows(window), heads)
    assert torch.equal(gather_bias(table, window), dense_bias(table, window))


@given(windows, st.integers(1, 3))
@settings(max_examples=30, deadline=None)
def test_reduce_bias_is_adjoint_of_gather_bias(window, heads):
    table = torch.randn(table_rows(window), heads, dtype=torch.float64, requires_grad=True)
    dense = dense_bias(table, window)
    cotangent = torch.randn_like(dense)
    (expected,) = torch.autograd.grad(dense, table, cotangent)
    torch.testing.assert_close(reduce_bias(cotangent, window), expected)


def test_resize_table_keeps_cls_rows_and_constants():
    table = torch.full((table_rows((4, 6)), 2), 3.0)
    table[-3:] = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    resized = resize_table(table, (4, 6), (7, 5))
    assert resized.shape == (table_rows((7, 5)), 2)
    assert torch.equal(resized[-3:], table[-3:])
    torch.testing.assert_close(resized[:-3], torch.full_like(resized[:-3], 3.0))


def test_resize_table_follows_rows_and_columns():
    """The table is constant in each row, to detect swapped axes."""
    window, target = (3, 5), (6, 4)
    rows = torch.arange(5.0)[:, None].expand(5, 9)
    table = torch.cat([rows.reshape(-1, 1), torch.zeros(3, 1)])
    resized = resize_table(table, window, target)[:-3].view(11, 7)
    torch.testing.assert_close(resized, resized[:, :1].expand(11, 7))
    assert (resized[1:, 0] >= resized[:-1, 0]).all()
    assert resized[-1, 0] > resized[0, 0]


def test_resize_table_to_same_window_returns_table():
    table = torch.randn(table_rows((3, 4)), 2)
    assert resize_table(table, (3, 4), (3, 4)) is table


def test_resize_table_is_differentiable():
    table = torch.randn(table_rows((3, 4)), 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: resize_table(t, (3, 4), (5, 2)), table)


@pytest.mark.parametrize("target", [(3, 4), (6, 8), (5, 2)])
def test_resize_position_embeddings_keeps_cls(target):
    embeddings = torch.randn(1, 13, 8)
    resized = resize_position_embeddings(embeddings, (3, 4), target)
    assert resized.shape == (1, target[0] * target[1] + 1, 8)
    assert torch.equal(resized[:, 0], embeddings[:, 0])
