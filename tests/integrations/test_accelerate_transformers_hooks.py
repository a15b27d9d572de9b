"""Hooks on accelerated models and on Transformers' `"triton"` see what Transformers shows."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from beit_fast.integrations.transformers import accelerate, register, unregister

from ..support.attention_spy import AttentionSpy
from ..support.oracle import relative_error
from ..support.transformers_models import IS_4, assert_same, biases, build, inputs_for, layer_count, pair, run

NAMES = ["BeitModel", "Data2VecVisionModel"]
POSITIONS = ["per layer", "shared", "both"]
GLOBAL = nn.modules.module
BIAS_HOOKS = {
    "reads": lambda module, args, out: None,
    "doubles": lambda module, args, out: 2 * out,
    "zero": lambda module, args, out: out * 0,
}


@pytest.fixture(params=["accelerated", "registered"])
def models(request):
    """Build Transformers' model and a fast copy of it, in fp64.

    The model has sdpa, but with `shown` what a registered model replaces: eager attention in split layers.
    """

    def built(name, position, shown=False, **options):
        if request.param == "accelerated":
            return pair(name, position, **options)
        split = IS_4 or name != "BeitModel"
        theirs = build(name, position, "eager" if shown and split else "sdpa", **options).double()
        ours = build(name, position, "triton", **options).double()
        ours.load_state_dict(theirs.state_dict())
        return theirs, ours

    if request.param == "registered":
        register()
    yield built
    unregister()


def fused_calls(model, inputs):
    with torch.no_grad(), AttentionSpy(17) as spy:
        model(**inputs)
    return spy.calls


def leaves_of(value):
    """List tensors and other values of what a hook saw."""
    leaves = torch.utils._pytree.tree_leaves(value)
    return [x for x in leaves if isinstance(x, (torch.Tensor, int, bool, str)) or type(x).__module__ != "builtins"]


def assert_same_values(mine, theirs):
    assert [type(x) for x in mine] == [type(x) for x in theirs]
    for value, wanted in zip(mine, theirs, strict=True):
        if isinstance(value, torch.Tensor):
            assert value.shape == wanted.shape
            assert relative_error(value, wanted) < 1e-6
        elif not isinstance(value, nn.Module):
            assert value == wanted


def seen_by(model, inputs, path, register_hook, **options):
    seen = []
    handle = getattr(model.get_submodule(path), register_hook)(
        lambda module, *values: seen.append(leaves_of(values)), **options
    )
    with torch.no_grad():
        model(**inputs)
    handle.remove()
    return [leaf for leaves in seen for leaf in leaves]


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("hook", BIAS_HOOKS)
def test_hook_on_bias_sees_and_replaces_dense_bias(models, hook, name, position):
    theirs, ours = models(name, position)
    inputs = inputs_for(name, theirs)
    seen = {model: [] for model in (theirs, ours)}
    handles = []
    for model in (theirs, ours):
        first = biases(model)[0]
        handles.append(first.register_forward_hook(lambda *a, into=seen[model]: into.append(a[-1].detach().clone())))
        handles.append(first.register_forward_hook(BIAS_HOOKS[hook]))
    assert_same(run(ours, inputs), run(theirs, inputs))
    assert_same_values(seen[ours], seen[theirs])
    dense = 1 if position == "per layer" else layer_count(theirs)
    if name == "BeitModel" and position == "both":
        dense = layer_count(theirs) if biases(theirs)[0] is theirs.shared_position_bias else 1
    assert fused_calls(ours, inputs) == layer_count(theirs) - dense
    for handle in handles:
        handle.remove()
    assert fused_calls(ours, inputs) == layer_count(theirs)
    assert_same(run(ours, inputs), run(theirs, inputs))


@pytest.mark.parametrize("name", NAMES)
def test_accelerate_report_names_hooks_of_biases_until_removed(name):
    model = build(name, "both")
    bias = biases(model)[0]
    path = next(path for path, module in model.named_modules() if module is bias)
    handle = bias.register_forward_hook(lambda *unused: None)
    report = accelerate(model)
    assert path in report.replaced
    assert "has hooks, which expect a dense bias; Transformers' own attention runs" in str(report)
    assert "has hooks" in accelerate(model).named("already fast")[path]
    handle.remove()
    assert not any(accelerate(model).named("already fast").values())


@pytest.mark.parametrize("register_hook", ["register_forward_hook", "register_forward_pre_hook"])
@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("name", NAMES)
def test_hook_on_any_module_sees_what_transformers_shows(models, name, position, register_hook):
    """Positional and keyword arguments and outputs of every module of the trunk and one layer."""
    theirs, ours = models(name, position, shown=True)
    inputs = inputs_for(name, theirs)
    paths = [path for path, _ in theirs.named_modules() if ".1." not in f"{path}." and ".2." not in f"{path}."]
    for path in paths:
        mine, wanted = (seen_by(x, inputs, path, register_hook, with_kwargs=True) for x in (ours, theirs))
        try:
            assert_same_values(mine, wanted)
        except AssertionError as error:
            raise AssertionError(path) from error
    assert fused_calls(ours, inputs) == layer_count(theirs)


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("path", ["attention", "layer"])
def test_keyword_hook_keeps_outputs_and_gradients(models, path, name, heads):
    """A single head makes a dense bias as large as a padding mask."""
    theirs, ours = models(name, "both", num_attention_heads=heads)
    inputs = inputs_for(name, theirs)
    for model in (theirs, ours):
        layers = model.layers if hasattr(model, "layers") else model.encoder.layer
        module = layers[1].attention if path == "attention" else layers[1]
        module.register_forward_pre_hook(lambda *unused: None, with_kwargs=True)
    assert_same(run(ours, inputs), run(theirs, inputs))


@pytest.mark.parametrize("position", ["per layer", "both", "none"])
@pytest.mark.parametrize("name", NAMES)
def test_global_hook_sees_what_transformers_shows(models, name, position):
    theirs, ours = models(name, position, shown=True)
    inputs, seen = inputs_for(name, theirs), []
    handle = GLOBAL.register_module_forward_hook(lambda module, args, out: seen.append(leaves_of((args, out))))
    try:
        with torch.no_grad():
            ours(**inputs)
            mine = list(seen)
            seen.clear()
            theirs(**inputs)
    finally:
        handle.remove()
    assert len(mine) == len(seen)
    for values, wanted in zip(mine, seen, strict=True):
        kept = [[x for x in both if isinstance(x, torch.Tensor)] for both in (values, wanted)]
        assert_same_values(*kept)


@pytest.mark.parametrize("change", ["hook", "replaced", "probability"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_dropout_of_split_attention_changed_after_accelerate_is_followed(implementation, change):
    """Data2VecVision calls it under eager, and reads the configuration under sdpa."""
    theirs = build("Data2VecVisionModel", "both", implementation, attention_probs_dropout_prob=0.2).double()
    ours = copy.deepcopy(theirs)
    accelerate(ours, "triton")
    inputs = inputs_for("Data2VecVisionModel", theirs)
    for model in (theirs, ours):
        attention = model.encoder.layer[1].attention.attention
        if change == "hook":
            attention.dropout.register_forward_hook(lambda module, args, out: 2 * args[0])
        elif change == "replaced":
            attention.dropout = nn.Identity()
        else:
            attention.dropout.p = 0.0
    assert_same(run(ours, inputs), run(theirs, inputs), 1e-6)
    layers = layer_count(theirs)
    dense = implementation == "eager" and change != "probability"
    assert fused_calls(ours, inputs) == layers - dense
    ours.train()
    with torch.no_grad():
        first, again = (ours(**inputs).last_hidden_state for _ in range(2))
    assert not torch.equal(first, again)


@pytest.mark.skipif(IS_4, reason="BEiT accepts a padding mask since 5.0")
@pytest.mark.parametrize("position", ["per layer", "shared", "both"])
def test_padding_mask_with_hook_on_bias_excludes_keys(models, position):
    theirs, ours = models("BeitModel", position)
    theirs.set_attn_implementation("eager")
    inputs = inputs_for("BeitModel", theirs)
    keep = torch.ones(2, 17, dtype=torch.long)
    keep[0, 9:] = 0
    expected = theirs(**inputs, attention_mask=keep).last_hidden_state
    biases(ours)[0].register_forward_hook(lambda *unused: None)
    assert relative_error(ours(**inputs, attention_mask=keep).last_hidden_state, expected) < 1e-6


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_gradient_checkpointing_with_hook_on_bias_equals_transformers(models, name, reentrant):
    theirs, ours = models(name, "per layer" if reentrant else "both")
    inputs = inputs_for(name, theirs)
    for model in (theirs, ours):
        biases(model)[-1].register_forward_hook(BIAS_HOOKS["doubles"])
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_same(run(ours, inputs), run(theirs, inputs))
