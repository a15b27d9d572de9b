"""`GraphCache` on CPU tensors with fake graphs.

tests/gpu/test_cuda_graphs.py captures real graphs.
"""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from beit_fast.inference import cuda_graphs
from beit_fast.inference.cuda_graphs import GraphCache
from beit_fast.models.outputs import BaseModelOutput
from beit_fast.tuning.selftest import fp32_precision

from ..support.models import MEAN, STD, build, byte_images


def double(x: Tensor, *others: Any, **named: Any) -> Tensor:
    return 2 * x


def count_captures(cache: GraphCache, *args: Any, **kwargs: Any) -> int:
    """Return the number of graphs that one call captures."""
    before = cache.report().captured
    cache(*args, **kwargs)
    return cache.report().captured - before


def test_call_new_inputs_returns_new_results(graphs):
    cache = GraphCache(double)
    inputs = [torch.randn(3, 4) for _ in range(3)]
    results = [cache(x) for x in inputs]
    assert all(torch.equal(result, 2 * x) for x, result in zip(inputs, results, strict=True))
    assert len({result.data_ptr() for result in results}) == 3
    assert (len(graphs), len(cache), cache.report().replayed) == (1, 1, 3)


KEYS = {
    "shape": ((lambda x: x[:2], {}), 1),
    "dtype": ((Tensor.half, {}), 1),
    "memory format": ((lambda x: x.to(memory_format=torch.channels_last), {}), 1),
    "other strides, same layout": ((lambda x: x.flip(0).transpose(0, 1).contiguous().transpose(0, 1), {}), 0),
    "another value": ((lambda x: x, {"option": 1}), 1),
    "keyword order": ((lambda x: x, {"option": None, "more": 0.0}), 0),
    "minus zero": ((lambda x: x, {"option": None, "more": -0.0}), 1),
    "bool instead of float": ((lambda x: x, {"option": None, "more": False}), 1),
}


@pytest.mark.parametrize("what", KEYS)
def test_call_another_key_captures_another_graph(graphs, what):
    (change, kwargs), added = KEYS[what]
    cache = GraphCache(double)
    x = torch.randn(3, 4, 2, 2)
    cache(x, more=0.0, option=None)
    other = change(x)
    kwargs = {"more": 0.0, "option": None} | kwargs
    assert count_captures(cache, other, **kwargs) == added
    assert torch.equal(cache(other, **kwargs), 2 * other)
    assert count_captures(cache, x, option=None, more=0.0) == 0


def test_call_nested_arguments_and_results_keep_their_structure(graphs):
    def function(batch: dict[str, Tensor], more: Any) -> Any:
        states = (batch["pixels"] + more[0], batch["pixels"] * more[1][0])
        return {"output": BaseModelOutput(states[1], states), "none": None, "count": 2, "input": batch["pixels"]}

    cache = GraphCache(function)
    for _ in range(2):
        pixels, factor = torch.randn(3), torch.randn(3)
        result = cache({"pixels": pixels}, [2, (factor,)])
        output = result["output"]
        assert torch.equal(output.last_hidden_state, pixels * factor)
        assert output.hidden_states[1] is output.last_hidden_state, "a tensor returned twice is copied once"
        assert (result["none"], result["count"]) == (None, 2)
        assert result["input"].data_ptr() != pixels.data_ptr()
    assert count_captures(cache, {"pixels": pixels}, [2, [factor]]) == 1


def test_call_beyond_the_limit_drops_the_least_recently_used(graphs):
    cache = GraphCache(double, limit=2)
    for size in (1, 2, 1, 3, 1):
        cache(torch.randn(size))
    assert [graph.is_reset for graph in graphs] == [False, True, False]
    assert (len(cache), cache.report().dropped) == (2, 1)
    assert len({graph.own_pool for graph in graphs}) == 1, "graphs share a memory pool"
    cache.clear()
    assert all(graph.is_reset for graph in graphs)


def test_call_held_tensors_live_as_long_as_the_graph(graphs):
    tables = [torch.ones(3)]
    cache = GraphCache(lambda x: x * tables[-1], held=lambda: tables[-1])
    cache(torch.randn(3))
    alive = weakref.ref(tables.pop())
    gc.collect()
    assert alive() is not None
    cache.clear()
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("limit", [0, -1, 2.0, True, None])
def test_init_bad_limit_raises(limit):
    with pytest.raises(ValueError, match=r"limit=.* is not supported \(expected an integer of at least 1\)"):
        GraphCache(double, limit)


