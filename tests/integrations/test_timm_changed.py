"""Modules, methods and buffers of timm that are changed after `accelerate`, or before: results stay timm's."""

import copy
import re
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from beit_fast.integrations import library_code

from ..support import timm_reference
from .test_timm import NETWORKS, accelerate, assert_equal_results, pair, pixels_for, restore, timm_beit
from .test_timm_hooks import fused_calls


class OwnBias(nn.Module):
    """A dense bias of a user's own class."""

    def __init__(self, bias):
        super().__init__()
        self.bias = nn.Parameter(bias)

    def forward(self):
        return 2 * self.bias


class OwnAttention(nn.Module):
    """An attention of a user's own class, which insists on a tensor."""

    def __init__(self, attention):
        super().__init__()
        self.attention = attention

    def forward(self, x, shared_rel_pos_bias=None):
        assert shared_rel_pos_bias is None or type(shared_rel_pos_bias) is torch.Tensor
        return self.attention(x, shared_rel_pos_bias)


class OwnBlock(nn.Module):
    """A block of a user's own class, which computes with the bias."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x, shared_rel_pos_bias=None):
        if shared_rel_pos_bias is not None:
            assert shared_rel_pos_bias.shape == (4, 17, 17)
            shared_rel_pos_bias = 2 * shared_rel_pos_bias[:, :] + torch.zeros_like(shared_rel_pos_bias)
        return self.block(x, shared_rel_pos_bias=shared_rel_pos_bias)


def own_bias(model):
    torch.manual_seed(3)
    model.rel_pos_bias = OwnBias(torch.randn(4, 17, 17))


def timm_bias(model):
    torch.manual_seed(3)
    model.rel_pos_bias = timm_beit.RelativePositionBias((4, 4), 4)
    nn.init.normal_(model.rel_pos_bias.relative_position_bias_table)


def library_copy(module):
    copied = copy.deepcopy(module)
    if any("beit_fast" in type(part).__module__ for part in copied.modules()):
        restore(copied)
    return copied


def attention_of_timm(model):
    model.blocks[1].attn = library_copy(model.blocks[1].attn)


def attention_of_a_user(model):
    model.blocks[1].attn = OwnAttention(library_copy(model.blocks[1].attn))


def block_of_timm(model):
    model.blocks[1] = library_copy(model.blocks[1])


def block_of_a_user(model):
    model.blocks[1] = OwnBlock(library_copy(model.blocks[1]))


def block_with_its_own_forward(model):
    block = model.blocks[1]
    forward = block.forward
    block.forward = lambda x, shared_rel_pos_bias=None: forward(x, shared_rel_pos_bias=3 * shared_rel_pos_bias)


def attention_with_its_own_forward(model):
    attention = model.blocks[1].attn
    forward = attention.forward

    def doubled(x, shared_rel_pos_bias=None):
        assert type(shared_rel_pos_bias) is torch.Tensor
        return 2 * forward(x, shared_rel_pos_bias)

    attention.forward = doubled


# the calls of the fused operator that are left, of three
REPLACED = {
    own_bias: 0,
    timm_bias: 0,
    attention_of_timm: 2,
    attention_of_a_user: 2,
    block_of_timm: 2,
    block_of_a_user: 2,
    block_with_its_own_forward: 2,
    attention_with_its_own_forward: 2,
}


@pytest.mark.parametrize("change", REPLACED)
def test_module_replaced_after_accelerate_equals_timm(change):
    reference, fast = pair("both")
    change(reference)
    change(fast)
    assert_equal_results(fast, reference, pixels_for(fast))
    assert fused_calls(fast, pixels_for(fast)) == REPLACED[change]


def test_report_names_bias_that_replaced_an_accelerated_one():
    _, fast = pair("both")
    own_bias(fast)
    reasons = accelerate(fast).named("already fast")
    assert list(reasons) == [f"blocks.{index}.attn" for index in range(3)]
    wanted = f"takes the dense bias of a {__name__}.OwnBias; timm's own attention runs until this changes"
    assert set(reasons.values()) == {wanted}
    assert len(restore(fast).restored) == 3
    timm_bias(fast)
    assert "rel_pos_bias" in accelerate(fast).replaced


def patch_instance(model, monkeypatch):
    attention = model.blocks[1].attn
    plain = type(attention)._get_rel_pos_bias
    attention._get_rel_pos_bias = types.MethodType(lambda self: 2 * plain(self), attention)


def patch_class(model, monkeypatch):
    plain = timm_beit.Attention._get_rel_pos_bias
    monkeypatch.setattr(timm_beit.Attention, "_get_rel_pos_bias", lambda self: 2 * plain(self))


def patch_forward(model, monkeypatch):
    plain = timm_beit.Attention.forward
    monkeypatch.setattr(
        timm_beit.Attention,
        "forward",
        lambda self, x, shared_rel_pos_bias=None: 2 * plain(self, x, shared_rel_pos_bias),
    )


def patch_shared_forward(model, monkeypatch):
    plain = timm_beit.RelativePositionBias.forward
    monkeypatch.setattr(timm_beit.RelativePositionBias, "forward", lambda self: 2 * plain(self))


def patch_sdpa(model, monkeypatch):
    plain = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *args, **kwargs: 2 * plain(*args, **kwargs))


def change_index_in_place(model, monkeypatch):
    model.blocks[1].attn.relative_position_index[2, 3] = 0


def replace_index(model, monkeypatch):
    attention = model.blocks[1].attn
    attention.relative_position_index = attention.relative_position_index.flip(0)


def change_shared_index(model, monkeypatch):
    model.rel_pos_bias.relative_position_index[2, 3] = 0


# the calls that are left of three, the modules that are named, and what is said
CODE = {
    patch_instance: (2, ["blocks.1.attn"], "_get_rel_pos_bias that is not the library's"),
    patch_class: (0, ["blocks.0.attn", "blocks.1.attn", "blocks.2.attn"], "_get_rel_pos_bias that is not"),
    patch_forward: (0, ["blocks.0.attn", "blocks.1.attn", "blocks.2.attn"], "has a forward that is not"),
    patch_shared_forward: (0, ["rel_pos_bias"], "has a forward that is not"),
    patch_sdpa: (0, ["blocks.0.attn", "blocks.1.attn", "blocks.2.attn"], "scaled_dot_product_attention"),
    change_index_in_place: (
        2,
        ["blocks.1.attn"],
        r"relative_position_index that is not the one of its window \(4, 4\)",
    ),
    replace_index: (2, ["blocks.1.attn"], "relative_position_index that is not"),
    change_shared_index: (0, ["rel_pos_bias"], "relative_position_index that is not"),
}


@pytest.mark.parametrize("changed_first", [False, True])
@pytest.mark.parametrize("change", CODE)
def test_code_or_index_of_timm_changed_equals_timm(change, changed_first, monkeypatch):
    """Each change gives another result, so that ignoring it fails the comparison."""
    reference = timm_reference.build(**NETWORKS["both"])
    fast, plain = copy.deepcopy(reference), copy.deepcopy(reference)
    pixels = pixels_for(fast)
    before = plain(pixels).detach()
    if not changed_first:
        accelerate(fast, "triton")
        assert fused_calls(fast, pixels) == 3
    with monkeypatch.context() as patch:
        change(reference, patch)
        if change not in (patch_class, patch_forward, patch_shared_forward, patch_sdpa):
            change(fast, patch)
        report = accelerate(fast, "triton")
        assert not torch.allclose(reference(pixels), before, atol=1e-4)
        assert_equal_results(fast, reference, pixels)
        calls, names, reason = CODE[change]
        assert fused_calls(fast, pixels) == calls
        said = report.named("replaced" if changed_first else "already fast")
        assert [name for name, text in said.items() if text] == names
        assert all(re.search(reason, said[name]) for name in names)


def test_change_that_is_undone_runs_fused_again(monkeypatch):
    _, fast = pair("both")
    pixels, attention = pixels_for(fast), fast.blocks[1].attn
    with monkeypatch.context() as patch:
        patch_class(fast, patch)
        assert fused_calls(fast, pixels) == 0
    attention.relative_position_index[2, 3] += 1
    assert fused_calls(fast, pixels) == 2
    attention.relative_position_index[2, 3] -= 1
    assert fused_calls(fast, pixels) == 3


def test_scale_of_timm_attention_is_read_as_timm_reads_it():
    """Fused attention of timm ignores `scale`, and its own products use it."""
    for fused in (True, False):
        reference, fast = pair("both")
        for model in (reference, fast):
            model.blocks[1].attn.scale = 0.1
            model.blocks[1].attn.fused_attn = fused
        assert_equal_results(fast, reference, pixels_for(fast))


def test_index_is_read_once_for_each_version():
    _, fast = pair("both")
    pixels = pixels_for(fast)
    fused_calls(fast, pixels)
    read = library_code._checked.copy()
    fused_calls(fast, pixels)
    assert library_code._checked == read
    key = id(fast.blocks[0].attn.relative_position_index)
    assert key in read
    fast.blocks[0].attn.relative_position_index = None
    assert key not in library_code._checked


def test_index_without_version_or_values_keeps_fused_attention():
    """Tensors of inference mode have no version, and those of `vmap` have no values."""
    with torch.inference_mode():
        model = timm_reference.build(**NETWORKS["both"])
        accelerate(model, "triton")
        assert fused_calls(model, pixels_for(model)) == 3
    reference, fast = pair("both")
    pixels = pixels_for(fast)
    stacked = torch.func.stack_module_state([fast, copy.deepcopy(fast)])
    both = torch.vmap(lambda *state: torch.func.functional_call(fast, state, (pixels,)))(*stacked)
    assert torch.allclose(both, reference(pixels).expand(2, -1, -1), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("change", [patch_instance, change_index_in_place])
def test_compiled_model_changed_before_it_compiles_equals_timm(change, monkeypatch):
    reference, fast = pair("both", depth=2)
    for model in (reference, fast):
        change(model, monkeypatch)
    torch._dynamo.reset()
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        pixels = pixels_for(fast)
        assert torch.allclose(compiled(pixels), reference(pixels), atol=1e-5)
    torch._dynamo.reset()


@pytest.mark.parametrize("change", [own_bias, attention_of_timm, block_of_timm, block_of_a_user])
def test_symbolic_trace_of_model_with_replaced_module_equals_timm(change):
    reference, fast = pair("both")
    change(reference)
    change(fast)
    if change is block_of_a_user:
        for model in (reference, fast):
            model.blocks[1].forward = model.blocks[1].block.forward
    assert_equal_results(torch.fx.symbolic_trace(fast), reference, pixels_for(fast))


def test_restore_wrapped_forward_raises():
    _, fast = pair("both")
    attention_with_its_own_forward(fast)
    with pytest.raises(ValueError, match=r"blocks\.1\.attn has a forward of its own"):
        restore(fast)
