"""Attention on CPU tensors against the fp64 oracle, and its determinism."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import beit_fast
from beit_fast.ops.fallback import attention

from ..support.cases import attention_case, check_operator, run_oracle
from ..support.oracle import assert_within_budget, attention_oracle

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
attention_op = torch.ops.beit_fast.rel_pos_attention.default
backward_op = torch.ops.beit_fast.rel_pos_attention_backward.default
patch_embed_op = torch.ops.beit_fast.patch_embed.default


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [(1, 1), (2, 3), (5, 5), (7, 3), (14, 14)])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_of_windows_matches_oracle(window, dtype, masked):
    """Two tokens use a larger batch, because few roundings vary too much."""
    check_operator(attention_case(window, batch=12 if window == (1, 1) else 2, masked=masked).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_without_table_matches_oracle(dtype):
    check_operator(attention_case((3, 4), biased=False, masked=True).to(dtype))


@pytest.mark.parametrize("seed", [0, 7, 2**33 + 5])
def test_attention_with_dropout_uses_philox_mask(seed):
    check_operator(attention_case((3, 4), masked=True, dropout_p=0.3, seed=seed).to(torch.float64))


@given(
    st.tuples(st.integers(1, 5), st.integers(1, 5)),
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(1, 20),
    st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_attention_of_drawn_shapes_matches_oracle(window, batch, heads, head_dim, masked):
    case = attention_case(window, torch.float64, batch=batch, heads=heads, head_dim=head_dim, masked=masked)
    out = beit_fast.rel_pos_attention(case.query, case.key, case.value, case.table, case.window, case.key_mask)
    expected, *expected_grads = run_oracle(case, torch.float64)
    torch.testing.assert_close(out.detach(), expected)
    for grad, wanted in zip(torch.autograd.grad(out, case.leaves(), case.grad_out), expected_grads, strict=True):
        torch.testing.assert_close(grad, wanted)


@pytest.mark.parametrize("mutation", ["dropped", "transposed"])
def test_budget_with_wrong_bias_fails(mutation):
    case = attention_case((3, 5))
    table = torch.zeros_like(case.table) if mutation == "dropped" else _transposed_table(case.table, case.window)
    reference = attention_oracle(*(x.double() for x in (case.query, case.key, case.value, case.table)), case.window)
    eager = attention_oracle(case.query, case.key, case.value, case.table, case.window)
    wrong = beit_fast.rel_pos_attention(case.query, case.key, case.value, table, case.window)
    with pytest.raises(AssertionError, match="over the budget"):
        assert_within_budget("out", wrong, reference, eager, 2)


def _transposed_table(table, window):
    """Return the table with rows in (width, height) order, as transformers 5.24 reads rectangles."""
    height, width = (2 * side - 1 for side in window)
    patches = table[:-3].reshape(width, height, -1).transpose(0, 1).reshape(height * width, -1)
    return torch.cat([patches, table[-3:]])


def test_attention_of_packed_projection_slices_matches_copies():
    case = attention_case((3, 4))
    packed = torch.stack([case.query, case.key, case.value], dim=2).detach()  # [B, N, 3, H, D]
    q, k, v = packed.unbind(2)
    assert not q.is_contiguous()
    expected = beit_fast.rel_pos_attention(case.query, case.key, case.value, case.table, case.window)
    torch.testing.assert_close(beit_fast.rel_pos_attention(q, k, v, case.table, case.window), expected)


def test_backward_of_sum_accepts_stride_zero():
    """`out.sum().backward()` passes an expanded scalar: Dao-AILab/flash-attention#355, pytorch/pytorch#194719."""
    case = attention_case((3, 4), torch.float64)
    grads = torch.autograd.grad(
        beit_fast.rel_pos_attention(case.query, case.key, case.value, case.table, case.window).sum(), case.leaves()
    )
    out = attention_oracle(case.query, case.key, case.value, case.table, case.window)
    for grad, expected in zip(grads, torch.autograd.grad(out.sum(), case.leaves()), strict=True):
        torch.testing.assert_close(grad, expected)


def test_backward_of_table_alone_matches_oracle():
    """Regression test of an illegal access in SDPA (pytorch/pytorch#148476)."""
    case = attention_case((3, 4), torch.float64)
    q, k, v = (x.detach() for x in (case.query, case.key, case.value))
    (grad,) = torch.autograd.grad(
        beit_fast.rel_pos_attention(q, k, v, case.table, case.window), case.table, case.grad_out
    )
    torch.testing.assert_close(grad, run_oracle(case, torch.float64)[4])


