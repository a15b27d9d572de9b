"""timm's functions on an accelerated BEiT: features, sizes, pruning, copies and compilation."""

import copy
import io
import pickle

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from ..support import timm_reference
from ..support.oracle import relative_error
from ..support.timm_reference import timm
from .test_timm import (
    NETWORKS,
    Spy,
    accelerate,
    assert_equal_results,
    gradients,
    pair,
    pixels_for,
    restore,
    timm_accelerate,
)

TINY_ARGUMENTS = {key: value for key, value in timm_reference.TINY.items() if key != "num_classes"}


@pytest.mark.parametrize("name", ["per layer", "both"])
def test_features_only_accelerated_equals_timm(name):
    options = {
        **TINY_ARGUMENTS,
        "use_rel_pos_bias": False,
        **NETWORKS[name],
        "features_only": True,
        "out_indices": (0, 2),
    }
    reference = timm.create_model("beit_base_patch16_224", **options).eval()
    reference.model.load_state_dict(timm_reference.build(**NETWORKS[name]).state_dict(), strict=False)
    fast = copy.deepcopy(reference)
    accelerate(fast, attn_implementation="triton")
    pixels = torch.randn(2, 3, 32, 32)
    with Spy(17) as spy:
        maps = fast(pixels)
    assert len(spy.calls) == 3
    assert fast.feature_info.channels() == [32, 32]
    for mine, theirs in zip(maps, reference(pixels), strict=True):
        assert mine.shape == (2, 32, 4, 4)
        assert relative_error(mine, theirs) < 1e-5


@pytest.mark.parametrize("size", [48, (40, 24)])
@pytest.mark.parametrize("name", ["per layer", "both"])
def test_set_input_size_accelerated_equals_timm(name, size):
    reference, fast = pair(name)
    for model in (reference, fast):
        model.set_input_size(size)
    assert_equal_results(fast, reference, pixels_for(reference))
    patched = {"img_size": 32, "patch_size": 4}
    for model in (reference, fast):
        model.set_input_size(**patched)
    assert fast.blocks[0].attn.window_size == (8, 8)
    assert_equal_results(fast, reference, pixels_for(reference))


def test_forward_intermediates_accelerated_equals_timm():
    reference, fast = pair("both", global_pool="token")
    pixels = pixels_for(reference)
    for options in (
        {"indices": 2},
        {"indices": [0, 1], "stop_early": True, "intermediates_only": True},
        {"norm": True, "output_fmt": "NLC", "return_prefix_tokens": True},
    ):
        flat = [torch.utils._pytree.tree_leaves(m.forward_intermediates(pixels, **options)) for m in (fast, reference)]
        for mine, theirs in zip(*flat, strict=True):
            assert relative_error(mine, theirs) < 1e-5


def test_prune_and_reset_classifier_accelerated_equals_timm():
    reference, fast = pair("shared")
    for model in (reference, fast):
        assert model.prune_intermediate_layers([0, 1], prune_head=False) == [0, 1]
        torch.manual_seed(0)
        model.reset_classifier(7, "token")
    assert fast(pixels_for(fast)).shape == (2, 7)
    assert_equal_results(fast, reference, pixels_for(reference))
    assert len(restore(fast).restored) == 3


@pytest.mark.parametrize("name", ["per layer", "shared", "both"])
def test_set_grad_checkpointing_accelerated_equals_timm(name):
    reference, fast = (model.train() for model in pair(name))
    fast.set_grad_checkpointing()
    with Spy(17) as spy:
        gradients(fast, pixels_for(fast))
    assert len(spy.calls) == 6, "three layers in forward, recomputed in backward"
    assert_equal_results(fast, reference, pixels_for(reference))


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copy_accelerated_model_equals_timm(how):
    reference, fast = pair("both")
    if how == "deepcopy":
        copied = copy.deepcopy(fast)
    elif how == "pickle":
        copied = pickle.loads(pickle.dumps(fast))
    else:
        file = io.BytesIO()
        torch.save(fast, file)
        file.seek(0)
        copied = torch.load(file, weights_only=False)
    with Spy(17) as spy:
        assert_equal_results(copied, reference, pixels_for(reference))
    assert len(spy.calls) == 3
    restore(copied)
    assert type(fast.blocks[0].attn) is timm_accelerate.FusedAttention


def test_load_state_dict_accelerated_equals_timm():
    reference, fast = (model.double() for model in pair("both"))
    other = {name: torch.randn_like(tensor) for name, tensor in reference.state_dict().items()}
    reference.load_state_dict(other)
    fast.load_state_dict(reference.state_dict())
    assert_equal_results(fast, reference, pixels_for(reference), tolerance=1e-10)


def test_jit_trace_accelerated_equals_timm():
    reference, fast = pair("both")
    pixels = pixels_for(reference)
    traced = torch.jit.trace(fast, pixels, check_trace=False)
    assert "beit_fast::rel_pos_attention" in str(traced.inlined_graph)
    batch = torch.randn(3, 3, 32, 32)
    assert relative_error(traced(batch), reference(batch)) < 1e-5


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("name", ["per layer", pytest.param("both", marks=pytest.mark.slow)])
def test_compile_new_batch_sizes_reuses_graph(name):
    reference, fast = pair(name, depth=2)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(fast, fullgraph=True, backend=counter)
    for batch in (2, 3, 5):
        pixels = pixels_for(reference, batch)
        torch._dynamo.mark_dynamic(pixels, 0)
        with torch.no_grad():
            assert relative_error(compiled(pixels), reference(pixels)) < 1e-5
    assert counter.frame_count == 1
    assert any(node.target is torch.ops.beit_fast.rel_pos_attention.default for node in counter.graphs[0].graph.nodes)


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compile_training_gradients_equal_timm(checkpointing):
    reference, fast = (model.train() for model in pair("both", depth=2))
    fast.set_grad_checkpointing(checkpointing)
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    pixels = pixels_for(reference)
    wanted = gradients(reference, pixels)
    fast.zero_grad()
    logits = compiled(pixels)
    (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum().backward()
    for name, parameter in fast.named_parameters():
        assert relative_error(parameter.grad, wanted[name]) < 1e-5, name


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
def test_compile_recompiles_after_accelerate_and_restore():
    model = timm_reference.build(**NETWORKS["both"], depth=1)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    pixels = pixels_for(model)
    with torch.no_grad():
        wanted = compiled(pixels)
        accelerate(compiled)
        assert relative_error(compiled(pixels), wanted) < 1e-5
        restore(compiled)
        assert torch.equal(compiled(pixels), wanted)
    operator = torch.ops.beit_fast.rel_pos_attention.default
    used = [any(node.target is operator for node in graph.graph.nodes) for graph in counter.graphs]
    assert used[:2] == [False, True]
