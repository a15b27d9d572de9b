"""Bad arguments of attention, empty batches, and NaN in one sample."""

import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import beit_fast
from beit_fast import native
from beit_fast.position_bias import table_rows

attention_op = torch.ops.beit_fast.rel_pos_attention.default
backward_op = torch.ops.beit_fast.rel_pos_attention_backward.default

# Changes of a good call, and the reason in the error.
BAD_INPUTS = {
    "dtypes of q and k": ({"k": {"dtype": torch.float64}}, "q, k and v must have one floating-point dtype"),
    "dtypes of q and v": ({"v": {"dtype": torch.bfloat16}}, "q, k and v must have one floating-point dtype"),
    "integers": (
        {name: {"dtype": torch.int64} for name in ("q", "k", "v")},
        "q, k and v must have one floating-point dtype",
    ),
    "rank": ({name: {"size": (2, 7, 48)} for name in ("q", "k", "v")}, "q, k and v must have one shape [B, N, H, D]"),
    "a number": ({"q": {"size": ()}}, "q, k and v must have one shape [B, N, H, D]"),
    "tokens of k": ({"k": {"size": (2, 8, 3, 16)}}, "q, k and v must have one shape [B, N, H, D]"),
    "head dimension of v": ({"v": {"size": (2, 7, 3, 8)}}, "q, k and v must have one shape [B, N, H, D]"),
    "no head dimension": (
        {name: {"size": (2, 7, 3, 0)} for name in ("q", "k", "v")},
        "at least one token and one number a head",
    ),
    "no tokens": (
        {name: {"size": (2, 0, 3, 16)} for name in ("q", "k", "v")},
        "at least one token and one number a head",
    ),
    "window": ({"window": (3, 3)}, "a window (3, 3) has 10 tokens, not 7"),
    "turned window": ({"window": (1, 6)}, "a window (1, 6) has 14 table rows, not 18"),
    "empty window": ({"window": (0, 6)}, "window must be two positive numbers"),
    "table rows": ({"table": {"size": (17, 3)}}, "a window (2, 3) has 18 table rows, not 17"),
    "table heads": ({"table": {"size": (18, 4)}}, "table must have one column for each of the 3 heads"),
    "table rank": ({"table": {"size": (18, 3, 1)}}, "table must be a floating-point matrix [rows, H]"),
    "table of integers": ({"table": {"dtype": torch.int32}}, "table must be a floating-point matrix [rows, H]"),
    "mask of floats": ({"key_mask": {"dtype": torch.float32}}, "key_mask must be bool [B, N]"),
    "mask of integers": ({"key_mask": {"dtype": torch.uint8}}, "key_mask must be bool [B, N]"),
    "mask for pairs": ({"key_mask": {"size": (2, 7, 7)}}, "key_mask must be bool [B, N]"),
    "mask of patches": ({"key_mask": {"size": (2, 6)}}, "key_mask must be [B, N] = [2, 7]"),
    "mask of another batch": ({"key_mask": {"size": (1, 7)}}, "key_mask must be [B, N] = [2, 7]"),
    "device of k": ({"k": {"device": "meta"}}, "all tensors must be on one device"),
    "device of table": ({"table": {"device": "meta"}}, "all tensors must be on one device"),
    "device of mask": ({"key_mask": {"device": "meta"}}, "all tensors must be on one device"),
    "dropout": ({"dropout_p": 1.0}, "dropout_p is 1.0, not in [0, 1)"),
    "seed": ({"seed": -1}, "seed is -1, not in [0, 2**63)"),
}

TENSORS = {
    "q": {"size": (2, 7, 3, 16)},
    "k": {"size": (2, 7, 3, 16)},
    "v": {"size": (2, 7, 3, 16)},
    "table": {"size": (18, 3)},
    "key_mask": {"size": (2, 7), "dtype": torch.bool},
}


def arguments(changes, **everywhere):
    """Return the arguments of a good attention call with `changes`."""
    tensors = {name: torch.zeros(**(given | everywhere | changes.get(name, {}))) for name, given in TENSORS.items()}
    numbers = {"window": (2, 3), "dropout_p": 0.0, "seed": 0}
    return tensors | {name: changes.get(name, value) for name, value in numbers.items()}


def call_function(given):
    return beit_fast.rel_pos_attention(**given)


def call_operator(given):
    return attention_op(*(given[name] for name in TENSORS), given["window"], 0.25, given["dropout_p"], given["seed"])


@pytest.mark.parametrize("name", BAD_INPUTS)
def test_attention_bad_arguments_raise_with_reason(name):
    changes, reason = BAD_INPUTS[name]
    call_function(arguments({}))
    with pytest.raises(ValueError, match="rel_pos_attention cannot serve") as error:
        call_function(arguments(changes))
    assert reason in str(error.value)
    for tensor, given in changes.items():
        if isinstance(given, dict) and "size" in given:
            assert f"{tensor} " in str(error.value)
            assert str(list(given["size"])) in str(error.value)


@pytest.mark.parametrize("name", BAD_INPUTS)
def test_operator_with_bad_arguments_raises(name):
    """The C++ operator names the first error only."""
    call_operator(arguments({}))
    with pytest.raises(ValueError, match=r"^beit_fast::rel_pos_attention"):
        call_operator(arguments(BAD_INPUTS[name][0]))


