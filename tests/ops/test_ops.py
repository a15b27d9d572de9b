"""Registrations of attention on CPU tensors: opcheck, autocast, vmap, FLOPs and errors."""

import pytest
import torch
from torch.library import opcheck

import beit_fast
from beit_fast.ops import arguments
from beit_fast.position_bias import table_rows

from ..support.cases import attention_case
from ..support.oracle import attention_oracle

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
attention_op = torch.ops.beit_fast.rel_pos_attention.default
backward_op = torch.ops.beit_fast.rel_pos_attention_backward.default
patch_embed_op = torch.ops.beit_fast.patch_embed.default


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_attention_opcheck_passes(biased, masked):
    case = attention_case((2, 3), masked=masked, biased=biased)
    opcheck(attention_op, (case.query, case.key, case.value, case.table, case.key_mask, case.window, 0.25, 0.1, 4))


@pytest.mark.parametrize("trained", [(), (0,), (1, 2), (3,), (0, 1, 2)])
def test_attention_frozen_inputs_opcheck_passes(trained):
    case = attention_case((2, 3))
    leaves = [x.detach().requires_grad_(number in trained) for number, x in enumerate(case.leaves())]
    opcheck(attention_op, (*leaves, None, case.window, 0.25))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_attention_backward_opcheck_passes(biased, masked):
    case = attention_case((2, 3), masked=masked, biased=biased)
    tensors = [None if x is None else x.detach() for x in (case.query, case.key, case.value, case.table)]
    tensors.append(case.key_mask)
    out, lse = attention_op(*tensors, case.window, 0.25, 0.1, 4)
    for mask in ([True] * 4, [False, False, False, True], [True, False, True, False]):
        opcheck(backward_op, (case.grad_out, *tensors, out, lse, case.window, 0.25, 0.1, 4, mask))


def test_attention_backward_transposed_table_opcheck_passes():
    """The table gradient is contiguous for any strides, like the fake (NVIDIA/cuEquivariance#223)."""
    case = attention_case((2, 3))
    q, k, v, table = (x.detach() for x in case.leaves())
    tensors = [q, k, v, table.t().contiguous().t(), None]
    out, lse = attention_op(*tensors, case.window, 0.25)
    opcheck(backward_op, (case.grad_out, *tensors, out, lse, case.window, 0.25, 0.0, 0, [True] * 4))


def test_attention_double_backward_raises():
    case = attention_case((2, 3))
    out = beit_fast.rel_pos_attention(case.query, case.key, case.value, case.table, case.window)
    (grad,) = torch.autograd.grad(out.pow(2).sum(), case.query, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()


def test_attention_forward_mode_raises():
    case = attention_case((2, 3))
    q, k, v = (x.detach() for x in (case.query, case.key, case.value))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError, match="forward-mode"):
        beit_fast.rel_pos_attention(torch.autograd.forward_ad.make_dual(q, torch.ones_like(q)), k, v)
    with pytest.raises(RuntimeError, match="forward-mode"):
        torch.func.jvp(lambda x: beit_fast.rel_pos_attention(x, k, v), (q,), (torch.ones_like(q),))


def test_attention_autocast_casts_projections_but_not_table():
    case = attention_case((3, 4))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = beit_fast.rel_pos_attention(case.query, case.key, case.value, case.table, case.window)
    low = [x.detach().bfloat16() for x in (case.query, case.key, case.value)]
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, beit_fast.rel_pos_attention(*low, case.table, case.window))
    grads = torch.autograd.grad(out, case.leaves(), case.grad_out.bfloat16())
    assert [grad.dtype for grad in grads] == [torch.float32] * 4


def test_attention_mixed_dtypes_raise():
    """cuDNN was silently wrong for mixed dtypes (pytorch/pytorch#191612)."""
    case = attention_case((2, 3))
    with pytest.raises(ValueError, match="one floating-point dtype"):
        beit_fast.rel_pos_attention(case.query.bfloat16(), case.key, case.value, case.table, case.window)


def test_attention_bad_arguments_raise_every_reason():
    case = attention_case((2, 3))
    with pytest.raises(ValueError, match="cannot serve") as error:
        beit_fast.rel_pos_attention(
            case.query, case.key, case.value, case.table[:, :2], (3, 3), torch.ones(2, 7), dropout_p=1.5, seed=-1
        )
    for reason in ("float32[2, 7, 3, 16] on cpu", "one column for each of the 3 heads", "key_mask must be bool",
                   "10 tokens, not 7", "28 table rows, not 18", "dropout_p is 1.5", "seed is -1"):  # fmt: skip
        assert reason in str(error.value)


def test_attention_table_without_window_raises():
    case = attention_case((2, 3))
    with pytest.raises(ValueError, match="needs window"):
        beit_fast.rel_pos_attention(case.query, case.key, case.value, case.table)


