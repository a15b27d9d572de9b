"""Modules and methods of Transformers that are changed after `accelerate`: results stay Transformers'."""

from __future__ import annotations

import copy
import importlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.beit import modeling_beit
from transformers.models.data2vec import modeling_data2vec_vision

from beit_fast.integrations.transformers import accelerate, register, restore, unregister

from ..support.attention_spy import AttentionSpy
from ..support.transformers_models import IS_4, assert_same, biases, build, inputs_for, layer_count, pair, run

NAMES = ["BeitModel", "Data2VecVisionModel"]
MODELING = {"BeitModel": modeling_beit, "Data2VecVisionModel": modeling_data2vec_vision}


class OwnBias(nn.Module):
    """A dense bias of a user's own class."""

    def __init__(self, heads):
        super().__init__()
        torch.manual_seed(3)
        self.bias = nn.Parameter(torch.randn(1, heads, 17, 17, dtype=torch.float64))

    def forward(self, *args, **kwargs):
        return 2 * self.bias


class OwnAttention(nn.Module):
    """An attention of a user's own class."""

    def __init__(self, attention):
        super().__init__()
        self.attention = attention

    def forward(self, *args, **kwargs):
        out = self.attention(*args, **kwargs)
        return (2 * out[0], *out[1:])


def fused_calls(model, inputs):
    with torch.no_grad(), AttentionSpy(17) as spy:
        model(**inputs)
    return spy.calls


def layers_of(model):
    return model.layers if hasattr(model, "layers") else model.encoder.layer


def library_copy(module):
    copied = copy.deepcopy(module)
    if any("beit_fast" in type(part).__module__ for part in copied.modules()):
        restore(copied)
    return copied


def replace_bias(model, bias, replacement):
    path = next(path for path, module in model.named_modules() if module is bias)
    owner, _, name = path.rpartition(".")
    setattr(model.get_submodule(owner), name, replacement)


def bias_of_a_user(model):
    replace_bias(model, biases(model)[0], OwnBias(model.config.num_attention_heads))


def last_bias_of_a_user(model):
    replace_bias(model, biases(model)[-1], OwnBias(model.config.num_attention_heads))


def bias_of_transformers(model):
    replace_bias(model, biases(model)[0], library_copy(biases(model)[0]))


def attention_of_transformers(model):
    layers_of(model)[1].attention = library_copy(layers_of(model)[1].attention)


def attention_of_a_user(model):
    layers_of(model)[1].attention = OwnAttention(library_copy(layers_of(model)[1].attention))


def layer_of_transformers(model):
    layers_of(model)[1] = library_copy(layers_of(model)[1])


def attention_with_its_own_forward(model):
    attention = layers_of(model)[1].attention
    forward = attention.forward

    def doubled(*args, **kwargs):
        out = forward(*args, **kwargs)
        return (2 * out[0], *out[1:])

    attention.forward = doubled


