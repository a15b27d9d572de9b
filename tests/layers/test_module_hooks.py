"""Hooks of modules, and global hooks: one answer for every operator that replaces a call."""

import contextlib

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import beit_fast
from beit_fast.layers import module_hooks

GLOBAL = nn.modules.module
OWN = (
    "register_forward_hook",
    "register_forward_pre_hook",
    "register_full_backward_hook",
    "register_full_backward_pre_hook",
)
EVERYWHERE = (
    "register_module_forward_hook",
    "register_module_forward_pre_hook",
    "register_module_full_backward_hook",
    "register_module_full_backward_pre_hook",
)


@contextlib.contextmanager
def hooked(owner, register, **options):
    handle = getattr(owner, register)(lambda *unused: None, **options)
    try:
        yield
    finally:
        handle.remove()


def tiny(implementation="triton", **options):
    config = beit_fast.BeitConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, image_size=32, **options
    )
    return beit_fast.BeitModel(config, attn_implementation=implementation).eval()


@pytest.mark.parametrize("register", [*OWN, *EVERYWHERE])
def test_runs_as_written_with_any_hook_is_false_until_removed(register):
    module = nn.Linear(2, 2)
    assert module_hooks.runs_as_written(module)
    with hooked(GLOBAL if register in EVERYWHERE else module, register):
        assert not module_hooks.runs_as_written(module)
        assert module_hooks.watches_output(module)
        assert not module_hooks.watches_keywords(module)
    assert module_hooks.runs_as_written(module)
    module.forward = module.forward
    assert not module_hooks.runs_as_written(module)
    assert module_hooks.watches_output(module)


@pytest.mark.parametrize("register", [OWN[0], OWN[1], EVERYWHERE[0]])
def test_watches_keywords_hook_with_kwargs_is_true(register):
    module = nn.Linear(2, 2)
    with hooked(GLOBAL if register in EVERYWHERE else module, register, with_kwargs=True):
        assert module_hooks.watches_keywords(module)
    assert not module_hooks.watches_keywords(module)
    assert module_hooks.runs_as_written(module), "torch keeps the key of a removed global hook"


def test_watches_hooks_of_fsdp2_is_false():
    def hook(*unused):
        return None

    hook.__module__ = "torch.distributed.fsdp._fully_shard._fsdp_state"
    module = nn.Linear(2, 2)
    module.register_forward_pre_hook(hook, with_kwargs=True)
    assert not module_hooks.runs_as_written(module)
    assert not module_hooks.watches_output(module)
    assert not module_hooks.watches_keywords(module)
    module.register_forward_hook(lambda *unused: None, with_kwargs=True)
    assert module_hooks.watches_output(module)
    assert module_hooks.watches_keywords(module)


@pytest.mark.parametrize("implementation", ["sdpa", "triton"])
def test_flop_counter_counts_projection_of_every_implementation(implementation):
    model = tiny(implementation)
    with FlopCounterMode(display=False) as counter:
        model(torch.randn(1, 3, 32, 32))
    assert any("projection" in name for name in counter.get_flop_counts())


def test_global_hook_is_told_of_every_module_that_runs():
    """The fused patch embedding and the GEMM of training skip calls only without global hooks."""
    model, called = tiny().train(), set()
    handle = GLOBAL.register_module_forward_hook(lambda module, *unused: called.add(module))
    try:
        model(torch.randn(1, 3, 32, 32)).last_hidden_state.sum().backward()
    finally:
        handle.remove()
    containers = (nn.ModuleList, nn.Identity)
    missing = {name for name, x in model.named_modules() if x not in called and not isinstance(x, containers)}
    assert not missing


def test_global_hook_explicit_fused_embedding_and_optimized_model_raise():
    model = tiny()
    model.set_patch_embed_implementation("fused")
    with hooked(GLOBAL, EVERYWHERE[0]):
        with pytest.raises(ValueError, match="torch has global module hooks, which would be skipped"):
            model(torch.randn(1, 3, 32, 32))
        with pytest.raises(ValueError, match="torch has global module hooks, which would be skipped"):
            beit_fast.optimize_for_inference(model)
    model(torch.randn(1, 3, 32, 32))
