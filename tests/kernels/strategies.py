"""Hypothesis strategies for attention cases.

They combine all options of the operator, at sizes that are fast in the interpreter.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from hypothesis import strategies as st
from torch import Tensor

from ..support.cases import Case
from .cases import DTYPES, OutputMask, make_case
from .layouts import SAME_VALUES, SHARED, SHARED_GRADIENT, at_offset, padded_rows
from .test_layouts import columns_of_a_wider_table, transposed_table

MOST_TOKENS = 45
TABLE_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
MASKS = ("none", "some keys", "without CLS", "one sample without keys")


def windows() -> st.SearchStrategy[tuple[int, int]]:
    """Return squares, rectangles of odd and even width, rows and columns."""
    side = st.integers(1, 6)
    length = st.integers(1, MOST_TOKENS - 1)
    return st.one_of(
        side.map(lambda size: (size, size)),
        st.tuples(side, side),
        st.tuples(st.just(1), length),
        st.tuples(length, st.just(1)),
    )


def layouts(named: dict) -> st.SearchStrategy:
    """Return the named layouts, and layouts with unaligned rows and addresses."""
    return st.one_of(
        st.sampled_from(sorted(named)).map(named.__getitem__),
        st.tuples(st.integers(0, 7), st.integers(0, 7)).map(lambda pads: lambda tensor: padded_rows(tensor, *pads)),
        st.integers(1, 7).map(lambda elements: lambda tensor: at_offset(tensor, elements)),
    )


def key_mask(kind: str, batch: int, tokens: int, seed: int) -> Tensor | None:
    """Return a key mask, bool [B, N], that keeps at least two keys.

    With one key, the scores have zero gradients (see test_parity.py).
    """
    if kind == "none":
        return None
    mask = torch.rand(batch, tokens, generator=torch.Generator().manual_seed(seed)) > 0.4
    mask[:, -2:] = True
    if kind == "without CLS" and tokens > 2:
        mask[:, 0] = False
    if kind == "one sample without keys":
        mask[-1] = False
    return mask


@st.composite
def attention_cases(draw: st.DrawFn) -> Case:
    """Draw cases with any table, dtype, head dimension, layout, mask and dropout.

    Cases with few tokens have several planes. In a single plane the error of eager attention, which is the budget, can
    be small by chance.
    """
    window = draw(st.one_of(st.none(), windows(), windows(), windows()))
    tokens = draw(st.integers(2, MOST_TOKENS)) if window is None else window[0] * window[1] + 1
    fewest = 2 if tokens < 10 else 1
    batch = draw(st.integers(fewest, 3))
    seed = draw(st.integers(0, 2**63 - 1))
    case = make_case(
        window,
        draw(st.sampled_from(DTYPES)),
        batch=batch,
        heads=draw(st.integers(fewest, 3)),
        head_dim=draw(st.sampled_from(range(8, 129, 8))),
        tokens=tokens,
        table_dtype=draw(st.sampled_from(TABLE_DTYPES)),
        key_mask=key_mask(draw(st.sampled_from(MASKS)), batch, tokens, seed % 2**32),
        dropout_p=draw(st.sampled_from((0.0, 0.0, 0.1, 0.5))),
        seed=seed,
    )
    return lay_out(draw, case)


def lay_out(draw: st.DrawFn, case: Case) -> Case:
    """Copy the case with each tensor in a layout of its own."""
    rows = {name: draw(layouts({**SAME_VALUES, **SHARED}))(getattr(case, name)) for name in ("query", "key", "value")}
    table = case.table
    if table is not None:
        table = draw(st.sampled_from((Tensor.contiguous, transposed_table, columns_of_a_wider_table)))(table)
    grad_out = draw(layouts({**SAME_VALUES, **SHARED_GRADIENT}))(case.grad_out)
    return replace(case, **rows, grad_out=grad_out, table=table)


def output_masks() -> st.SearchStrategy[OutputMask]:
    return st.tuples(*(st.booleans(),) * 4)
