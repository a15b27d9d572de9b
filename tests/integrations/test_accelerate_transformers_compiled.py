"""Accelerated models under `torch.compile`: one graph that contains the operator."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim, export

from beit_fast.integrations.transformers import accelerate

from ..support.oracle import relative_error
from ..support.transformers_models import (
    DENSE,
    FP32_PARITY,
    IS_4,
    assert_same,
    build,
    inputs_for,
    layer_count,
    pair,
    run,
)


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compiled(model):
    counter = CompileCounterWithBackend("aot_eager")
    return torch.compile(model, fullgraph=True, backend=counter), counter


def operator_count(counter):
    targets = [node.target for graph in counter.graphs for node in graph.graph.nodes]
    return targets.count(torch.ops.beit_fast.rel_pos_attention.default)


COMPILED = [
    ("BeitModel", "both", False),
    pytest.param("BeitModel", "per layer", True, marks=pytest.mark.slow),
    pytest.param("BeitModel", "shared", True, marks=pytest.mark.slow),
    pytest.param("Data2VecVisionModel", "both", False, marks=pytest.mark.slow),
    pytest.param("Data2VecVisionModel", "per layer", True, marks=pytest.mark.slow),
    pytest.param("UperNetForSemanticSegmentation", "per layer", False, marks=pytest.mark.slow),
]


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(("name", "position", "training"), COMPILED)
def test_compile_new_batch_sizes_reuses_graph(name, position, training):
    layers = {} if name in DENSE else {"num_hidden_layers": 2}
    theirs, ours = pair(name, position, torch.float32, **layers)
    theirs.train(training)
    ours.train(training)
    function, counter = compiled(ours)
    for batch in (2, 5, 3):
        inputs = {"pixel_values": inputs_for(name, theirs, batch=batch)["pixel_values"]}
        torch._dynamo.mark_dynamic(inputs["pixel_values"], 0)
        mine = run(function, inputs, training)
        expected = run(theirs, inputs, training)
        assert_same({key.removeprefix("_orig_mod."): x for key, x in mine.items()}, expected, FP32_PARITY)
    assert counter.frame_count == 1
    assert operator_count(counter) == layer_count(theirs)


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("name", ["BeitModel", "Data2VecVisionModel"])
def test_compile_new_image_sizes_reuses_graph(name):
    theirs, ours = pair(name, "both", torch.float32)
    function, counter = compiled(ours)
    for size in ((40, 48), (56, 72), (64, 40)):
        inputs = inputs_for(name, theirs, size, batch=2)
        for dim in (2, 3):
            torch._dynamo.mark_dynamic(inputs["pixel_values"], dim)
        assert_same(run(function, inputs, False), run(theirs, inputs, False), FP32_PARITY)
    assert counter.frame_count == 1


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("position", ["per layer", "both"])
def test_compile_gradient_checkpointing_equals_transformers(position):
    theirs, ours = pair("BeitModel", position, torch.float32)
    ours.train().gradient_checkpointing_enable()
    function, counter = compiled(ours)
    inputs = inputs_for("BeitModel", theirs)
    mine = {key.removeprefix("_orig_mod."): x for key, x in run(function, inputs).items()}
    assert_same(mine, run(theirs.train(), inputs), FP32_PARITY)
    assert counter.frame_count == 1


@pytest.mark.skipif(IS_4, reason="BEiT accepts a padding mask since 5.0")
@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
def test_compile_padding_mask_equals_uncompiled(attn_implementation):
    _, ours = pair("BeitModel", "both", torch.float32, attn_implementation=attn_implementation)
    function, counter = compiled(ours)
    mask = torch.ones(3, 17, dtype=torch.long)
    mask[0, 9:] = 0
    inputs = inputs_for("BeitModel", ours, batch=3) | {"attention_mask": mask}
    assert_same(run(function, inputs, False), run(ours, inputs, False), FP32_PARITY)
    assert operator_count(counter) == 3
    causal = torch.ones(3, 1, 17, 17, dtype=torch.bool).tril()
    with pytest.raises(RuntimeError, match="differs between queries"):
        function(**(inputs | {"attention_mask": causal}))


class Logits(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, pixel_values):
        return self.model(pixel_values).logits


@pytest.mark.slow
@pytest.mark.parametrize("name", ["BeitForImageClassification", "Data2VecVisionForImageClassification"])
def test_export_dynamic_batch_and_size_equals_transformers(name):
    """Export with a dynamic batch and image size.

    Transformers' own classes do not support it: their window becomes a guard.
    """
    theirs, ours = pair(name, "both", torch.float32)
    sizes = {0: Dim("batch"), 2: 8 * Dim("rows", min=2, max=64), 3: 8 * Dim("columns", min=2, max=64)}
    program = export(Logits(ours), (torch.randn(2, 3, 48, 40),), dynamic_shapes=(sizes,))
    targets = [node.target for node in program.graph.nodes]
    assert targets.count(torch.ops.beit_fast.rel_pos_attention.default) == 3
    pixels = torch.randn(3, 3, 56, 64)
    assert relative_error(program.module()(pixels), theirs(pixels).logits) <= FP32_PARITY


@pytest.mark.slow
@pytest.mark.parametrize("name", ["BeitForImageClassification", "Data2VecVisionForImageClassification"])
def test_jit_trace_equals_transformers(name):
    theirs, ours = pair(name, "both", torch.float32)
    pixels = inputs_for(name, theirs)["pixel_values"]
    with torch.no_grad():
        traced = torch.jit.trace(Logits(ours), pixels)
        pixels = torch.randn_like(pixels)
        assert relative_error(traced(pixels), theirs(pixels).logits) <= FP32_PARITY


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.slow
def test_accelerate_compiled_model_recompiles():
    """Recompile at the next call, because the module classes are guarded."""
    theirs = build("BeitModel").double()
    function, counter = compiled(theirs)
    inputs = inputs_for("BeitModel", theirs)
    expected = run(function, inputs, False)
    assert operator_count(counter) == 0
    accelerate(function, "triton")
    assert_same(run(function, inputs, False), expected)
    assert operator_count(counter) == 3
