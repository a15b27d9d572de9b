"""Arguments of wrong types: one TypeError that lists all of them, from every public operator."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
import torch

import beit_fast
from beit_fast.ops.linear_gelu import linear_gelu
from beit_fast.ops.residual_norm import residual_add, residual_norm

X = torch.randn(1, 5, 2, 8)
ROWS = torch.randn(2, 3, 8)

WRONG: dict[str, tuple[Callable[[], object], str]] = {
    "attention of numbers": (
        lambda: beit_fast.rel_pos_attention(1, 2, 3, 4, 5),
        "rel_pos_attention cannot serve these arguments: q is 1 (expected a tensor); k is 2 (expected a tensor); "
        "v is 3 (expected a tensor); table is 4 (expected a tensor or None); "
        "window is 5 (expected two integers (height, width))",
    ),
    "attention of arrays": (
        lambda: beit_fast.rel_pos_attention(X.numpy(), X.numpy(), X),
        "rel_pos_attention cannot serve these arguments: q is of type ndarray (expected a tensor); "
        "k is of type ndarray (expected a tensor)",
    ),
    "attention with a table that is a list, without a window": (
        lambda: beit_fast.rel_pos_attention(X, X, X, [1.0]),
        "rel_pos_attention cannot serve these arguments: table is [1.0] (expected a tensor or None)",
    ),
    "attention with names for numbers": (
        lambda: beit_fast.rel_pos_attention(X, X, X, scale="one", seed=None),
        "rel_pos_attention cannot serve these arguments: scale is 'one' (expected a number); "
        "seed is None (expected an integer)",
    ),
    "patch embedding": (
        lambda: beit_fast.patch_embed(torch.ones(1, 3, 8, 8).numpy(), torch.ones(4, 3, 4, 4), mean="mean"),
        "patch_embed cannot serve these arguments: pixels is of type ndarray (expected a tensor); "
        "mean is 'mean' (expected numbers or None)",
    ),
    "linear and GELU": (
        lambda: linear_gelu(ROWS.numpy(), None),
        "linear_gelu cannot serve these arguments: x is of type ndarray (expected a tensor); "
        "weight is None (expected a tensor)",
    ),
    "residual and norm": (
        lambda: residual_norm(ROWS, "branch", eps="small", dtype="float32"),
        "residual_norm cannot serve these arguments: branch is 'branch' (expected a tensor or None); "
        "eps is 'small' (expected a number); dtype is 'float32' (expected a torch.dtype or None)",
    ),
    "residual": (
        lambda: residual_add(ROWS, None, scale=2),
        "residual_add cannot serve these arguments: branch is None (expected a tensor); "
        "scale is 2 (expected a tensor or None)",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_operator_wrong_types_raise_one_type_error(case: str) -> None:
    call, message = WRONG[case]
    with pytest.raises(TypeError) as caught:
        call()
    assert str(caught.value) == f"beit_fast::{message}"


@pytest.mark.parametrize("level", ["none", "forward mode", "vmap"])
def test_operator_wrong_types_under_transforms_raise_the_same_error(level: str) -> None:
    def call(q: torch.Tensor) -> torch.Tensor:
        return beit_fast.rel_pos_attention(q, q, 3)

    outer = torch.autograd.forward_ad.dual_level() if level == "forward mode" else contextlib.nullcontext()
    with outer, pytest.raises(TypeError, match=r"these arguments: v is 3 \(expected a tensor\)$"):
        (torch.vmap(call) if level == "vmap" else call)(X[None])


def test_operator_error_of_values_stays_a_value_error() -> None:
    with pytest.raises(ValueError, match="q, k and v must have one shape"):
        beit_fast.rel_pos_attention(X, X[:, :4], X)
    with pytest.raises(ValueError, match="x has 8 inputs, weight takes 7"):
        linear_gelu(ROWS, torch.randn(4, 7))


def test_operator_in_one_compiled_graph_raises_no_error() -> None:
    def step(rows: torch.Tensor) -> torch.Tensor:
        total, normalized = residual_norm(rows, rows)
        return residual_add(linear_gelu(normalized, torch.eye(8)), total)

    compiled = torch.compile(step, fullgraph=True, backend="eager")
    assert torch.equal(compiled(ROWS), step(ROWS))
