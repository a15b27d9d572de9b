"""`accelerate` on Transformers' models: equal results from the fused operator.

`tests/versions` runs the same tests on Transformers 4.57.
"""

from __future__ import annotations

import copy

import pytest
import torch

import beit_fast
from beit_fast.integrations.transformers import accelerate, fused_layers
from beit_fast.integrations.transformers.table_bias import TableBias
from beit_fast.layers import attention_backends
from beit_fast.ops.dispatch import attention, availability

from ..support.oracle import assert_within_budget, relative_error
from ..support.transformers_models import (
    ALL,
    FP32_PARITY,
    IS_4,
    Spy,
    assert_same,
    build,
    inputs_for,
    layer_count,
    pair,
    run,
    sizes_for,
)
from ..support.transformers_reference import POSITIONS

CLASSIFICATION = "BeitForImageClassification"


@pytest.mark.parametrize("position", ["per layer", "both"])
@pytest.mark.parametrize("name", ALL)
def test_accelerate_outputs_and_gradients_equal_transformers(name, position):
    theirs, ours = pair(name, position)
    for size in sizes_for(name):
        inputs = inputs_for(name, theirs, size)
        assert_same(run(ours, inputs), run(theirs, inputs))


@pytest.mark.parametrize("position", ["shared", "absolute", "none"])
@pytest.mark.parametrize("name", ["BeitModel", "Data2VecVisionModel"])
def test_accelerate_every_position_kind_equals_transformers(name, position):
    theirs, ours = pair(name, position)
    for size in sizes_for(name):
        inputs = inputs_for(name, theirs, size)
        assert_same(run(ours, inputs), run(theirs, inputs))


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", [CLASSIFICATION, "Data2VecVisionForImageClassification"])
def test_accelerate_fp32_equals_transformers(name, attn_implementation):
    theirs, ours = pair(name, "both", torch.float32, attn_implementation=attn_implementation)
    for size in sizes_for(name):
        inputs = inputs_for(name, theirs, size)
        assert_same(run(ours, inputs), run(theirs, inputs), FP32_PARITY)


@pytest.mark.parametrize("name", ["BeitModel", "Data2VecVisionModel"])
@pytest.mark.parametrize("position", ["per layer", "both"])
def test_accelerate_rectangular_window_equals_transformers(name, position):
    """Read the table of a rectangle as (width, height), as Transformers does.

    Models trained with Transformers depend on this order.
    """
    theirs, ours = pair(name, position, image_size=[24, 48])
    for size in ((24, 48), (48, 24), (40, 32)):
        inputs = inputs_for(name, theirs, size)
        assert_same(run(ours, inputs), run(theirs, inputs))


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("name", ["BeitModel", "Data2VecVisionModel"])
def test_accelerate_training_with_dropout_equals_transformers(name, position):
    """Draw the same random numbers for drop path and hidden dropout."""
    theirs, ours = pair(name, position, drop_path_rate=0.4, hidden_dropout_prob=0.2)
    inputs = inputs_for(name, theirs)
    assert_same(run(ours.train(), inputs), run(theirs.train(), inputs))


@pytest.mark.parametrize("options", [{}, {"use_reentrant": True}], ids=["default", "reentrant"])
@pytest.mark.parametrize("name", ["BeitModel", "Data2VecVisionModel"])
def test_accelerate_gradient_checkpointing_equals_transformers(name, options):
    theirs, ours = pair(name, "per layer", drop_path_rate=0.4)
    inputs = inputs_for(name, theirs, (48, 40))
    expected = run(theirs.train(), inputs)
    ours.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options or None)
    with Spy(heads=4, tokens=31) as spy:
        assert_same(run(ours.train(), inputs), expected)
    assert spy.forward_calls == 2 * spy.backward_calls == 2 * layer_count(theirs)


def test_accelerate_checkpointed_shared_bias_equals_transformers():
    theirs, ours = pair("BeitModel", "both")
    inputs = inputs_for("BeitModel", theirs, (48, 40))
    ours.gradient_checkpointing_enable()
    assert_same(run(ours.train(), inputs), run(theirs.train(), inputs))


