"""Class changes by `accelerate` and `restore`: replaced and unsupported modules, and reports."""

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
from ..support.models import align_parameters
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
def test_restore_returns_original_model_bitwise(name):
    theirs, ours = pair(name, "both")
    inputs = inputs_for(name, theirs)
    report = restore(ours)
    assert len(report.restored) == len(attentions(ours)) + len(biases(ours)) + layer_count(theirs)
    for mine, wanted in zip(ours.modules(), theirs.modules(), strict=True):
        assert type(mine) is type(wanted)
        assert vars(mine).keys() == vars(wanted).keys()
    assert_same(run(ours, inputs), run(theirs, inputs), 0.0)
    assert restore(ours).restored == []


def test_accelerate_keeps_names_parameters_and_base_classes():
    theirs = build(CLASSIFICATION, "both")
    parameters = dict(theirs.named_parameters())
    keys, modules = list(theirs.state_dict()), [(name, type(x)) for name, x in theirs.named_modules()]
    accelerate(theirs)
    assert list(theirs.state_dict()) == keys
    assert all(p is parameters[name] for name, p in theirs.named_parameters())
    assert all(isinstance(x, cls) for (_, x), (_, cls) in zip(theirs.named_modules(), modules, strict=True))


@pytest.mark.parametrize("name", ["BeitModel", "Data2VecVisionModel"])
def test_accelerate_copy_and_pickle_stay_accelerated(name):
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


@pytest.mark.parametrize("name", ["BeitModel", CLASSIFICATION, "UperNetForSemanticSegmentation"])
def test_save_pretrained_accelerated_writes_identical_files(name, tmp_path):
    theirs, ours = pair(name, "both", torch.float32)
    theirs.save_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "ours" / file).read_bytes() == (tmp_path / "theirs" / file).read_bytes(), file
    loaded = getattr(transformers, name).from_pretrained(tmp_path / "ours").eval()
    align_parameters(loaded)
    inputs = inputs_for(name, theirs)
    assert_same(run(loaded, inputs), run(theirs, inputs), 0.0)
    accelerate(loaded, "triton")
    assert_same(run(loaded, inputs), run(ours, inputs), 0.0)


@pytest.mark.skipif(IS_4, reason="4.57 cannot change the attention implementation of BEiT")
def test_set_attn_implementation_accelerated_equals_transformers():
    theirs, ours = pair("BeitModel", "both", attn_implementation="eager")
    inputs = inputs_for("BeitModel", theirs) | {"output_attentions": True}
    for model in (theirs, ours):
        model.set_attn_implementation("sdpa")
        assert model(**inputs).attentions == ()
        model.set_attn_implementation("eager")
        assert len(model(**inputs).attentions) == 3
    inputs.pop("output_attentions")
    assert_same(run(ours, inputs), run(theirs, inputs), 1e-6)


def test_accelerate_report_lists_replaced_and_already_fast():
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


def make_unsupported(model, how):
    """Change the class or forward of one layer of a `BeitModel`."""
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


UNSUPPORTED = {
    "a subclass": "is a MyAttention, a subclass of Beit",
    "a forward": "has a forward of its own",
    "a layer": "is a MyLayer, a subclass of BeitLayer with a forward of its own",
}


@pytest.mark.parametrize("how", UNSUPPORTED)
def test_accelerate_unsupported_model_raises_and_is_left_alone(how):
    model = build("BeitModel")
    make_unsupported(model, how)
    kinds = [type(x) for x in model.modules()]
    with pytest.raises(ValueError, match="cannot replace any") as error:
        accelerate(model)
    assert UNSUPPORTED[how] in str(error.value)
    assert [type(x) for x in model.modules()] == kinds


@pytest.mark.parametrize("how", UNSUPPORTED)
def test_accelerate_one_unsupported_of_two_is_left_alone(how):
    """Replace all biases and all attention of a model together, or none.

    A replaced bias returns a table, which only replaced attention can read.
    """
    changed, other = build("BeitModel", "shared"), build("Data2VecVisionModel", "shared")
    expected = run(changed, inputs_for("BeitModel", changed))
    make_unsupported(changed, how)
    both = nn.ModuleDict({"changed": changed, "other": other})
    report = accelerate(both, "triton")
    assert report.replaced
    assert all(name.startswith("other.") for name in report.replaced)
    assert all(name.startswith("changed.") for name in report.left_alone)
    assert sum(UNSUPPORTED[how] in reason for reason in report.left_alone.values()) == len(report.left_alone)
    assert "left alone" in str(report)
    if how != "a layer":
        assert_same(run(changed, inputs_for("BeitModel", changed)), expected, 0.0)


