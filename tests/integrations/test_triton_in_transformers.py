"""`attn_implementation="triton"` in Transformers' own BEiT and Data2VecVision after `register()`."""

import copy
import pickle

import pytest
import torch
import transformers

from beit_fast.integrations.transformers import register, unregister
from beit_fast.layers import attention_backends

from ..support.attention_spy import AttentionSpy
from ..support.oracle import relative_error
from ..support.transformers_reference import CLASSES, POSITIONS, TINY, main_output, random_inputs, randomize, scalar_of
from . import test_registration
from .test_registration import (
    BIASED,
    NEEDS_5,
    assert_same_gradients,
    count_tokens,
    rectangle_for,
    reference,
    triton_copy,
)

registered = test_registration.registered


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("name", CLASSES)
def test_triton_attention_equals_sdpa(name, position, registered):
    """Compare outputs, hidden states and every gradient.

    Each layer calls one fused operator, and a dense bias is never created.
    """
    theirs = reference(name, position)
    ours = triton_copy(theirs, name)
    inputs = random_inputs(name, theirs, rectangle_for(name))
    expected = theirs(**inputs, output_hidden_states=True)
    with AttentionSpy(count_tokens(inputs)) as spy:
        actual = ours(**inputs, output_hidden_states=True)
    layers = ours.config.num_hidden_layers
    assert (spy.calls, spy.tables) == (layers, layers if position in BIASED else 0)
    assert not spy.square
    for mine, wanted in zip(main_output(actual), main_output(expected), strict=True):
        assert relative_error(mine, wanted) < 1e-9
    for mine, wanted in zip(actual.hidden_states, expected.hidden_states, strict=True):
        assert relative_error(mine, wanted) < 1e-9
    scalar_of(expected).backward()
    scalar_of(actual).backward()
    assert_same_gradients(ours, theirs)


def test_triton_attention_lost_bias_changes_output(registered, monkeypatch):
    theirs = reference("BeitModel", "both")
    ours = triton_copy(theirs, "BeitModel")
    inputs = random_inputs("BeitModel", theirs)
    run_attention = attention_backends.run_attention
    monkeypatch.setattr(
        attention_backends,
        "run_attention",
        lambda backend, q, k, v, table, *others: run_attention(backend, q, k, v, None, *others),
    )
    assert relative_error(ours(**inputs).last_hidden_state, theirs(**inputs).last_hidden_state) > 1e-2


@NEEDS_5
@pytest.mark.parametrize("position", ["per layer", "both", "none"])
def test_set_attn_implementation_existing_model_uses_operator(position):
    """Switch an existing model to "triton", back to "sdpa", and unregister."""
    model = reference("BeitForImageClassification", position, "sdpa")
    inputs = random_inputs("BeitForImageClassification", model)
    expected = model(**inputs).logits
    register()
    try:
        model.set_attn_implementation("triton")
        with AttentionSpy(count_tokens(inputs)) as spy:
            actual = model(**inputs).logits
        assert (spy.calls, spy.square) == (3, [])
        assert relative_error(actual, expected) < 1e-9
        model.set_attn_implementation("sdpa")
        with AttentionSpy(count_tokens(inputs)) as spy:
            assert torch.equal(model(**inputs).logits, expected)
        assert spy.calls == 0
    finally:
        unregister()
    assert torch.equal(model(**inputs).logits, expected)


@NEEDS_5
@pytest.mark.parametrize("position", ["shared", "both", "none"])
def test_triton_attention_padding_mask_equals_eager(position, registered):
    """Compare with eager, because sdpa adds the bool mask to the bias."""
    theirs = reference("BeitModel", position, "eager")
    ours = triton_copy(theirs, "BeitModel")
    inputs = random_inputs("BeitModel", theirs)
    mask = torch.ones(2, count_tokens(inputs), dtype=torch.long)
    mask[0, -5:] = 0
    expected = theirs(**inputs, attention_mask=mask).last_hidden_state
    with AttentionSpy(count_tokens(inputs)) as spy:
        actual = ours(**inputs, attention_mask=mask).last_hidden_state
    assert (spy.calls, spy.square) == (3, [])
    assert relative_error(actual, expected) < 1e-6
    assert relative_error(actual, ours(**inputs).last_hidden_state) > 1e-3


@pytest.mark.parametrize("position", ["both", "none"])
def test_triton_attention_output_attentions_equals_eager(position, registered):
    theirs = reference("BeitModel", position, "eager")
    ours = triton_copy(theirs, "BeitModel")
    inputs = random_inputs("BeitModel", theirs)
    expected, actual = (model(**inputs, output_attentions=True) for model in (theirs, ours))
    assert len(actual.attentions) == 3
    for mine, wanted in zip(actual.attentions, expected.attentions, strict=True):
        assert relative_error(mine, wanted) < 1e-6
    assert relative_error(actual.last_hidden_state, expected.last_hidden_state) < 1e-6


