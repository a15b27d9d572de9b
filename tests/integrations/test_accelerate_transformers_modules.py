"""Exchanging the classes of modules: what stays, what goes back, what is left alone and what is said of it."""

from __future__ import annotations

import copy
import functools
import importlib
import pickle
import sys
import types

import pytest
import torch
import transformers
from torch import nn
from transformers.models.beit import modeling_beit

import beit_fast
from beit_fast.integrations.transformers import accelerate, fused_layers, restore

from ..support.devices import CPU_ATTENTION
from ..support.transformers_models import (
    DENSE,
    IS_4,
    Spy,
    assert_same,
    attentions,
    biases,
    build,
    inputs_for,
    layer_count,
    layer_of,
    pair,
    run,
)

CLASSIFICATION = "BeitForImageClassification"


@pytest.mark.parametrize("name", ["BeitModel", "Data2VecVisionModel", *DENSE])
def test_restore_gives_back_the_model_bit_for_bit(name):
    theirs, ours = pair(name, "both")
    inputs = inputs_for(name, theirs)
    report = restore(ours)
    assert len(report.restored) == len(attentions(ours)) + len(biases(ours)) + layer_count(theirs)
    for mine, wanted in zip(ours.modules(), theirs.modules(), strict=True):
        assert type(mine) is type(wanted)
        assert vars(mine).keys() == vars(wanted).keys()
    assert_same(run(ours, inputs), run(theirs, inputs), 0.0)
    assert restore(ours).restored == []


def test_names_parameters_and_classes_stay():
    theirs = build(CLASSIFICATION, "both")
    parameters = dict(theirs.named_parameters())
    keys, modules = list(theirs.state_dict()), [(name, type(x)) for name, x in theirs.named_modules()]
    accelerate(theirs)
    assert list(theirs.state_dict()) == keys
    assert all(p is parameters[name] for name, p in theirs.named_parameters())
    assert all(isinstance(x, cls) for (_, x), (_, cls) in zip(theirs.named_modules(), modules, strict=True))


@pytest.mark.parametrize("name", ["BeitModel", "Data2VecVisionModel"])
def test_copies_and_pickles_are_accelerated_too(name):
    theirs, ours = pair(name, "both")
    inputs = inputs_for(name, theirs)
    expected = run(ours, inputs)
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert [type(x) for x in other.modules()] == [type(x) for x in ours.modules()]
        with Spy(heads=4, tokens=17) as spy:
            assert_same(run(other, inputs), expected, 0.0)
        assert spy.forward_calls == layer_count(theirs)
        restore(other)
    assert all(type(x) in fused_layers.ORIGINALS for x in biases(ours))


@pytest.mark.parametrize("name", [CLASSIFICATION, "UperNetForSemanticSegmentation"])
def test_saved_models_are_the_same_files(name, tmp_path):
    theirs, ours = pair(name, "both", torch.float32)
    theirs.save_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "ours" / file).read_bytes() == (tmp_path / "theirs" / file).read_bytes(), file
    loaded = getattr(transformers, name).from_pretrained(tmp_path / "ours").eval()
    for parameter in loaded.parameters():  # read from a file they are not aligned, and a GEMM may then round otherwise
        parameter.data = parameter.data.clone()
    inputs = inputs_for(name, theirs)
    assert_same(run(loaded, inputs), run(theirs, inputs), 0.0)
    accelerate(loaded, "triton")
    assert_same(run(loaded, inputs), run(ours, inputs), 0.0)


@pytest.mark.skipif(IS_4, reason="4.57 cannot change the attention of BEiT")
def test_set_attn_implementation_goes_on_working():
    theirs, ours = pair("BeitModel", "both", attn_implementation="eager")
    inputs = inputs_for("BeitModel", theirs) | {"output_attentions": True}
    for model in (theirs, ours):
        model.set_attn_implementation("sdpa")
        assert model(**inputs).attentions == ()
        model.set_attn_implementation("eager")
        assert len(model(**inputs).attentions) == 3
    inputs.pop("output_attentions")
    assert_same(run(ours, inputs), run(theirs, inputs), 1e-6)


