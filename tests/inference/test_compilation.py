"""An optimized model raises one error under `torch.compile` and `torch.export`, before anything is compiled."""

import pytest
import torch
from torch import nn

from beit_fast import optimize_for_inference

from ..support.models import build, images

MESSAGE = "an optimized model does not support torch.compile or torch.export: pass the model it was made from"
CALLERS = {
    "model": lambda model: model,
    "forward": lambda model: model.forward,
    "function": lambda model: lambda x: model(x).logits * 2,
    "parent": nn.Sequential,
    "trunk": lambda model: model.beit,
}


@pytest.fixture(autouse=True)
def _no_compiled_code():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("fullgraph", [False, True])
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_optimized_model_compiled_raises(backend, fullgraph):
    compiled = torch.compile(optimize_for_inference(build()), backend=backend, fullgraph=fullgraph)
    with pytest.raises(RuntimeError) as raised:
        compiled(images())
    assert MESSAGE in str(raised.value)
    if not fullgraph:
        assert (type(raised.value), str(raised.value)) == (RuntimeError, MESSAGE)


@pytest.mark.parametrize("caller", CALLERS)
def test_optimized_model_compiled_by_any_caller_raises(caller):
    compiled = torch.compile(CALLERS[caller](optimize_for_inference(build())), backend="eager")
    with pytest.raises(RuntimeError, match=MESSAGE):
        compiled(images())


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_optimized_model_compile_method_raises(backend):
    optimized = optimize_for_inference(build())
    optimized.compile(backend=backend)
    with pytest.raises(RuntimeError, match=MESSAGE):
        optimized(images())


def test_optimized_model_runs_after_failed_compilation():
    optimized, pixels = optimize_for_inference(build()), images()
    expected = optimized(pixels).logits
    with pytest.raises(RuntimeError, match=MESSAGE):
        torch.compile(optimized, backend="eager")(pixels)
    assert torch.equal(optimized(pixels).logits, expected)


@pytest.mark.parametrize("strict", [False, True])
def test_optimized_model_exported_raises(strict):
    with pytest.raises(RuntimeError) as raised:
        torch.export.export(optimize_for_inference(build()), (images(),), strict=strict)
    assert MESSAGE in str(raised.value)