@pytest.mark.parametrize("position", ["per layer", "shared"])
def test_triton_attention_rectangular_window_equals_sdpa(position, registered):
    """Read the table of a rectangle as (width, height), as Transformers does."""
    theirs = reference("BeitModel", position, image_size=(32, 48))
    ours = triton_copy(theirs, "BeitModel")
    inputs = random_inputs("BeitModel", theirs, size=(32, 48))
    with AttentionSpy(count_tokens(inputs)) as spy:
        actual = ours(**inputs).last_hidden_state
    assert (spy.calls, spy.square) == (3, [])
    assert relative_error(actual, theirs(**inputs).last_hidden_state) < 1e-9


def test_triton_attention_gradient_checkpointing_equals_sdpa(registered):
    theirs = reference("BeitForImageClassification", "both").train()
    ours = triton_copy(theirs, "BeitForImageClassification")
    ours.gradient_checkpointing_enable()
    inputs = random_inputs("BeitForImageClassification", theirs)
    theirs(**inputs).loss.backward()
    with AttentionSpy(count_tokens(inputs)) as spy:
        ours(**inputs).loss.backward()
    assert spy.calls == 2 * 3
    assert_same_gradients(ours, theirs)


def test_triton_attention_dropout_training_only(registered):
    theirs = reference("BeitModel", attention_probs_dropout_prob=0.5)
    ours = triton_copy(theirs, "BeitModel")
    inputs = random_inputs("BeitModel", theirs)
    still = ours(**inputs).last_hidden_state
    ours.train()
    first, second = (ours(**inputs).last_hidden_state for _ in range(2))
    assert not torch.equal(first, second)
    ours.eval()
    assert torch.equal(ours(**inputs).last_hidden_state, still)


def test_triton_attention_copy_and_pickle_equal_original(registered):
    theirs = reference("BeitModel", "both")
    ours = triton_copy(theirs, "BeitModel")
    inputs = random_inputs("BeitModel", theirs)
    expected = ours(**inputs).last_hidden_state
    for copied in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        with AttentionSpy(count_tokens(inputs)) as spy:
            assert torch.equal(copied(**inputs).last_hidden_state, expected)
        assert spy.calls == 3


@pytest.mark.slow
def test_triton_attention_compile_fullgraph_equals_uncompiled(registered):
    theirs = reference("BeitModel", "both")
    ours = triton_copy(theirs, "BeitModel")
    inputs = random_inputs("BeitModel", theirs)
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert relative_error(compiled(**inputs).last_hidden_state, ours(**inputs).last_hidden_state) < 1e-12


@pytest.mark.parametrize("position", BIASED)
def test_triton_attention_data2vec_vision_equals_eager(position, registered):
    values = {key: value for key, value in TINY.items() if key != "vocab_size"} | POSITIONS[position]
    build = transformers.Data2VecVisionForImageClassification._from_config
    theirs = build(transformers.Data2VecVisionConfig(**values), attn_implementation="eager").double().eval()
    randomize(theirs)
    ours = build(transformers.Data2VecVisionConfig(**values), attn_implementation="triton").double().eval()
    ours.load_state_dict(theirs.state_dict())
    ours = pickle.loads(pickle.dumps(ours))
    inputs = random_inputs("BeitForImageClassification", theirs, size=(32, 40))
    expected = theirs(**inputs)
    with AttentionSpy(count_tokens(inputs)) as spy:
        actual = ours(**inputs)
    assert (spy.calls, spy.tables, spy.square) == (3, 3, [])
    assert relative_error(actual.logits, expected.logits) < 1e-9
    expected.loss.backward()
    actual.loss.backward()
    assert_same_gradients(ours, theirs)
    weights = ours(**inputs, output_attentions=True).attentions
    wanted = theirs(**inputs, output_attentions=True).attentions
    assert all(relative_error(a, b) < 1e-9 for a, b in zip(weights, wanted, strict=True))


@NEEDS_5
def test_triton_attention_unsupported_model_raises(registered):
    vit = transformers.ViTModel._from_config(
        transformers.ViTConfig(
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=4,
            intermediate_size=32,
            image_size=32,
            patch_size=8,
        ),
        attn_implementation="triton",
    )
    with pytest.raises(ValueError, match="'triton' supports BEiT, not ViT"):
        vit(torch.randn(1, 3, 32, 32))
    unregister()
    model = reference("BeitModel")
    register()
    model.config._attn_implementation = "triton"
    with pytest.raises(ValueError, match=r"built before register\(\).*set_attn_implementation\('triton'\)"):
        model(torch.randn(1, 3, 32, 32, dtype=torch.float64))