def test_the_report_of_a_first_and_a_second_call():
    model = build(CLASSIFICATION)
    report = accelerate(model, "triton")
    assert len(report.replaced) == 6
    assert report.left_alone == {}
    text = str(report)
    assert text.startswith("BeitForImageClassification\n")
    assert "replaced: 3 BeitRelativePositionBias" in text
    assert f"attention on cpu in torch.float32, head dimension 8: {CPU_ATTENTION}" in text
    again = accelerate(model)
    assert again.replaced == []
    assert again.already_fast == report.replaced
    assert "already fast: 3 BeitRelativePositionBias" in str(again)
    assert {x.attn_implementation for x in attentions(model)} == {None}
    assert "restored: 3 BeitRelativePositionBias" in str(restore(model))
    assert "nothing to do" in str(restore(model))
    assert "chosen at the call" in str(accelerate(model.to("meta")))


def spoil(model, how):
    """Make one layer of a `BeitModel` what Transformers did not write."""
    layer = layer_of(model, 1)
    module = layer.attention.attention if IS_4 else layer.attention
    if how == "a subclass":
        module.__class__ = type("MyAttention", (type(module),), {})
    elif how == "a forward":
        module.forward = types.MethodType(
            lambda self, *args, **kwargs: type(self).forward(self, *args, **kwargs), module
        )
    else:
        layer.__class__ = type("MyLayer", (type(layer),), {"forward": lambda self, x, *args, **kwargs: x})


SPOILT = {
    "a subclass": "is a MyAttention, a subclass of Beit",
    "a forward": "has a forward of its own",
    "a layer": "is a MyLayer, a subclass of BeitLayer with a forward of its own",
}


@pytest.mark.parametrize("how", SPOILT)
def test_a_model_that_is_unlike_transformers_is_left_alone(how):
    model = build("BeitModel")
    spoil(model, how)
    kinds = [type(x) for x in model.modules()]
    with pytest.raises(ValueError, match="cannot replace any") as error:
        accelerate(model)
    assert SPOILT[how] in str(error.value)
    assert [type(x) for x in model.modules()] == kinds


@pytest.mark.parametrize("how", SPOILT)
def test_one_of_two_models_is_left_alone(how):
    """All biases and all attention of a model go together: one that gives a table needs all that take one."""
    spoilt, other = build("BeitModel", "shared"), build("Data2VecVisionModel", "shared")
    expected = run(spoilt, inputs_for("BeitModel", spoilt))
    spoil(spoilt, how)
    both = nn.ModuleDict({"spoilt": spoilt, "other": other})
    report = accelerate(both, "triton")
    assert report.replaced
    assert all(name.startswith("other.") for name in report.replaced)
    assert all(name.startswith("spoilt.") for name in report.left_alone)
    assert sum(SPOILT[how] in reason for reason in report.left_alone.values()) == len(report.left_alone)
    assert "left alone" in str(report)
    if how != "a layer":
        assert_same(run(spoilt, inputs_for("BeitModel", spoilt)), expected, 0.0)


def test_a_layer_whose_class_was_only_renamed_is_replaced():
    """As fully_shard does: a subclass with the forward of Transformers."""
    model = build("BeitModel")
    layer = layer_of(model, 1)
    layer.__class__ = type("FSDPBeitLayer", (type(layer),), {})
    assert len(accelerate(model).replaced) == 6


def test_models_without_such_layers_are_refused_by_name():
    for function in (accelerate, restore):
        with pytest.raises(ValueError, match="finds no BEiT layers in Sequential") as error:
            function(nn.Sequential(nn.Linear(2, 2), nn.GELU()))
        for name in ("BeitRelativePositionBias", "Data2VecVisionSelfAttention", "Found: GELU, Linear, Sequential"):
            assert name in str(error.value)
        with pytest.raises(TypeError, match=r"takes a torch.nn.Module, not a dict"):
            function({})
    with pytest.raises(ValueError, match="expected 'triton' or None"):
        accelerate(build("BeitModel"), "sdpa")


