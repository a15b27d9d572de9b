"""Padding masks of accelerated models, and sums of `TableBias` in Transformers' layers."""

from __future__ import annotations

import pytest
import torch

from beit_fast.integrations.transformers import accelerate
from beit_fast.integrations.transformers.table_bias import TableBias, key_mask_of

from ..support.oracle import dense_bias, relative_error
from ..support.transformers_models import IS_4, assert_same, build, inputs_for, pair, run

needs_5 = pytest.mark.skipif(IS_4, reason="BEiT accepts a padding mask since 5.0")


def padding_mask(batch=3, tokens=17):
    mask = torch.ones(batch, tokens, dtype=torch.long)
    mask[0, 9:] = 0
    mask[1, ::3] = 0
    return mask


@needs_5
@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("position", ["per layer", "shared", "both", "none"])
def test_accelerate_padding_mask_equals_eager(position, attn_implementation):
    """Compare with eager attention.

    Transformers' sdpa adds a bool mask to the bias as 0 and 1, so its result is wrong with a bias.
    """
    theirs = build("BeitModel", position, "eager", vocab_size=7).double()
    ours = build("BeitModel", position, attn_implementation, vocab_size=7).double()
    ours.load_state_dict(theirs.state_dict())
    accelerate(ours, "triton")
    inputs = inputs_for("BeitModel", theirs, batch=3)
    keep = padding_mask().bool()[:, None, None, :].expand(-1, 1, 17, -1)
    additive = torch.zeros(keep.shape, dtype=torch.float64).masked_fill(~keep, torch.finfo(torch.float64).min)
    expected = theirs(**inputs, attention_mask=additive)
    for mask in (padding_mask(), keep.contiguous(), additive):
        actual = ours(**inputs, attention_mask=mask)
        assert relative_error(actual.last_hidden_state, expected.last_hidden_state) < 1e-6  # eager's softmax is fp32
    # Attention weights are computed by Transformers' own attention.
    with_attentions = ours(**inputs, attention_mask=padding_mask(), output_attentions=True)
    assert relative_error(with_attentions.last_hidden_state, expected.last_hidden_state) < 1e-6
    plain = ours(**inputs).last_hidden_state
    assert relative_error(plain, expected.last_hidden_state) > 1e-2
    assert relative_error(plain[2], expected.last_hidden_state[2]) < 1e-6  # this sample has no masked keys


@needs_5
def test_transformers_sdpa_padding_mask_differs_from_eager():
    """Record why eager attention is the reference above.

    If this test fails, Transformers has fixed its sdpa mask.
    """
    eager, sdpa = (build("BeitModel", "per layer", name).double() for name in ("eager", "sdpa"))
    inputs = inputs_for("BeitModel", eager, batch=3) | {"attention_mask": padding_mask()}
    assert relative_error(sdpa(**inputs).last_hidden_state, eager(**inputs).last_hidden_state) > 1e-2


@needs_5
def test_accelerate_unsupported_mask_raises():
    _, ours = pair("BeitModel")
    inputs = inputs_for("BeitModel", ours)
    causal = torch.ones(2, 1, 17, 17, dtype=torch.bool).tril()
    with pytest.raises(ValueError, match="differs between queries"):
        ours(**inputs, attention_mask=causal)
    with pytest.raises(ValueError, match="has values other than 0 and -10000"):
        ours(**inputs, attention_mask=torch.full((2, 1, 17, 17), -1.0, dtype=torch.float64))
    with pytest.raises(ValueError, match="accelerate the whole model"):
        ours(**inputs, attention_mask=torch.zeros(2, 3, 17, 17, dtype=torch.float64))


@needs_5
@pytest.mark.parametrize("position", ["per layer", "shared", "both", "none"])
def test_accelerate_mask_with_heads_equals_transformers(position):
    """Such a mask is added to scores as a dense bias is."""
    theirs, ours = pair("BeitModel", position)
    inputs = inputs_for("BeitModel", theirs) | {"attention_mask": torch.randn(2, 4, 17, 17, dtype=torch.float64)}
    assert_same(run(ours, inputs), run(theirs, inputs))


def test_key_mask_of_bool_and_additive_masks_returns_keys():
    keep = torch.rand(3, 1, 1, 5) > 0.5
    for mask in (keep.expand(3, 1, 5, 5), keep.expand(3, 1, 5, 5).contiguous(), keep):
        assert torch.equal(key_mask_of(mask), keep[:, 0, 0])
    for lowest in (-1e4, float("-inf"), torch.finfo(torch.float32).min):
        additive = torch.where(keep, 0.0, lowest).expand(3, 1, 5, 5)
        assert torch.equal(key_mask_of(additive), keep[:, 0, 0])
    with pytest.raises(ValueError, match="int64"):
        key_mask_of(keep.long())


def test_table_bias_add_to_and_dense_keep_key_mask():
    one, other = (TableBias(torch.randn(12, 2), (1, 2)) for _ in range(2))
    both = one + other
    assert torch.equal(both.table, one.table + other.table)
    assert torch.equal(both.dense(), dense_bias(both.table, (1, 2))[None])
    keep = torch.tensor([[True, False, True], [True, True, True]])
    masked = both + keep[:, None, None, :].expand(2, 1, 3, 3)
    assert torch.equal((keep[:, None, None, :] + both).key_mask, keep)
    assert torch.equal(torch.ones(2, 2, 3, 3) * both, torch.ones(2, 2, 3, 3) * both.dense())
    assert torch.equal((masked + one).key_mask, keep)
    assert torch.equal((one + masked).key_mask, keep)
    assert torch.equal(masked.dense().softmax(-1) > 0, keep[:, None, None, :].expand(2, 2, 3, 3))
    moved = masked.to("meta", non_blocking=True)
    assert moved.table.is_meta
    assert moved.key_mask.is_meta
    assert moved.window == (1, 2)