@pytest.mark.parametrize("name", [name for name in BAD_INPUTS if not name.startswith("device")])
def test_attention_bad_meta_tensors_raise_same_reason(name):
    changes, reason = BAD_INPUTS[name]
    call_function(arguments({}, device="meta"))
    with pytest.raises(ValueError, match="cannot serve") as error:
        call_function(arguments(changes, device="meta"))
    assert reason in str(error.value)


@pytest.mark.parametrize("name", BAD_INPUTS)
def test_attention_bad_fake_tensors_raise_same_reason(name):
    changes, reason = BAD_INPUTS[name]
    with FakeTensorMode():
        call_function(arguments({}))
        with pytest.raises(ValueError, match="cannot serve") as error:
            call_function(arguments(changes))
    assert reason in str(error.value)


def test_attention_table_without_window_adds_a_reason():
    given = arguments({"key_mask": {"dtype": torch.float32}}) | {"window": None}
    with pytest.raises(ValueError, match=r"key_mask must be bool.*a table needs window"):
        beit_fast.rel_pos_attention(**given)


BAD_BACKWARDS = {
    "grad_out": ({"grad_out": (2, 7, 3, 8)}, "grad_out must have the shape and dtype of q"),
    "out": ({"out": (2, 7, 48)}, "out must have the shape and dtype of q"),
    "lse": ({"lse": (2, 7, 3)}, "lse must be float32 [B, H, N]"),
    "table": ({"table": (12, 3)}, "a window (2, 3) has 18 table rows, not 12"),
}


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("name", BAD_BACKWARDS)
def test_backward_with_bad_arguments_raises(name, device):
    """Without these checks, a kernel would read out of bounds."""
    changes, reason = BAD_BACKWARDS[name]
    shapes = {"grad_out": (2, 7, 3, 16), "q": (2, 7, 3, 16), "k": (2, 7, 3, 16), "v": (2, 7, 3, 16), "table": (18, 3)}

    def call(changes):
        tensors = [torch.zeros(changes.get(key, shape), device=device) for key, shape in shapes.items()]
        rest = [torch.zeros(changes.get(key, shape), device=device)
                for key, shape in (("out", (2, 7, 3, 16)), ("lse", (2, 3, 7)))]  # fmt: skip
        return backward_op(*tensors, None, *rest, (2, 3), 0.25, 0.0, 0, [True] * 4)

    assert [grad.shape for grad in call({})] == [shapes[key] for key in ("q", "k", "v", "table")]
    with pytest.raises(ValueError, match=r"^beit_fast::rel_pos_attention_backward") as error:
        call(changes)
    if device == "meta" or not native.is_loaded("_C"):  # C++ names the first error only
        assert reason in str(error.value)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_attention_of_empty_batch_has_empty_gradients(biased, masked, dropout_p):
    """Regression test of Dao-AILab/flash-attention#1159 and pytorch/pytorch#133780."""
    q, k, v = (torch.randn(0, 7, 3, 16, requires_grad=True) for _ in range(3))
    table = torch.randn(18, 3, requires_grad=True) if biased else None
    key_mask = torch.ones(0, 7, dtype=torch.bool) if masked else None
    out = beit_fast.rel_pos_attention(q, k, v, table, (2, 3), key_mask, dropout_p=dropout_p)
    assert out.shape == q.shape
    out.sum().backward()
    assert q.grad.shape == k.grad.shape == v.grad.shape == q.shape
    if biased:
        assert torch.equal(table.grad, torch.zeros_like(table))


@pytest.mark.parametrize("poisoned", ["q", "k", "v", "grad_out"])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_with_nan_keeps_it_in_its_sample(poisoned, masked):
    """Only the table gradient, a sum over samples, may become NaN."""
    tensors = {name: torch.randn(3, 7, 2, 16) for name in ("q", "k", "v", "grad_out")}
    table = torch.randn(table_rows((2, 3)), 2)
    key_mask = torch.rand(3, 7) > 0.3 if masked else None

    def run(tensors):
        leaves = [tensors[name].clone().requires_grad_() for name in ("q", "k", "v")]
        out = beit_fast.rel_pos_attention(*leaves, table.clone().requires_grad_(), (2, 3), key_mask)
        return [out.detach(), *torch.autograd.grad(out, leaves, tensors["grad_out"])]

    clean = run(tensors)
    tensors[poisoned] = tensors[poisoned].clone()
    tensors[poisoned][1] = float("nan")
    dirty = run(tensors)
    assert any(result[1].isnan().any() for result in dirty)
    for result, expected in zip(dirty, clean, strict=True):
        assert torch.equal(result[[0, 2]], expected[[0, 2]])


def test_flop_formulas_are_registered_in_any_import_order():
    for imports in ("torch.utils.flop_counter, beit_fast", "beit_fast, torch.utils.flop_counter"):
        code = f"""
import torch, {imports}
assert torch.ops.beit_fast.rel_pos_attention in torch.utils.flop_counter.flop_registry
"""
        subprocess.run([sys.executable, "-c", code], check=True)