@pytest.mark.parametrize("position", ["both", "none"])
@pytest.mark.parametrize("name", ALL)
def test_accelerate_calls_operator_once_per_layer_without_dense_bias(name, position):
    theirs, ours = pair(name, position)
    size = sizes_for(name)[-1]
    inputs = inputs_for(name, theirs, size)
    with Spy(heads=4, tokens=size[0] // 8 * (size[1] // 8) + 1) as spy:
        run(ours, inputs)
    assert spy.forward_calls == layer_count(theirs)
    # Segmentation does not use the last two layers.
    assert layer_count(theirs) - 2 <= spy.backward_calls <= layer_count(theirs)
    assert spy.dense == []


def test_spy_transformers_model_records_dense_bias():
    theirs = build("BeitModel", "both")
    with Spy(heads=4, tokens=17) as spy:
        run(theirs, inputs_for("BeitModel", theirs))
    assert spy.dense
    assert spy.forward_calls == 0


@pytest.mark.parametrize("name", [CLASSIFICATION, "Data2VecVisionForImageClassification"])
@pytest.mark.parametrize("mutation", ["no bias", "no shared bias"])
def test_accelerate_lost_bias_is_detected(name, mutation, monkeypatch):
    theirs, ours = pair(name, "both")
    inputs = inputs_for(name, theirs)
    if mutation == "no bias":
        resize = fused_layers.resize_table
        monkeypatch.setattr(fused_layers, "resize_table", lambda *args: 0 * resize(*args))
    else:
        monkeypatch.setattr(TableBias, "__add__", lambda self, other: self)
    with pytest.raises(AssertionError):
        assert_same(run(ours, inputs, False), run(theirs, inputs, False), 1e-2)


def test_accelerate_default_implementation_uses_fused_kernel():
    theirs, ours = pair(implementation=None)
    with Spy(heads=4, tokens=17) as spy:
        run(ours, inputs_for(CLASSIFICATION, theirs))
    fused = availability.is_fused(availability.serving_kernel(torch.device("cpu"), torch.float64, 8))
    assert spy.forward_calls == (layer_count(theirs) if fused else 0)


@pytest.fixture
def no_kernel(monkeypatch):
    attention._decide.cache_clear()
    monkeypatch.setattr(availability, "serving_kernel", lambda *args: None)
    monkeypatch.setattr(availability, "attention_unsupported_reasons", lambda *args: ("disabled by the test",))
    yield
    attention._decide.cache_clear()


@pytest.mark.usefixtures("no_kernel")
@pytest.mark.parametrize("position", ["both", "none"])
def test_accelerate_without_kernel_default_is_dense_and_triton_raises(position):
    theirs, ours = pair(position=position, implementation=None)
    inputs = inputs_for(CLASSIFICATION, theirs)
    assert_same(run(ours, inputs), run(theirs, inputs))
    report = accelerate(ours, "triton")
    assert "disabled by the test" in str(report)
    with pytest.raises(ValueError, match="disabled by the test"):
        ours(**inputs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_accelerate_half_precision_error_within_budget(dtype):
    exact = build(position="both", name=CLASSIFICATION).double()
    inputs = inputs_for(CLASSIFICATION, exact)
    theirs, ours = pair(position="both", dtype=dtype)
    halves = inputs | {"pixel_values": inputs["pixel_values"].to(dtype)}
    reference, plain, mine = (run(model, x, False) for model, x in ((exact, inputs), (theirs, halves), (ours, halves)))
    assert_within_budget("logits", mine["output 1"], reference["output 1"], plain["output 1"], 1.5, dtype)


def test_accelerate_autocast_error_within_budget():
    theirs, ours = pair(position="both", dtype=torch.float32)
    inputs = inputs_for(CLASSIFICATION, theirs)
    exact = run(copy.deepcopy(theirs).double(), inputs | {"pixel_values": inputs["pixel_values"].double()}, False)
    with torch.autocast("cpu", torch.bfloat16):
        plain, mine = run(theirs, inputs, False), run(ours, inputs, False)
    assert mine["output 1"].dtype == plain["output 1"].dtype
    assert_within_budget("logits", mine["output 1"], exact["output 1"], plain["output 1"], 1.5, torch.bfloat16)


@pytest.mark.parametrize("name", ["BeitModel", "Data2VecVisionModel"])
def test_accelerate_attention_dropout_training_only(name, monkeypatch):
    _, ours = pair(name, attention_probs_dropout_prob=0.25)
    drawn = []

    def record(q, k, v, table, window, key_mask, scale, dropout_p, seed):
        drawn.append((dropout_p, seed))
        return beit_fast.rel_pos_attention(q, k, v, table, window, key_mask, scale, dropout_p, seed)

    monkeypatch.setattr(attention_backends, "rel_pos_attention", record)
    inputs = inputs_for(name, ours)
    first, again = run(ours.train(), inputs), run(ours.train(), inputs)
    assert {p for p, _ in drawn} == {0.25}
    assert len({seed for _, seed in drawn}) == layer_count(ours)
    assert_same(again, first, 0.0)
    ours.gradient_checkpointing_enable()
    assert_same(run(ours, inputs), first)
    ours.gradient_checkpointing_disable()
    drawn.clear()
    run(ours.eval(), inputs)
    assert {p for p, _ in drawn} == {0.0}


@pytest.mark.skipif(IS_4, reason="4.57 does not have head_dim")
def test_accelerate_configured_head_dim_equals_transformers():
    theirs, ours = pair("BeitModel", "both", head_dim=16)
    assert ours.layers[0].attention.head_dim == 16
    inputs = inputs_for("BeitModel", theirs)
    assert_same(run(ours, inputs), run(theirs, inputs))


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("position", ["both", "none"])
@pytest.mark.parametrize("name", ["BeitModel", "Data2VecVisionModel"])
def test_accelerate_output_attentions_equals_transformers(name, position, attn_implementation):
    theirs, ours = pair(name, position, attn_implementation=attn_implementation)
    inputs = inputs_for(name, theirs) | {"output_attentions": True, "output_hidden_states": True}
    expected, actual = theirs(**inputs), ours(**inputs)
    assert len(actual.attentions) == len(expected.attentions)
    for mine, wanted in zip(actual.attentions, expected.attentions, strict=True):
        assert (mine is None) == (wanted is None)
        assert mine is None or relative_error(mine, wanted) <= 1e-6
    assert_same(run(ours, inputs), run(theirs, inputs), 1e-6)


@pytest.mark.skipif(IS_4, reason="4.57 reads output_attentions from the call only")
def test_accelerate_output_attentions_in_config_equals_transformers():
    theirs, ours = pair("BeitModel", attn_implementation="eager")
    for model in (theirs, ours):
        model.config.output_attentions = True
    inputs = inputs_for("BeitModel", theirs)
    for mine, wanted in zip(ours(**inputs).attentions, theirs(**inputs).attentions, strict=True):
        assert relative_error(mine, wanted) <= 1e-6
