"""The operators as torch sees them: numbers, gradients, fakes, autocast, vmap, FLOPs and refusals, on CPU tensors."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck

import beit_fast
from beit_fast.ops.fallback import attention
from beit_fast.position_bias import table_rows

from ..support.cases import attention_case, oracle_gradients
from ..support.oracle import assert_within_budget, attention_oracle, philox_keep

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
attention_op = torch.ops.beit_fast.rel_pos_attention.default
backward_op = torch.ops.beit_fast.rel_pos_attention_backward.default
patch_embed_op = torch.ops.beit_fast.patch_embed.default


def scaled_error(single, reference):
    """The fp64 `reference` with the error of the fp32 result, made as much smaller as fp64 is finer."""
    ratio = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
    return reference + (single.double() - reference) * ratio


def check_against_oracle(case, dtype, dropout_p=0.0, seed=0):
    case = case.to(dtype)
    keep = None
    if dropout_p:
        keep = philox_keep(seed, dropout_p, case.q.shape[0], case.q.shape[2], case.q.shape[1])
    reference, reference_grads = oracle_gradients(case.to(torch.float64), keep=keep, dropout_p=dropout_p)
    eager, eager_grads = oracle_gradients(case, keep=keep, dropout_p=dropout_p)
    if dtype == torch.float64:  # eager is the reference itself: how far off it is follows from fp32
        rounded = oracle_gradients(case.to(torch.float32), keep=keep, dropout_p=dropout_p)
        eager = scaled_error(rounded[0], reference)
        eager_grads = [scaled_error(*pair) for pair in zip(rounded[1], reference_grads, strict=True)]
    out = beit_fast.rel_pos_attention(
        case.q, case.k, case.v, case.table, case.window, case.key_mask, dropout_p=dropout_p, seed=seed
    )
    assert out.dtype == dtype
    assert out.is_contiguous()
    assert_within_budget("out", out.detach(), reference, eager, 2)
    grads = torch.autograd.grad(out, case.leaves(), case.grad_out)
    names = ("q", "k", "v", "table")
    for name, grad, expected, reached in zip(names, grads, reference_grads, eager_grads, strict=False):
        assert grad.dtype == dtype
        assert_within_budget(f"gradient of {name}", grad, expected, reached, 3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [(1, 1), (2, 3), (5, 5), (7, 3), (14, 14)])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_and_gradients(window, dtype, masked):
    """Two tokens come in many planes: in a few, two or three roundings decide, and eager's can be lucky."""
    check_against_oracle(attention_case(window, batch=12 if window == (1, 1) else 2, masked=masked), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_without_a_table(dtype):
    check_against_oracle(attention_case((3, 4), biased=False, masked=True), dtype)


@pytest.mark.parametrize("seed", [0, 7, 2**33 + 5])
def test_dropout_drops_the_weights_that_philox_names(seed):
    check_against_oracle(attention_case((3, 4), masked=True), torch.float64, dropout_p=0.3, seed=seed)


@given(
    st.tuples(st.integers(1, 5), st.integers(1, 5)),
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(1, 20),
    st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_attention_over_drawn_shapes(window, batch, heads, head_dim, masked):
    case = attention_case(window, batch, heads, head_dim, torch.float64, masked, seed=batch + 7 * head_dim)
    out = beit_fast.rel_pos_attention(case.q, case.k, case.v, case.table, case.window, case.key_mask)
    expected, expected_grads = oracle_gradients(case)
    torch.testing.assert_close(out.detach(), expected)
    for grad, wanted in zip(torch.autograd.grad(out, case.leaves(), case.grad_out), expected_grads, strict=True):
        torch.testing.assert_close(grad, wanted)


@pytest.mark.parametrize("mutation", ["dropped", "transposed"])
def test_the_budget_notices_a_wrong_bias(mutation):
    case = attention_case((3, 5))
    table = torch.zeros_like(case.table) if mutation == "dropped" else _transposed_table(case.table, case.window)
    reference = attention_oracle(*(x.double() for x in (case.q, case.k, case.v, case.table)), case.window)
    eager = attention_oracle(case.q, case.k, case.v, case.table, case.window)
    wrong = beit_fast.rel_pos_attention(case.q, case.k, case.v, table, case.window)
    with pytest.raises(AssertionError, match="over the budget"):
        assert_within_budget("out", wrong, reference, eager, 2)


def _transposed_table(table, window):
    """Rows read as (width, height) instead of (height, width), as in transformers 5.23 on rectangles."""
    height, width = (2 * side - 1 for side in window)
    patches = table[:-3].reshape(width, height, -1).transpose(0, 1).reshape(height * width, -1)
    return torch.cat([patches, table[-3:]])


def test_slices_of_one_packed_projection_need_no_copy():
    case = attention_case((3, 4))
    packed = torch.stack([case.q, case.k, case.v], dim=2).detach()  # [B, N, 3, H, D]
    q, k, v = packed.unbind(2)
    assert not q.is_contiguous()
    expected = beit_fast.rel_pos_attention(case.q, case.k, case.v, case.table, case.window)
    torch.testing.assert_close(beit_fast.rel_pos_attention(q, k, v, case.table, case.window), expected)


def test_gradient_of_a_sum_has_stride_zero():
    """`out.sum().backward()` hands over an expanded scalar: Dao-AILab/flash-attention#355, pytorch/pytorch#194719."""
    case = attention_case((3, 4), dtype=torch.float64)
    grads = torch.autograd.grad(
        beit_fast.rel_pos_attention(case.q, case.k, case.v, case.table, case.window).sum(), case.leaves()
    )
    out = attention_oracle(case.q, case.k, case.v, case.table, case.window)
    for grad, expected in zip(grads, torch.autograd.grad(out.sum(), case.leaves()), strict=True):
        torch.testing.assert_close(grad, expected)


def test_only_the_table_may_require_a_gradient():
    """An illegal access in SDPA once (pytorch/pytorch#148476)."""
    case = attention_case((3, 4), dtype=torch.float64)
    q, k, v = (x.detach() for x in (case.q, case.k, case.v))
    (grad,) = torch.autograd.grad(
        beit_fast.rel_pos_attention(q, k, v, case.table, case.window), case.table, case.grad_out
    )
    torch.testing.assert_close(grad, oracle_gradients(case)[1][3])


@pytest.mark.parametrize("needed", [(a, b, c, d) for a in (0, 1) for b in (0, 1) for c in (0, 1) for d in (0, 1)])
def test_gradients_that_nobody_asked_for_come_back_empty(needed):
    case = attention_case((2, 3), dtype=torch.float64)
    arguments = (case.q.detach(), case.k.detach(), case.v.detach(), case.table.detach(), None)
    out, lse = attention_op(*arguments, case.window, 0.25)
    mask = [bool(flag) for flag in needed]
    grads = backward_op(case.grad_out, *arguments, out, lse, case.window, 0.25, 0.0, 0, mask)
    every = backward_op(case.grad_out, *arguments, out, lse, case.window, 0.25, 0.0, 0, [True] * 4)
    for grad, full, flag in zip(grads, every, mask, strict=True):
        assert torch.equal(grad, full) if flag else grad.numel() == 0


def test_gradcheck():
    case = attention_case((2, 2), batch=1, heads=2, head_dim=4, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda *leaves: beit_fast.rel_pos_attention(*leaves, case.window, dropout_p=0.2, seed=3),
        case.leaves(),
    )


def test_heads_in_several_groups(monkeypatch):
    """Many tokens split the heads into groups; the parts must fit together, dropout included."""
    monkeypatch.setattr(attention, "_GROUP_ELEMENTS", 2 * 13 * 13)
    case = attention_case((3, 4), heads=5, masked=True)
    assert len(attention._head_groups(5, 13)) == 3
    check_against_oracle(case, torch.float32)
    check_against_oracle(case, torch.float64, dropout_p=0.3, seed=9)


def test_vector_math_is_resolved_by_one_thread_first():
    """oneMKL's first exp or log, made by several threads, may be wrong by 1e-4 (pytorch/pytorch#188792)."""
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


def test_log_sum_exp():
    case = attention_case((3, 4), masked=True)
    _, lse = attention_op(case.q, case.k, case.v, case.table, case.key_mask, case.window, 0.5)
    scores = torch.einsum("bihd,bjhd->bhij", case.q, case.k) * 0.5
    scores = scores + beit_fast.position_bias.gather_bias(case.table, case.window)
    expected = scores.masked_fill(~case.key_mask[:, None, None], float("-inf")).logsumexp(-1)
    assert lse.dtype == torch.float32
    assert not lse.requires_grad
    torch.testing.assert_close(lse, expected)


def test_empty_batch():
    """Dao-AILab/flash-attention#1159, pytorch/pytorch#133780."""
    case = attention_case((2, 3))
    q, k, v = (x[:0] for x in (case.q, case.k, case.v))
    out = beit_fast.rel_pos_attention(q, k, v, case.table, case.window)
    assert out.shape == (0, 7, 3, 16)
    (grad,) = torch.autograd.grad(out.sum(), case.table)
    assert torch.equal(grad, torch.zeros_like(case.table))


def test_fresh_memory_is_never_read():
    """Deterministic mode fills fresh memory with NaN, so an output left unwritten would show."""
    torch.use_deterministic_algorithms(True)
    try:
        check_against_oracle(attention_case((3, 4), masked=True), torch.float32)
    finally:
        torch.use_deterministic_algorithms(False)


def test_two_runs_give_the_same_bits():
    case = attention_case((7, 7))
    runs = [
        torch.autograd.grad(
            beit_fast.rel_pos_attention(case.q, case.k, case.v, case.table, case.window),
            case.leaves(),
            case.grad_out,
        )
        for _ in range(2)
    ]
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_opcheck_attention(biased, masked):
    case = attention_case((2, 3), masked=masked, biased=biased)
    opcheck(attention_op, (case.q, case.k, case.v, case.table, case.key_mask, case.window, 0.25, 0.1, 4))


@pytest.mark.parametrize("trained", [(), (0,), (1, 2), (3,), (0, 1, 2)])
def test_opcheck_attention_with_frozen_inputs(trained):
    case = attention_case((2, 3))
    leaves = [x.detach().requires_grad_(number in trained) for number, x in enumerate(case.leaves())]
    opcheck(attention_op, (*leaves, None, case.window, 0.25))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_opcheck_attention_backward(biased, masked):
    case = attention_case((2, 3), masked=masked, biased=biased)
    tensors = [None if x is None else x.detach() for x in (case.q, case.k, case.v, case.table)] + [case.key_mask]
    out, lse = attention_op(*tensors, case.window, 0.25, 0.1, 4)
    for mask in ([True] * 4, [False, False, False, True], [True, False, True, False]):
        opcheck(backward_op, (case.grad_out, *tensors, out, lse, case.window, 0.25, 0.1, 4, mask))


def test_opcheck_attention_backward_of_a_transposed_table():
    """The gradient is contiguous whatever the table's strides are, as the fake says: NVIDIA/cuEquivariance#223."""
    case = attention_case((2, 3))
    tensors = [x.detach() for x in (case.q, case.k, case.v)] + [case.table.detach().t().contiguous().t(), None]
    out, lse = attention_op(*tensors, case.window, 0.25)
    opcheck(backward_op, (case.grad_out, *tensors, out, lse, case.window, 0.25, 0.0, 0, [True] * 4))


def test_double_backward_is_refused():
    case = attention_case((2, 3))
    out = beit_fast.rel_pos_attention(case.q, case.k, case.v, case.table, case.window)
    (grad,) = torch.autograd.grad(out.pow(2).sum(), case.q, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()


def test_forward_mode_is_refused():
    case = attention_case((2, 3))
    q, k, v = (x.detach() for x in (case.q, case.k, case.v))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError, match="forward-mode"):
        beit_fast.rel_pos_attention(torch.autograd.forward_ad.make_dual(q, torch.ones_like(q)), k, v)
    with pytest.raises(RuntimeError, match="forward-mode"):
        torch.func.jvp(lambda x: beit_fast.rel_pos_attention(x, k, v), (q,), (torch.ones_like(q),))


def test_autocast_casts_the_projections_and_leaves_the_table():
    case = attention_case((3, 4))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = beit_fast.rel_pos_attention(case.q, case.k, case.v, case.table, case.window)
    low = [x.detach().bfloat16() for x in (case.q, case.k, case.v)]
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, beit_fast.rel_pos_attention(*low, case.table, case.window))
    grads = torch.autograd.grad(out, case.leaves(), case.grad_out.bfloat16())
    assert [grad.dtype for grad in grads] == [torch.float32] * 4


def test_mixed_dtypes_are_refused():
    """An fp32 mask with half q was silently wrong in cuDNN's SDPA (pytorch/pytorch#191612)."""
    case = attention_case((2, 3))
    with pytest.raises(ValueError, match="one floating-point dtype"):
        beit_fast.rel_pos_attention(case.q.bfloat16(), case.k, case.v, case.table, case.window)


def test_one_error_lists_every_reason():
    case = attention_case((2, 3))
    with pytest.raises(ValueError, match="cannot serve") as error:
        beit_fast.rel_pos_attention(
            case.q, case.k, case.v, case.table[:, :2], (3, 3), torch.ones(2, 7), dropout_p=1.5, seed=-1
        )
    for reason in ("float32[2, 7, 3, 16] on cpu", "one column for each of the 3 heads", "key_mask must be bool",
                   "10 tokens, not 7", "28 table rows, not 18", "dropout_p is 1.5", "seed is -1"):  # fmt: skip
        assert reason in str(error.value)


def test_a_table_needs_a_window():
    case = attention_case((2, 3))
    with pytest.raises(ValueError, match="needs window"):
        beit_fast.rel_pos_attention(case.q, case.k, case.v, case.table)


@pytest.mark.parametrize("in_dims", [(0, 0, 0, None), (0, None, 2, None), (0, 0, 0, 0), (None, None, None, 1)])
def test_vmap_equals_a_loop(in_dims):
    case = attention_case((2, 3), dtype=torch.float64)
    size = 3
    arguments = [
        x.detach() if dim is None else torch.stack([x.detach() * (1 + n) for n in range(size)], dim)
        for x, dim in zip(case.leaves(), in_dims, strict=True)
    ]

    def attend(q, k, v, table):
        return beit_fast.rel_pos_attention(q, k, v, table, case.window)

    mapped = torch.vmap(attend, in_dims)(*arguments)
    for n in range(size):
        entry = [x if dim is None else x.select(dim, n) for x, dim in zip(arguments, in_dims, strict=True)]
        torch.testing.assert_close(mapped[n], attend(*entry))


@pytest.mark.parametrize("argnum", [0, 2, 3])
def test_gradients_of_each_sample_by_vmap(argnum):
    case = attention_case((2, 3), dtype=torch.float64)
    leaves = [x.detach() for x in case.leaves()]
    batches = [x.unsqueeze(1) for x in leaves[:3]]  # [B, 1, N, H, D]

    def loss(q, k, v, table):
        return (beit_fast.rel_pos_attention(q, k, v, table, case.window) ** 2).sum()

    mapped = torch.vmap(torch.func.grad(loss, argnums=argnum), (0, 0, 0, None))(*batches, leaves[3])
    for sample in range(2):
        single = torch.func.grad(loss, argnums=argnum)(*(x[sample] for x in batches), leaves[3])
        torch.testing.assert_close(mapped[sample], single)


def test_jacobian_by_reverse_mode():
    case = attention_case((1, 2), batch=1, heads=1, head_dim=4, dtype=torch.float64)
    q, k, v, table = (x.detach() for x in case.leaves())

    def attend(bias):
        return beit_fast.rel_pos_attention(q, k, v, bias, case.window)

    expected = torch.func.jacrev(lambda bias: attention_oracle(q, k, v, bias, case.window))(table)
    torch.testing.assert_close(torch.func.jacrev(attend)(table), expected)


def test_vmap_with_dropout_wants_to_be_told():
    case = attention_case((2, 3))
    q = torch.stack([case.q.detach()] * 2)

    def attend(x):
        return beit_fast.rel_pos_attention(x, x, x, case.table, case.window, dropout_p=0.5, seed=1)

    with pytest.raises(RuntimeError, match="randomness='same'"):
        torch.vmap(attend, randomness="different")(q)
    same = torch.vmap(attend, randomness="same")(q)
    torch.testing.assert_close(same[0], attend(q[0]))
    torch.testing.assert_close(same[1], attend(q[1]))


def test_flop_formula():
    from torch.utils.flop_counter import FlopCounterMode

    case = attention_case((3, 4))
    batch, tokens, heads, head_dim = case.q.shape
    product = 2 * batch * heads * tokens * tokens * head_dim
    with FlopCounterMode(display=False) as forward:
        out = beit_fast.rel_pos_attention(case.q, case.k, case.v, case.table, case.window)
    assert forward.get_total_flops() == 2 * product
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    assert backward.get_total_flops() == 5 * product


def test_compile_keeps_the_operator_whole():
    case = attention_case((3, 4))

    def train_step(q, k, v, table):
        return beit_fast.rel_pos_attention(q, k, v, table, case.window).square().sum()

    compiled = torch.compile(train_step, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(train_step(*case.leaves()), case.leaves())
    for grad, plain in zip(torch.autograd.grad(compiled(*case.leaves()), case.leaves()), expected, strict=True):
        torch.testing.assert_close(grad, plain)


def test_meta_tensors_give_shapes():
    q = torch.empty(2, 7, 3, 16, device="meta")
    table = torch.empty(table_rows((2, 3)), 3, device="meta")
    out = beit_fast.rel_pos_attention(q, q, q, table, (2, 3))
    assert out.shape == q.shape
    assert out.device.type == "meta"
