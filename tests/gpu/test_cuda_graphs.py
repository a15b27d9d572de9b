"""The cache of graphs with CUDA's; tests/inference/test_cuda_graphs.py has its bookkeeping."""

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
    """Some kernels, an intermediate and two results."""
    hidden = torch.relu(x @ x.mT)
    return hidden.softmax(-1), hidden.sum()


def some(size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, size, generator=torch.Generator().manual_seed(seed)).to(device())


def check(cache: GraphCache, x: Tensor) -> None:
    assert_same_bits(list(cache(x)), list(cache.function(x)))


def test_new_inputs_get_new_results_and_old_results_stay() -> None:
    cache = GraphCache(layer)
    inputs = [some(64, seed) for seed in range(4)]
    results = [cache(x) for x in inputs]
    for x, result in zip(inputs, results, strict=True):
        assert_same_bits(list(result), list(layer(x)))
    report = cache.report()
    assert (report.captured, report.replayed, report.plain) == (1, 4, {})


def test_shapes_in_any_order_share_memory_and_not_results() -> None:
    cache = GraphCache(layer, limit=4)
    for size in (64, 96, 32, 64, 32, 96, 80, 64):
        check(cache, some(size, size))
    assert cache.report().captured == 4
    assert cache.report().dropped == 0


def test_graphs_beyond_the_limit_are_dropped_and_recorded_again() -> None:
    cache = GraphCache(layer, limit=2)
    for size in (64, 96, 128, 64, 96, 128):
        check(cache, some(size))
    assert len(cache) == 2
    assert cache.report().dropped == 4


def test_clear_gives_memory_back() -> None:
    cache = GraphCache(layer)
    cache(some(64))  # workspaces, which stay

    def reserved() -> int:
        gc.collect()
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved()

    before = reserved()
    cache(some(4096))
    assert reserved() - before >= 2 * 4 * 4096**2  # an input and a result at least
    cache.clear()
    assert reserved() - before < 4 * 4096**2
    check(cache, some(64))


def test_memory_of_graphs_is_shared() -> None:
    """Eight shapes need little more than the largest: results and inputs each, intermediates once."""

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


def test_a_side_stream_goes_on_while_the_default_one_is_held_up() -> None:
    cache = GraphCache(layer)
    x = some(64)
    expected = layer(x)
    cache(-x)  # leaves wrong numbers in the buffers
    torch.cuda.synchronize()
    torch.cuda._sleep(LONG)
    with torch.cuda.stream(torch.cuda.Stream()):
        same = [torch.equal(*pair) for pair in zip(cache(x), expected, strict=True)]
    torch.cuda.synchronize()
    assert all(same)


def test_replays_on_two_streams_wait_for_one_another() -> None:
    """Both use the same buffers: the second must not overwrite what the first still reads."""
    cache = GraphCache(lambda x: (torch.cuda._sleep(LONG // 20), x * 2)[1])
    first, second = torch.cuda.Stream(), torch.cuda.Stream()
    inputs = [some(64, seed) for seed in range(2)]
    cache(inputs[0])
    torch.cuda.synchronize()
    results = []
    for stream, x in zip((first, second), inputs, strict=True):
        with torch.cuda.stream(stream):
            results.append(cache(x))
    torch.cuda.synchronize()
    for x, result in zip(inputs, results, strict=True):
        assert torch.equal(result, 2 * x)


def test_inputs_that_a_side_stream_writes_late_are_waited_for() -> None:
    cache = GraphCache(layer)
    x, other = some(64), some(64, 1)
    cache(x)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(LONG)
        x.copy_(other)
        actual = cache(x)
    torch.cuda.synchronize()
    assert_same_bits(list(actual), list(layer(other)))


def test_threads_on_streams_of_their_own() -> None:
    cache = GraphCache(layer)
    wrong: list[Any] = []

    def work(number: int) -> None:
        try:
            with torch.inference_mode(), torch.cuda.stream(torch.cuda.Stream()):
                for step in range(10):
                    check(cache, some(48 + 16 * (number % 2), 10 * number + step))
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert cache.report().captured == 2


def test_what_a_graph_reads_is_held() -> None:
    tables = [torch.ones(1024, 1024, device=device())]
    cache = GraphCache(lambda x: x * tables[0].sum(), held=lambda: list(tables))
    x = some(8)
    cache(x)
    tables.clear()
    gc.collect()
    torch.cuda.empty_cache()
    garbage = [torch.full((1024, 1024), float("nan"), device=device()) for _ in range(8)]
    assert torch.equal(cache(x), x * 2**20)
    del garbage


def test_parameters_changed_in_place_are_seen() -> None:
    weight = torch.ones(8, device=device())
    cache = GraphCache(lambda x: x * weight)
    x = some(8)
    cache(x)
    weight.fill_(3)
    assert torch.equal(cache(x), 3 * x)


def test_what_waits_for_the_device_cannot_be_recorded_and_nothing_is_left_behind() -> None:
    cache = GraphCache(lambda x: x * x.sum().item())
    stream = torch.cuda.current_stream()
    with pytest.raises(RuntimeError, match="cannot be captured as a CUDA graph"):
        cache(some(8))
    assert torch.cuda.current_stream() == stream
    assert not torch.cuda.is_current_stream_capturing()
    check(GraphCache(layer), some(64))


def test_inside_the_recording_of_somebody_else() -> None:
    cache = GraphCache(layer)
    x = some(64)
    check(cache, x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = cache(x)
    assert cache.report().plain == {"a CUDA graph is being captured by the caller": 1}
    graph.replay()
    assert_same_bits(list(result), list(layer(x)))


def test_inputs_on_a_cpu_take_the_function_itself() -> None:
    cache = GraphCache(layer)
    x = some(8).cpu()
    assert_same_bits(list(cache(x)), list(layer(x)))
    assert cache.report().plain == {"the arguments are not on one cuda device": 1}


def test_a_call_does_not_wait_for_the_device() -> None:
    cache = GraphCache(layer)
    x = some(64)
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
def test_a_model_of_bytes_and_floats(implementation: str, dtype: torch.dtype) -> None:
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
def test_two_devices_have_graphs_of_their_own() -> None:
    cache = GraphCache(layer)
    current = torch.cuda.current_device()
    for _ in range(2):
        for index in range(2):
            x = some(64).to(torch.device("cuda", index))
            result = cache(x)
            assert torch.cuda.current_device() == current
            assert_same_bits(list(result), list(layer(x)))
    assert len(cache) == 2