def test_accelerate_subclass_with_inherited_forward_is_replaced():
    """Accept a subclass that inherits the forward, as `fully_shard` creates it."""
    model = build("BeitModel")
    layer = layer_of(model, 1)
    layer.__class__ = type("FSDPBeitLayer", (type(layer),), {})
    assert len(accelerate(model).replaced) == 6


def test_accelerate_and_restore_unsupported_input_raises():
    for function in (accelerate, restore):
        with pytest.raises(ValueError, match="finds no BEiT layers in Sequential") as error:
            function(nn.Sequential(nn.Linear(2, 2), nn.GELU()))
        for name in ("BeitRelativePositionBias", "Data2VecVisionSelfAttention", "Found: GELU, Linear, Sequential"):
            assert name in str(error.value)
        with pytest.raises(TypeError, match=r"takes a torch.nn.Module, not a dict"):
            function({})
    with pytest.raises(ValueError, match="expected 'triton' or None"):
        accelerate(build("BeitModel"), "sdpa")


def test_accelerate_beit_fast_model_is_already_fast():
    values = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    ours = beit_fast.BeitModel(beit_fast.BeitConfig(**values, image_size=32, use_relative_position_bias=True))
    report = accelerate(ours)
    assert report.replaced == []
    assert len(report.already_fast) == 2
    assert "): part of beit_fast" in str(report)


def add_accelerate_hook(module):
    """Wrap the forward of an instance, as Hugging Face's accelerate does."""
    calls = []

    def forward(module, *args, **kwargs):
        calls.append(args)
        return module._old_forward(*args, **kwargs)

    module._old_forward = module.forward
    module.forward = functools.update_wrapper(functools.partial(forward, module), module._old_forward)
    return calls


@pytest.mark.parametrize("hooked_first", [True, False])
@pytest.mark.parametrize("name", ["BeitModel", "Data2VecVisionModel"])
def test_accelerate_with_device_hooks_equals_transformers(name, hooked_first):
    theirs = build(name, "both").double()
    ours = copy.deepcopy(theirs)
    inputs = inputs_for(name, theirs)
    expected = run(theirs, inputs)
    if hooked_first:
        calls = [add_accelerate_hook(x) for x in ours.modules()]
    report = accelerate(ours, "triton")
    if not hooked_first:
        calls = [add_accelerate_hook(x) for x in ours.modules()]
    with Spy(heads=4, tokens=17) as spy:
        assert_same(run(ours, inputs), expected)
    assert spy.forward_calls == layer_count(theirs)
    assert len(report.left_alone) == 0
    assert all(called for called, module in zip(calls, ours.modules(), strict=True) if module in biases(ours))
    restore(ours)
    with Spy(heads=4, tokens=17) as spy:
        assert_same(run(ours, inputs), expected, 0.0)
    assert spy.forward_calls == 0


def test_restore_changed_class_raises():
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


def test_accelerate_replaced_projection_is_called():
    """Call a module that replaces a linear layer, as PEFT does."""
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


def test_fused_layers_cover_transformers_classes():
    """Fail if a later version of Transformers renames a class."""
    assert modeling_beit.BeitRelativePositionBias in fused_layers.FUSED
    names = {cls.__name__ for cls in fused_layers.FUSED}
    split = {"BeitSelfAttention", "BeitSdpaSelfAttention"}
    assert (split if IS_4 else {"BeitAttention"}) <= names
    assert {"Data2VecVisionSelfAttention", "Data2VecVisionSdpaSelfAttention"} <= names


@pytest.mark.parametrize("installed", [None, "4.56.2"])
def test_import_missing_or_old_transformers_raises(installed, monkeypatch):
    monkeypatch.delitem(sys.modules, "beit_fast.integrations.transformers")
    if installed is None:
        monkeypatch.setitem(sys.modules, "transformers", None)
    else:
        monkeypatch.setattr(sys.modules["transformers"], "__version__", installed)
    with pytest.raises(ImportError, match=r"needs Transformers 4\.57 or later"):
        importlib.import_module("beit_fast.integrations.transformers")