@pytest.mark.parametrize("needed", [(a, b, c, d) for a in (0, 1) for b in (0, 1) for c in (0, 1) for d in (0, 1)])
def test_backward_of_unneeded_gradients_returns_empty_tensors(needed):
    case = attention_case((2, 3), torch.float64)
    arguments = (case.query.detach(), case.key.detach(), case.value.detach(), case.table.detach(), None)
    out, lse = attention_op(*arguments, case.window, 0.25)
    mask = [bool(flag) for flag in needed]
    grads = backward_op(case.grad_out, *arguments, out, lse, case.window, 0.25, 0.0, 0, mask)
    every = backward_op(case.grad_out, *arguments, out, lse, case.window, 0.25, 0.0, 0, [True] * 4)
    for grad, full, flag in zip(grads, every, mask, strict=True):
        assert torch.equal(grad, full) if flag else grad.numel() == 0


def test_attention_gradcheck_passes():
    case = attention_case((2, 2), torch.float64, batch=1, heads=2, head_dim=4)
    assert torch.autograd.gradcheck(
        lambda *leaves: beit_fast.rel_pos_attention(*leaves, case.window, dropout_p=0.2, seed=3),
        case.leaves(),
    )


def test_fallback_with_head_groups_matches_oracle(monkeypatch):
    """Head groups do not change the result, with and without dropout."""
    monkeypatch.setattr(attention, "_GROUP_ELEMENTS", 2 * 13 * 13)
    case = attention_case((3, 4), heads=5, masked=True)
    assert len(attention._head_groups(5, 13)) == 3
    check_operator(case)
    check_operator(replace(case.to(torch.float64), dropout_p=0.3, seed=9))


def test_fallback_first_exp_and_log_have_one_element():
    """The first threaded exp or log of oneMKL may be wrong (pytorch/pytorch#188792)."""
    code = """
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from beit_fast.ops.arguments import AttentionArguments
from beit_fast.ops.fallback.attention import attention_forward

first = {}

class Spy(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::").rstrip("_")
        if name in ("exp", "log"):
            first.setdefault((name, args[0].dtype), args[0].numel())
        return func(*args, **(kwargs or {}))

q = torch.randn(1, 5, 2, 8)
with Spy():
    attention_forward(AttentionArguments(q, q, q, None, None, (1, 1), 0.3, 0.0, 0))
assert first == {(name, dtype): 1 for name in ("exp", "log") for dtype in (torch.float32, torch.float64)}, first
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_attention_lse_matches_logsumexp():
    case = attention_case((3, 4), masked=True)
    _, lse = attention_op(case.query, case.key, case.value, case.table, case.key_mask, case.window, 0.5)
    scores = torch.einsum("bihd,bjhd->bhij", case.query, case.key) * 0.5
    scores = scores + beit_fast.position_bias.gather_bias(case.table, case.window)
    expected = scores.masked_fill(~case.key_mask[:, None, None], float("-inf")).logsumexp(-1)
    assert lse.dtype == torch.float32
    assert not lse.requires_grad
    torch.testing.assert_close(lse, expected)


def test_attention_of_empty_batch_returns_empty():
    """Regression test of Dao-AILab/flash-attention#1159 and pytorch/pytorch#133780."""
    case = attention_case((2, 3))
    q, k, v = (x[:0] for x in (case.query, case.key, case.value))
    out = beit_fast.rel_pos_attention(q, k, v, case.table, case.window)
    assert out.shape == (0, 7, 3, 16)
    (grad,) = torch.autograd.grad(out.sum(), case.table)
    assert torch.equal(grad, torch.zeros_like(case.table))


def test_attention_never_reads_uninitialized_memory():
    """Deterministic mode fills new memory with NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        check_operator(attention_case((3, 4), masked=True))
    finally:
        torch.use_deterministic_algorithms(False)


def test_attention_twice_returns_same_bits():
    case = attention_case((7, 7))
    runs = [
        torch.autograd.grad(
            beit_fast.rel_pos_attention(case.query, case.key, case.value, case.table, case.window),
            case.leaves(),
            case.grad_out,
        )
        for _ in range(2)
    ]
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))
