"""`GraphCache` on a GPU; tests/inference/test_cuda_graphs.py tests its bookkeeping."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from beit_fast.inference.cuda_graphs import GraphCache

from ..kernels.cases import assert_same_bits, device
from ..kernels.test_model import build, with_attention
from ..support.models import MEAN, STD, byte_images
from .calls import LONG


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


def layer(x: Tensor) -> tuple[Tensor, Tensor]:
    """Run several kernels with an intermediate and two results."""
    hidden = torch.relu(x @ x.mT)
    return hidden.softmax(-1), hidden.sum()


def make_input(size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, size, generator=torch.Generator().manual_seed(seed)).to(device())


def check(cache: GraphCache, x: Tensor) -> None:
    assert_same_bits(list(cache(x)), list(cache.function(x)))


def test_graph_cache_new_inputs_keep_old_results() -> None:
    cache = GraphCache(layer)
    inputs = [make_input(64, seed) for seed in range(4)]
    results = [cache(x) for x in inputs]
    for x, result in zip(inputs, results, strict=True):
        assert_same_bits(list(result), list(layer(x)))
    report = cache.report()
    assert (report.captured, report.replayed, report.plain) == (1, 4, {})


def test_graph_cache_shapes_in_any_order_match_function() -> None:
    cache = GraphCache(layer, limit=4)
    for size in (64, 96, 32, 64, 32, 96, 80, 64):
        check(cache, make_input(size, size))
    assert cache.report().captured == 4
    assert cache.report().dropped == 0


def test_graph_cache_above_limit_drops_and_recaptures() -> None:
    cache = GraphCache(layer, limit=2)
    for size in (64, 96, 128, 64, 96, 128):
        check(cache, make_input(size))
    assert len(cache) == 2
    assert cache.report().dropped == 4


def test_graph_cache_clear_frees_memory() -> None:
    cache = GraphCache(layer)
    cache(make_input(64))  # allocates workspaces that remain

    def reserved() -> int:
        gc.collect()
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved()

    before = reserved()
    cache(make_input(4096))
    assert reserved() - before >= 2 * 4 * 4096**2  # at least an input and a result
    cache.clear()
    assert reserved() - before < 4 * 4096**2
    check(cache, make_input(64))


def test_graph_cache_graphs_share_memory() -> None:
    """Eight shapes take little more memory than the largest.

    Each shape has its inputs and results; the intermediates are shared.
    """

    def chain(x: Tensor) -> Tensor:
        for _ in range(6):
            x = torch.cat([x, x], 1)[:, : x.shape[1]] + 1
        return x[:1, :1].clone()

    def reserved_by(rows: list[int]) -> int:
        cache = GraphCache(chain)
        gc.collect()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved()
        for count in rows:
            cache(torch.zeros(count, 4096, device=device()))
        gc.collect()
        torch.cuda.empty_cache()
        taken = torch.cuda.memory_reserved() - before
        cache.clear()
        return taken

    rows = [4096 - 8 * step for step in range(8)]
    one, all_of_them = reserved_by(rows[:1]), reserved_by(rows)
    inputs = sum(4 * count * 4096 for count in rows[1:])
    assert all_of_them - inputs < 2 * one


def test_graph_cache_side_stream_does_not_wait_for_default_stream() -> None:
    cache = GraphCache(layer)
    x = make_input(64)
    expected = layer(x)
    cache(-x)  # fills the buffers with wrong values
    torch.cuda.synchronize()
    torch.cuda._sleep(LONG)
    with torch.cuda.stream(torch.cuda.Stream()):
        same = [torch.equal(*pair) for pair in zip(cache(x), expected, strict=True)]
    torch.cuda.synchronize()
    assert all(same)


def test_graph_cache_replays_on_two_streams_do_not_overlap() -> None:
    """The second replay must not overwrite buffers that the first still reads."""
    cache = GraphCache(lambda x: (torch.cuda._sleep(LONG // 20), x * 2)[1])
    first, second = torch.cuda.Stream(), torch.cuda.Stream()
    inputs = [make_input(64, seed) for seed in range(2)]
    cache(inputs[0])
    torch.cuda.synchronize()
    results = []
    for stream, x in zip((first, second), inputs, strict=True):
        with torch.cuda.stream(stream):
            results.append(cache(x))
    torch.cuda.synchronize()
    for x, result in zip(inputs, results, strict=True):
        assert torch.equal(result, 2 * x)


def test_graph_cache_side_stream_waits_for_its_inputs() -> None:
    cache = GraphCache(layer)
    x, other = make_input(64), make_input(64, 1)
    cache(x)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(LONG)
        x.copy_(other)
        actual = cache(x)
    torch.cuda.synchronize()
    assert_same_bits(list(actual), list(layer(other)))


def test_graph_cache_threads_on_own_streams_match_function() -> None:
    cache = GraphCache(layer)
    errors: list[Any] = []

    def work(number: int) -> None:
        try:
            with torch.inference_mode(), torch.cuda.stream(torch.cuda.Stream()):
                for step in range(10):
                    check(cache, make_input(48 + 16 * (number % 2), 10 * number + step))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert cache.report().captured == 2


def test_graph_cache_held_tensors_stay_alive() -> None:
    tables = [torch.ones(1024, 1024, device=device())]
    cache = GraphCache(lambda x: x * tables[0].sum(), held=lambda: list(tables))
    x = make_input(8)
    cache(x)
    tables.clear()
    gc.collect()
    torch.cuda.empty_cache()
    garbage = [torch.full((1024, 1024), float("nan"), device=device()) for _ in range(8)]
    assert torch.equal(cache(x), x * 2**20)
    del garbage


def test_graph_cache_in_place_parameter_change_is_used() -> None:
    weight = torch.ones(8, device=device())
    cache = GraphCache(lambda x: x * weight)
    x = make_input(8)
    cache(x)
    weight.fill_(3)
    assert torch.equal(cache(x), 3 * x)


def test_graph_cache_synchronizing_function_raises_and_cleans_up() -> None:
    cache = GraphCache(lambda x: x * x.sum().item())
    stream = torch.cuda.current_stream()
    with pytest.raises(RuntimeError, match="cannot be captured as a CUDA graph"):
        cache(make_input(8))
    assert torch.cuda.current_stream() == stream
    assert not torch.cuda.is_current_stream_capturing()
    check(GraphCache(layer), make_input(64))


def test_graph_cache_inside_capture_calls_function() -> None:
    cache = GraphCache(layer)
    x = make_input(64)
    check(cache, x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = cache(x)
    assert cache.report().plain == {"a CUDA graph is being captured by the caller": 1}
    graph.replay()
    assert_same_bits(list(result), list(layer(x)))


def test_graph_cache_cpu_inputs_call_function() -> None:
    cache = GraphCache(layer)
    x = make_input(8).cpu()
    assert_same_bits(list(cache(x)), list(layer(x)))
    assert cache.report().plain == {"the arguments are not on one cuda device": 1}


def test_graph_cache_call_does_not_synchronize() -> None:
    cache = GraphCache(layer)
    x = make_input(64)
    cache(x)
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        actual = cache(x)
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    assert_same_bits(list(actual), list(layer(x)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("implementation", ["triton", "sdpa"])
def test_graph_cache_model_of_bytes_and_floats_matches_model(implementation: str, dtype: torch.dtype) -> None:
    model = with_attention(implementation, build().to(dtype))
    model.set_pixel_normalization(MEAN, STD)
    cache = GraphCache(model)
    for size in ((2, 3, 32, 32), (2, 3, 32, 48), (3, 3, 32, 32), (2, 3, 32, 32)):
        for pixels in (byte_images(*size).to(device()), torch.randn(size).to(device(), dtype)):
            actual = cache(pixels, output_hidden_states=True)
            expected = model(pixels, output_hidden_states=True)
            assert torch.equal(actual.logits, expected.logits)
            assert_same_bits(list(actual.hidden_states), list(expected.hidden_states))
    assert len(cache) == 6


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_graph_cache_two_devices_capture_separate_graphs() -> None:
    cache = GraphCache(layer)
    current = torch.cuda.current_device()
    for _ in range(2):
        for index in range(2):
            x = make_input(64).to(torch.device("cuda", index))
            result = cache(x)
            assert torch.cuda.current_device() == current
            assert_same_bits(list(result), list(layer(x)))
    assert len(cache) == 2