def assert_runs_function(cache: GraphCache, reason: str, *args: Any) -> None:
    before = cache.report()
    assert torch.equal(cache(*args), 2 * args[0])
    after = cache.report()
    assert after.captured == before.captured
    assert any(reason in name for name in after.plain), after.plain


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        ((torch.empty(0),), "an argument is empty"),
        ((torch.empty(2, device="meta"), torch.empty(2)), "not on one cpu device"),
        ((torch.ones(2), object()), "neither a tensor nor a plain value"),
    ],
)
def test_call_unsupported_arguments_runs_the_function(graphs, args, reason):
    cache = GraphCache(double)
    cache(*args)
    assert not graphs
    assert [name for name in cache.report().plain if reason in name]


def test_call_inside_transforms_modes_and_captures_runs_the_function(graphs, monkeypatch):
    cache, x = GraphCache(double), torch.randn(3)
    with torch.enable_grad():
        assert_runs_function(cache, "gradients are enabled", x)
    with FlopCounterMode(display=False):
        assert_runs_function(cache, "a dispatch mode is active", x)
    assert torch.equal(torch.func.vmap(cache)(x[None]), 2 * x[None])
    assert "a torch.func transform is active" in cache.report().plain
    monkeypatch.setattr(cuda_graphs, "is_capturing", lambda: True)
    assert_runs_function(cache, "captured by the caller", x)
    assert not graphs
    assert "4 calls" not in str(cache.report())


def test_call_function_that_cannot_be_captured_raises(graphs, monkeypatch):
    def fail_capture(run: Any, device: Any, pool: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(cuda_graphs, "capture", fail_capture)
    cache = GraphCache(double)
    with pytest.raises(RuntimeError, match="cannot be captured as a CUDA graph: operation not permitted"):
        cache(torch.randn(3))
    assert len(cache) == 0


def test_call_failing_function_raises_its_error(graphs):
    def fail(x: Tensor) -> Tensor:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        GraphCache(fail)(torch.randn(3))


def test_call_new_autocast_or_precision_captures_another_graph(graphs):
    cache = GraphCache(lambda x: x @ x)
    x = torch.randn(4, 4)
    assert count_captures(cache, x) == 1
    with torch.autocast("cpu", torch.bfloat16):
        assert count_captures(cache, x) == 1
        assert cache(x).dtype == torch.bfloat16
    assert cache(x).dtype == torch.float32
    with fp32_precision("tf32"):
        assert count_captures(cache, x) == 1


def test_call_inference_mode_and_no_grad_share_a_graph(graphs):
    cache, x = GraphCache(double), torch.randn(3)
    for mode in (torch.inference_mode, torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(cache(x), 2 * x)
    assert len(graphs) == 1


def test_call_from_threads_captures_once(graphs):
    cache, wrong = GraphCache(double), []

    def work() -> None:
        with torch.no_grad():
            for _ in range(20):
                x = torch.randn(3)
                wrong.extend([] if torch.equal(cache(x), 2 * x) else [x])

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (wrong, len(graphs), cache.report().replayed) == ([], 1, 80)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
def test_copy_keeps_function_and_limit(graphs, copied):
    cache = GraphCache(double, 3, held=tuple)
    cache(torch.randn(3))
    other = copied(cache)
    assert (other.function, other.limit, len(other)) == (double, 3, 0)


def test_call_byte_and_float_images_equals_model(graphs):
    model = build()
    model.set_pixel_normalization(MEAN, STD)
    cache = GraphCache(model)
    for pixels in (byte_images(2, 3, 32, 32), torch.randn(2, 3, 32, 32), byte_images(2, 3, 32, 32)):
        assert torch.equal(cache(pixels).logits, model(pixels).logits)
    assert len(graphs) == 2


def test_capture_runs_on_a_side_stream_after_a_warm_up(monkeypatch):
    """Call CUDA in the order that torch.cuda.graph documents."""
    cuda = mock.MagicMock()
    monkeypatch.setattr(torch, "cuda", cuda)
    run = mock.Mock(return_value="result")
    cuda.attach_mock(run, "run")
    device = torch.device("cuda", 0)
    cuda_graphs.warm_up(run, device)
    names = [call[0] for call in cuda.mock_calls]
    assert names.index("Stream().wait_stream") < names.index("run") < names.index("current_stream().wait_stream")
    graph, result = cuda_graphs.capture(run, device, "pool")
    assert (graph, result) == (cuda.CUDAGraph.return_value, "result")
    expected = mock.call(graph, pool="pool", stream=cuda.Stream.return_value, capture_error_mode="thread_local")
    assert cuda.graph.mock_calls[0] == expected