def test_our_own_layers_are_fast_already():
    values = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    ours = beit_fast.BeitModel(beit_fast.BeitConfig(**values, image_size=32, use_relative_position_bias=True))
    report = accelerate(ours)
    assert report.replaced == []
    assert len(report.already_fast) == 2
    assert "is a layer of beit_fast" in str(report)


def hook_as_accelerate_does(module):
    """What Hugging Face's accelerate puts on modules that it places: a forward of the instance around the class's."""
    calls = []

    def forward(module, *args, **kwargs):
        calls.append(args)
        return module._old_forward(*args, **kwargs)

    module._old_forward = module.forward
    module.forward = functools.update_wrapper(functools.partial(forward, module), module._old_forward)
    return calls


@pytest.mark.parametrize("hooked_first", [True, False])
@pytest.mark.parametrize("name", ["BeitModel", "Data2VecVisionModel"])
def test_placed_by_accelerate_before_or_after(name, hooked_first):
    theirs = build(name, "both").double()
    ours = copy.deepcopy(theirs)
    inputs = inputs_for(name, theirs)
    expected = run(theirs, inputs)
    if hooked_first:
        calls = [hook_as_accelerate_does(x) for x in ours.modules()]
    report = accelerate(ours, "triton")
    if not hooked_first:
        calls = [hook_as_accelerate_does(x) for x in ours.modules()]
    with Spy(heads=4, tokens=17) as spy:
        assert_same(run(ours, inputs), expected)
    assert spy.forward_calls == layer_count(theirs)
    assert len(report.left_alone) == 0
    assert all(called for called, module in zip(calls, ours.modules(), strict=True) if module in biases(ours))
    restore(ours)
    with Spy(heads=4, tokens=17) as spy:
        assert_same(run(ours, inputs), expected, 0.0)
    assert spy.forward_calls == 0


def test_restore_refuses_what_was_changed_since():
    model = build("BeitModel")
    accelerate(model)
    module = biases(model)[0]
    accelerated = type(module)
    module.__class__ = type("Sharded", (accelerated,), {})
    kinds = [type(x) for x in model.modules()]
    with pytest.raises(ValueError, match="is a Sharded now"):
        restore(model)
    assert [type(x) for x in model.modules()] == kinds
    assert len(accelerate(model).already_fast) == 6


def test_a_projection_that_was_replaced_is_called():
    """As PEFT does: what stands in the place of a linear layer counts."""
    theirs, ours = pair("BeitModel")

    class Doubled(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base = base

        def forward(self, x):
            return 2 * self.base(x)

    for model in (theirs, ours):
        module = layer_of(model, 0).attention
        module, key = (module.attention, "query") if IS_4 else (module, "q_proj")
        setattr(module, key, Doubled(getattr(module, key)))
    inputs = inputs_for("BeitModel", theirs)
    assert_same(run(ours, inputs), run(theirs, inputs))


def test_only_transformers_own_classes_are_known():
    """A class that Transformers renames in a later version must not go unnoticed."""
    assert modeling_beit.BeitRelativePositionBias in fused_layers.FUSED
    names = {cls.__name__ for cls in fused_layers.FUSED}
    split = {"BeitSelfAttention", "BeitSdpaSelfAttention"}
    assert (split if IS_4 else {"BeitAttention"}) <= names
    assert {"Data2VecVisionSelfAttention", "Data2VecVisionSdpaSelfAttention"} <= names


@pytest.mark.parametrize("installed", [None, "4.56.2"])
def test_a_missing_or_old_transformers_is_named(installed, monkeypatch):
    monkeypatch.delitem(sys.modules, "beit_fast.integrations.transformers")
    if installed is None:
        monkeypatch.setitem(sys.modules, "transformers", None)
    else:
        monkeypatch.setattr(sys.modules["transformers"], "__version__", installed)
    with pytest.raises(ImportError, match=r"needs Transformers 4\.57 or later"):
        importlib.import_module("beit_fast.integrations.transformers")
