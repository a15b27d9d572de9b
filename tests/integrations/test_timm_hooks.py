"""Hooks, `fused_attn`, replaced submodules and torch.fx on accelerated timm models, as on timm's own."""

import contextlib
import copy

import pytest
import torch
from torch import nn

from ..support import timm_reference
from ..support.attention_spy import AttentionSpy
from ..support.oracle import relative_error
from ..support.timm_reference import timm
from .test_timm import NETWORKS, accelerate, assert_equal_results, pair, pixels_for, restore

SHARING = ["shared", "both"]
GLOBAL = nn.modules.module


def fused_calls(model, pixels):
    with torch.no_grad(), AttentionSpy(17) as spy:
        model(pixels)
    return spy.calls


def seen_by(model, path, register="register_forward_hook", **options):
    """Run the model with a hook; return what the hook saw, without the module."""
    seen = []
    handle = getattr(model.get_submodule(path), register)(lambda module, *values: seen.append(values), **options)
    with torch.no_grad():
        model(pixels_for(model).fill_(0.5))
    handle.remove()
    return torch.utils._pytree.tree_leaves(seen)


def assert_same_values(mine, theirs):
    assert len(mine) == len(theirs) > 0
    for value, wanted in zip(mine, theirs, strict=True):
        assert type(value) is type(wanted)
        assert value.shape == wanted.shape
        assert relative_error(value, wanted) < 1e-5


@pytest.mark.parametrize("hooked_first", [True, False])
def test_attention_extract_accelerated_finds_maps(hooked_first):
    """The remedy that timm names for attention maps: unfused attention and hooks on `attn_drop`."""
    reference = timm_reference.build(**NETWORKS["both"])
    for block in reference.blocks:
        block.attn.fused_attn = False
    fast = copy.deepcopy(reference)
    pixels = pixels_for(fast)
    if hooked_first:
        extract = timm.utils.AttentionExtract(fast, method="hook")
    report = accelerate(fast)
    if not hooked_first:
        extract = timm.utils.AttentionExtract(fast, method="hook")
    assert "3 Attention (blocks.*.attn): has fused_attn=False" in str(report)
    maps, expected = extract(pixels), timm.utils.AttentionExtract(reference, method="hook")(pixels)
    assert list(maps) == list(expected)
    assert_same_values(list(maps.values()), list(expected.values()))


def test_fused_attn_changed_after_accelerate_is_followed():
    reference, fast = pair("both")
    pixels = pixels_for(fast)
    assert fused_calls(fast, pixels) == 3
    for model in (reference, fast):
        model.blocks[1].attn.fused_attn = False
    assert fused_calls(fast, pixels) == 2
    assert_same_values(seen_by(fast, "blocks.1.attn.attn_drop"), seen_by(reference, "blocks.1.attn.attn_drop"))
    assert_equal_results(fast, reference, pixels)
    assert "fused_attn=False" in accelerate(fast).named("already fast")["blocks.1.attn"]
    fast.blocks[1].attn.fused_attn = True
    assert fused_calls(fast, pixels) == 3
    assert not any(accelerate(fast).named("already fast").values())


def test_hook_on_dropout_of_fused_attention_sees_nothing_as_in_timm():
    reference, fast = pair()
    assert not seen_by(fast, "blocks.1.attn.attn_drop")
    assert not seen_by(reference, "blocks.1.attn.attn_drop")


@pytest.mark.parametrize("replacement", [nn.Identity(), nn.Dropout(1.0)], ids=str)
@pytest.mark.parametrize("replaced_first", [True, False])
def test_dropout_replaced_before_or_after_accelerate_equals_timm(replaced_first, replacement):
    reference, fast = timm_reference.build(**NETWORKS["both"]), timm_reference.build(**NETWORKS["both"])
    models = (reference, fast)
    if replaced_first:
        reference.blocks[1].attn.attn_drop = fast.blocks[1].attn.attn_drop = replacement
    report = accelerate(fast, "triton")
    assert len(report.replaced) == 4
    if replaced_first:
        assert "attn_drop (expected Dropout" in report.named("replaced")["blocks.1.attn"]
    for model in models:
        model.blocks[1].attn.attn_drop = replacement
        model.train(isinstance(replacement, nn.Dropout))
    assert fused_calls(fast, pixels_for(fast)) == 2
    assert_equal_results(fast, reference, pixels_for(fast))