@pytest.mark.parametrize("in_dims", [(0, 0, 0, None), (0, None, 2, None), (0, 0, 0, 0), (None, None, None, 1)])
def test_attention_vmap_matches_loop(in_dims):
    case = attention_case((2, 3), torch.float64)
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
def test_attention_vmap_of_grad_matches_per_sample_gradients(argnum):
    case = attention_case((2, 3), torch.float64)
    leaves = [x.detach() for x in case.leaves()]
    batches = [x.unsqueeze(1) for x in leaves[:3]]  # [B, 1, N, H, D]

    def loss(q, k, v, table):
        return (beit_fast.rel_pos_attention(q, k, v, table, case.window) ** 2).sum()

    mapped = torch.vmap(torch.func.grad(loss, argnums=argnum), (0, 0, 0, None))(*batches, leaves[3])
    for sample in range(2):
        single = torch.func.grad(loss, argnums=argnum)(*(x[sample] for x in batches), leaves[3])
        torch.testing.assert_close(mapped[sample], single)


def test_attention_jacrev_matches_oracle():
    case = attention_case((1, 2), torch.float64, batch=1, heads=1, head_dim=4)
    q, k, v, table = (x.detach() for x in case.leaves())

    def attend(bias):
        return beit_fast.rel_pos_attention(q, k, v, bias, case.window)

    expected = torch.func.jacrev(lambda bias: attention_oracle(q, k, v, bias, case.window))(table)
    torch.testing.assert_close(torch.func.jacrev(attend)(table), expected)


def test_attention_vmap_with_dropout_needs_same_randomness():
    case = attention_case((2, 3))
    q = torch.stack([case.query.detach()] * 2)

    def attend(x):
        return beit_fast.rel_pos_attention(x, x, x, case.table, case.window, dropout_p=0.5, seed=1)

    with pytest.raises(RuntimeError, match="randomness='same'"):
        torch.vmap(attend, randomness="different")(q)
    same = torch.vmap(attend, randomness="same")(q)
    torch.testing.assert_close(same[0], attend(q[0]))
    torch.testing.assert_close(same[1], attend(q[1]))


def test_attention_flops_are_those_of_matmuls():
    from torch.utils.flop_counter import FlopCounterMode

    case = attention_case((3, 4))
    batch, tokens, heads, head_dim = case.query.shape
    product = 2 * batch * heads * tokens * tokens * head_dim
    with FlopCounterMode(display=False) as forward:
        out = beit_fast.rel_pos_attention(case.query, case.key, case.value, case.table, case.window)
    assert forward.get_total_flops() == 2 * product
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    assert backward.get_total_flops() == 5 * product


def test_attention_compiled_gradients_match_eager():
    case = attention_case((3, 4))

    def train_step(q, k, v, table):
        return beit_fast.rel_pos_attention(q, k, v, table, case.window).square().sum()

    compiled = torch.compile(train_step, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(train_step(*case.leaves()), case.leaves())
    for grad, plain in zip(torch.autograd.grad(compiled(*case.leaves()), case.leaves()), expected, strict=True):
        torch.testing.assert_close(grad, plain)


def test_attention_meta_tensors_return_shapes():
    q = torch.empty(2, 7, 3, 16, device="meta")
    table = torch.empty(table_rows((2, 3)), 3, device="meta")
    out = beit_fast.rel_pos_attention(q, q, q, table, (2, 3))
    assert out.shape == q.shape
    assert out.device.type == "meta"


SCHEMAS = [
    (getattr(arguments, schema), getattr(arguments, name))
    for schema, name in {
        "REL_POS_ATTENTION": "AttentionArguments",
        "REL_POS_ATTENTION_BACKWARD": "AttentionBackwardArguments",
        "PATCH_EMBED": "PatchEmbedArguments",
        "LINEAR_GELU": "LinearGeluArguments",
        "RESIDUAL_NORM": "ResidualNormArguments",
        "RESIDUAL_NORM_BACKWARD": "ResidualNormBackwardArguments",
        "RESIDUAL_ADD": "ResidualAddArguments",
        "RESIDUAL_ADD_BACKWARD": "ResidualAddBackwardArguments",
    }.items()
]


@pytest.mark.parametrize(("text", "tuple_type"), SCHEMAS, ids=lambda x: getattr(x, "__name__", "schema"))
def test_argument_tuple_has_names_and_defaults_of_schema(text, tuple_type):
    schema = getattr(torch.ops.beit_fast, text.partition("(")[0]).default._schema
    assert tuple(argument.name for argument in schema.arguments) == tuple_type._fields
    defaults = {argument.name: argument.default_value for argument in schema.arguments if argument.has_default_value()}
    assert defaults == tuple_type._field_defaults