REPLACED = [
    bias_of_a_user,
    last_bias_of_a_user,
    bias_of_transformers,
    attention_of_transformers,
    attention_of_a_user,
    layer_of_transformers,
    attention_with_its_own_forward,
]


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("position", ["per layer", "both"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("change", REPLACED)
def test_module_replaced_after_accelerate_equals_transformers(change, name, position, heads):
    theirs, ours = pair(name, position, num_attention_heads=heads)
    inputs = inputs_for(name, theirs)
    before = fused_calls(ours, inputs)
    change(theirs)
    change(ours)
    assert_same(run(ours, inputs), run(theirs, inputs))
    kept = layer_count(theirs) - (change is not attention_with_its_own_forward)
    assert fused_calls(ours, inputs) <= kept < before + 1 == layer_count(theirs) + 1


@pytest.mark.parametrize("name", NAMES)
def test_report_names_bias_that_replaced_an_accelerated_one(name):
    _, ours = pair(name, "per layer")
    bias_of_a_user(ours)
    reasons = [text for text in accelerate(ours).named("already fast").values() if text]
    assert reasons == [
        f"takes the dense bias of a {__name__}.OwnBias; Transformers' own attention runs until this changes"
    ]
    assert len(restore(ours).restored) == 2 * layer_count(ours) - 1


def index_of_another_order(plain):
    return lambda *args: plain(*args).flip(0)


def patch_index_of_instance(model, name, patch):
    bias = biases(model)[0]
    bias.generate_relative_position_index = index_of_another_order(bias.generate_relative_position_index)


def patch_class(model, name, patch, kind, method, change):
    owner = getattr(MODELING[name], f"{name.removesuffix('Model')}{kind}")
    plain = getattr(owner, method)
    patch.setattr(owner, method, change(plain))


def patch_index_of_class(model, name, patch):
    def change(plain):
        changed = index_of_another_order(plain)
        return changed if IS_4 else staticmethod(changed)

    patch_class(model, name, patch, "RelativePositionBias", "generate_relative_position_index", change)


def patch_bias_forward(model, name, patch):
    def change(plain):
        return lambda self, *args, **kwargs: 2 * plain(self, *args, **kwargs)

    patch_class(model, name, patch, "RelativePositionBias", "forward", change)


def patch_attention_forward(model, name, patch):
    def change(plain):
        def doubled(self, *args, **kwargs):
            out = plain(self, *args, **kwargs)
            return (2 * out[0], *out[1:])

        return doubled

    joined = name == "BeitModel" and not hasattr(modeling_beit, "BeitSelfAttention")
    patch_class(model, name, patch, "Attention" if joined else "SdpaSelfAttention", "forward", change)


def patch_sdpa(model, name, patch):
    plain = F.scaled_dot_product_attention
    patch.setattr(F, "scaled_dot_product_attention", lambda *args, **kwargs: 2 * plain(*args, **kwargs))


CODE = {
    patch_index_of_instance: "generate_relative_position_index that is not the library's",
    patch_index_of_class: "generate_relative_position_index that is not the library's",
    patch_bias_forward: "has a forward that is not the library's",
    patch_attention_forward: "has a forward that is not the library's",
    patch_sdpa: "scaled_dot_product_attention that is not torch's",
}


@pytest.mark.parametrize("position", ["per layer", "both"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("change", CODE)
def test_code_of_transformers_patched_after_accelerate_equals_transformers(change, name, position, monkeypatch):
    """Each change gives another result, so that ignoring it fails the comparison."""
    theirs, ours = pair(name, position)
    inputs = inputs_for(name, theirs)
    before = theirs(**inputs).last_hidden_state
    with monkeypatch.context() as patch:
        change(theirs, name, patch)
        if change is patch_index_of_instance:
            change(ours, name, patch)
        assert not torch.allclose(theirs(**inputs).last_hidden_state, before, atol=1e-4)
        assert_same(run(ours, inputs), run(theirs, inputs))
        assert fused_calls(ours, inputs) < layer_count(theirs)
        assert CODE[change] in str(accelerate(ours, "triton"))
    if change is not patch_index_of_instance:
        assert fused_calls(ours, inputs) == layer_count(theirs)
        assert not any(accelerate(ours, "triton").named("already fast").values())


@pytest.mark.parametrize("change", [patch_index_of_instance, patch_index_of_class])
def test_index_patched_under_register_equals_transformers(change, monkeypatch):
    register()
    try:
        ours = build("BeitModel", "both", "triton").double()
        theirs = build("BeitModel", "both", "sdpa").double()
        theirs.load_state_dict(ours.state_dict())
        for model in (theirs, ours)[: 2 if change is patch_index_of_instance else 1]:
            change(model, "BeitModel", monkeypatch)
        assert_same(run(ours, inputs_for("BeitModel", ours)), run(theirs, inputs_for("BeitModel", ours)))
    finally:
        unregister()


def test_accelerated_model_stays_fused_under_register():
    _, ours = pair("BeitModel", "both")
    register()
    try:
        assert fused_calls(ours, inputs_for("BeitModel", ours)) == layer_count(ours)
    finally:
        unregister()


@pytest.mark.skipif(hasattr(modeling_beit, "BeitSelfAttention"), reason="split layers have no attention functions")
def test_attention_function_of_a_user_is_called():
    functions = importlib.import_module("transformers").AttentionInterface

    def doubled(*args, **kwargs):
        out, weights = modeling_beit.eager_attention_forward(*args, **kwargs)
        return 2 * out, weights

    functions.register("doubled", doubled)
    try:
        theirs, ours = pair("BeitModel", "both")
        for model in (theirs, ours):
            model.config._attn_implementation = "doubled"
        inputs = inputs_for("BeitModel", ours)
        assert_same(run(ours, inputs), run(theirs, inputs), 1e-6)
        assert fused_calls(ours, inputs) == 0
        wanted = "has an attention function for 'doubled' that is not Transformers' eager or sdpa"
        assert wanted in str(accelerate(ours, "triton"))
    finally:
        functions._global_mapping.pop("doubled")


def test_restore_wrapped_forward_raises():
    _, ours = pair("BeitModel", "both")
    attention = layers_of(ours)[1].attention
    attention = attention.attention if hasattr(attention, "attention") else attention
    attention.forward = lambda *args, **kwargs: None
    with pytest.raises(ValueError, match=r"has a forward of its own"):
        restore(ours)
    assert "has a forward of its own; Transformers' own attention runs" in str(accelerate(ours))