@pytest.mark.parametrize("position", SHARING)
@pytest.mark.parametrize("hooked_first", [True, False])
def test_hook_on_shared_bias_sees_and_replaces_dense_bias(position, hooked_first):
    reference = timm_reference.build(**NETWORKS[position])
    fast = copy.deepcopy(reference)
    if not hooked_first:
        accelerate(fast, "triton")
    seen = {model: [] for model in (reference, fast)}

    def hook(module, args, out):
        seen[reference if module is reference.rel_pos_bias else fast].append(out.detach())
        return 2 * out

    handles = [model.rel_pos_bias.register_forward_hook(hook) for model in (reference, fast)]
    report = accelerate(fast, "triton")
    assert "has hooks" in report.named("replaced" if hooked_first else "already fast")["rel_pos_bias"]
    pixels = pixels_for(fast)
    assert_equal_results(fast, reference, pixels)
    assert_same_values(seen[fast], seen[reference])
    assert fused_calls(fast, pixels) == 0
    for handle in handles:
        handle.remove()
    assert fused_calls(fast, pixels) == 3
    assert_equal_results(fast, reference, pixels)


@pytest.mark.parametrize("position", SHARING)
@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
@pytest.mark.parametrize("path", ["rel_pos_bias", "blocks.1", "blocks.1.attn"])
def test_hook_with_keywords_sees_what_timm_shows(path, register, position):
    reference, fast = pair(position)
    mine, theirs = (seen_by(model, path, register, with_kwargs=True) for model in (fast, reference))
    if path == "rel_pos_bias" and register == "register_forward_pre_hook":
        assert mine == theirs == []
    else:
        assert_same_values(mine, theirs)
    assert_equal_results(fast, reference, pixels_for(fast))


def test_hook_on_every_module_sees_what_timm_shows():
    reference, fast = pair("both")
    for path, _ in reference.named_modules():
        mine, theirs = seen_by(fast, path), seen_by(reference, path)
        assert len(mine) == len(theirs), path
        if theirs:
            assert_same_values(mine, theirs)


@pytest.mark.parametrize("position", ["per layer", *SHARING])
@pytest.mark.parametrize("register", ["register_module_forward_hook", "register_module_forward_pre_hook"])
def test_global_hook_sees_what_timm_shows(register, position):
    reference, fast = pair(position)
    pixels, seen = pixels_for(fast), []
    handle = getattr(GLOBAL, register)(lambda module, *values: seen.append(values))
    with contextlib.closing(contextlib.ExitStack()) as stack, torch.no_grad():
        stack.callback(handle.remove)
        fast(pixels)
        mine, count = torch.utils._pytree.tree_leaves(seen), len(seen)
        seen.clear()
        reference(pixels)
        assert count == len(seen)
        assert_same_values(mine, torch.utils._pytree.tree_leaves(seen))


@pytest.mark.parametrize("position", ["per layer", "shared", "both", "absolute"])
@pytest.mark.parametrize("fused", [True, False])
def test_symbolic_trace_accelerated_equals_model(position, fused):
    """The attention call is one leaf of the graph, and the graph runs for other pixels and in a copy."""
    reference, fast = pair(position)
    for model in (reference, fast):
        for block in model.blocks:
            block.attn.fused_attn = fused
    traced = torch.fx.symbolic_trace(fast)
    leaves = [node for node in traced.graph.nodes if getattr(node.target, "__name__", "") == "fused_attention"]
    assert len(leaves) == (3 if fused else 0)
    pixels = pixels_for(fast, 3)
    assert_equal_results(traced, reference, pixels)
    assert torch.equal(copy.deepcopy(traced)(pixels), traced(pixels))
    assert fused_calls(traced, pixels) == len(leaves)
    restore(fast)
    assert_equal_results(torch.fx.symbolic_trace(fast), reference, pixels)


@pytest.mark.parametrize("path", ["blocks.0", "blocks.0.attn", "rel_pos_bias"])
def test_fused_attention_runs_under_hooks_of_the_package_accelerate(path):
    """Regression: these hooks moved the shared bias as a dense tensor, and timm's own attention ran without a word."""
    hooks = pytest.importorskip("accelerate.hooks")
    reference, fast = pair("shared")
    hook = hooks.AlignDevicesHook(execution_device="cpu", io_same_device=True)
    hooks.add_hook_to_module(fast.get_submodule(path), hook)
    pixels = pixels_for(fast)
    assert fused_calls(fast, pixels) == len(fast.blocks)
    assert_equal_results(fast, reference, pixels)
