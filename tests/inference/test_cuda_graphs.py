"""The cache of graphs: what is recorded, replayed, dropped and left alone. A stand-in records functions of CPU tensors;
tests/gpu/test_cuda_graphs.py has real graphs.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import pickle
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from beit_fast.inference.cuda_graphs import CudaGraphs, GraphCache
from beit_fast.models.outputs import BaseModelOutput

from ..support.graphs import StandIn
from ..support.models import MEAN, STD, build, byte_images


def cache_of(function: Callable[..., Any], limit: int = 8) -> tuple[GraphCache, StandIn]:
    backend = StandIn()
    return GraphCache(function, limit, backend), backend


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def double(x: Tensor, *others: Any, **named: Any) -> Tensor:
    return 2 * x


def recorded_by(cache: GraphCache, *args: Any, **kwargs: Any) -> int:
    """Graphs that one call adds."""
    before = cache.report().recorded
    cache(*args, **kwargs)
    return cache.report().recorded - before


def test_new_inputs_get_new_results_and_old_results_stay() -> None:
    cache, backend = cache_of(double)
    inputs = [torch.randn(3, 4) for _ in range(3)]
    results = [cache(x) for x in inputs]
    for x, result in zip(inputs, results, strict=True):
        assert torch.equal(result, 2 * x)
    assert len({result.data_ptr() for result in results}) == 3
    assert len(backend.graphs) == len(cache) == 1
    assert cache.report().replayed == 3


DIFFERENT = {
    "shape": lambda x: x[:2],
    "dtype": Tensor.half,
    "rank": lambda x: x[None],
    "memory format": lambda x: x.to(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("what", DIFFERENT)
def test_another_form_of_input_has_a_graph_of_its_own(what: str) -> None:
    cache, _ = cache_of(double)
    x = torch.randn(3, 4, 2, 2)
    assert recorded_by(cache, x) == 1
    other = DIFFERENT[what](x)
    assert recorded_by(cache, other) == 1
    assert torch.equal(cache(other), 2 * other)
    assert cache(other).stride() == (2 * other).stride()
    assert recorded_by(cache, x) == 0


def test_other_strides_share_the_contiguous_graph() -> None:
    cache, _ = cache_of(double)
    x = torch.randn(4, 6)
    cache(x)
    for other in (torch.randn(6, 4).t(), torch.randn(8, 6)[::2], torch.randn(1, 6).expand(4, 6)):
        assert recorded_by(cache, other) == 0
        assert torch.equal(cache(other), 2 * other)


@pytest.mark.parametrize(
    ("first", "second"),
    [(1, 2), (1, True), (1, 1.0), (0.0, -0.0), ("a", "b"), (None, False), (torch.float16, torch.bfloat16)],
)
def test_another_plain_argument_has_a_graph_of_its_own(first: Any, second: Any) -> None:
    cache, _ = cache_of(double)
    x = torch.randn(3)
    assert [recorded_by(cache, x, option=option) for option in (first, second, first, second)] == [1, 1, 0, 0]


def test_the_same_plain_arguments_share_a_graph() -> None:
    cache, _ = cache_of(double)
    x = torch.randn(3)
    assert recorded_by(cache, x, one=1, two=float("nan")) == 1
    assert recorded_by(cache, x, two=float("nan"), one=1) == 0


def test_nested_arguments() -> None:
    cache, _ = cache_of(lambda batch, more: batch["pixels"] + more[0] * more[1][0])
    for _ in range(2):
        pixels, factor = torch.randn(3), torch.randn(3)
        assert torch.equal(cache({"pixels": pixels}, [2, (factor,)]), pixels + 2 * factor)
    assert recorded_by(cache, {"pixels": pixels}, [3, (factor,)]) == 1
    assert recorded_by(cache, {"pixels": pixels}, [3, [factor]]) == 1


def test_nested_results() -> None:
    def function(x: Tensor) -> Any:
        states = (x + 1, x + 2)
        return {"output": BaseModelOutput(states[1], states), "none": None, "count": 2, "parts": [x.sum(), (x[0],)]}

    cache, _ = cache_of(function)
    cache(torch.zeros(3))
    x = torch.randn(3)
    actual, expected = cache(x), function(x)
    assert isinstance(actual["output"], BaseModelOutput)
    assert actual["output"] == expected["output"]
    assert actual["output"].last_hidden_state is actual["output"].hidden_states[1]
    assert (actual["none"], actual["count"]) == (None, 2)
    assert torch.equal(actual["parts"][0], x.sum())
    assert torch.equal(actual["parts"][1][0], x[0])


def test_a_result_that_is_an_input_or_a_parameter_is_a_copy() -> None:
    parameter = torch.randn(3)
    cache, _ = cache_of(lambda x: (x, parameter))
    kept = parameter.clone()
    for _ in range(2):
        x = torch.randn(3)
        same, returned = cache(x)
        assert same.data_ptr() != x.data_ptr()
        assert returned.data_ptr() != parameter.data_ptr()
        parameter.copy_(kept)  # the stand-in writes to all results
    assert torch.equal(same, x)


def test_the_least_recently_used_graph_is_dropped() -> None:
    cache, backend = cache_of(double, limit=2)
    sizes = [torch.randn(size) for size in (1, 2, 3)]
    for x in (sizes[0], sizes[1], sizes[0], sizes[2]):
        cache(x)
    assert [graph.is_reset for graph in backend.graphs] == [False, True, False]
    assert len(cache) == 2
    assert backend.drained == 1
    assert recorded_by(cache, sizes[0]) == 0
    assert recorded_by(cache, sizes[1]) == 1
    report = cache.report()
    assert (report.recorded, report.dropped, report.replayed, report.limit) == (4, 2, 6, 2)
    assert report.graphs == ("float32[1] on cpu", "float32[2] on cpu")


def test_a_limit_of_one() -> None:
    cache, _ = cache_of(double, limit=1)
    for size in (1, 2, 1):
        assert recorded_by(cache, torch.randn(size)) == 1
    assert len(cache) == 1


@pytest.mark.parametrize("limit", [0, -1, 1.5, True, None])
def test_a_bad_limit_is_refused(limit: Any) -> None:
    with pytest.raises(ValueError, match=r"limit is .*; the number of graphs kept must be an integer of at least 1"):
        GraphCache(double, limit)


def test_graphs_share_a_pool_until_all_are_given_up() -> None:
    cache, backend = cache_of(double)
    cache(torch.randn(1))
    cache(torch.randn(2))
    first, second = backend.graphs
    assert first.pool() is second.pool()
    cache.clear()
    assert len(cache) == 0
    assert first.is_reset
    assert second.is_reset
    cache(torch.randn(1))
    assert backend.graphs[2].own_pool is not first.own_pool


def test_a_dropped_graph_frees_its_memory() -> None:
    cache, backend = cache_of(double, limit=1)
    cache(torch.randn(1))
    result = weakref.ref(backend.graphs[0].result)
    backend.graphs.clear()
    cache(torch.randn(2))
    gc.collect()
    assert result() is None


def test_what_a_graph_reads_is_held() -> None:
    """A cache behind the function may give its tensors up; the graph still reads their memory."""
    tables = [torch.ones(3)]
    cache, _ = cache_of(lambda x: x * tables[0] + (tables[0] + 1).sum())
    cache(torch.randn(3))
    table = weakref.ref(tables.pop())
    gc.collect()
    assert table() is not None
    cache.clear()
    gc.collect()
    assert table() is None


def test_what_a_graph_makes_is_not_held() -> None:
    made = []

    def function(x: Tensor) -> Tensor:
        made.append(weakref.ref(intermediate := x + 1))
        return intermediate.view(-1).mul_(2).sum()

    cache, _ = cache_of(function)
    cache(torch.randn(3))
    gc.collect()
    assert [reference() for reference in made] == [None] * len(made)


def expect_plain(cache: GraphCache, reason: str, *args: Any) -> None:
    before = cache.report()
    cache(*args)
    after = cache.report()
    assert (after.recorded, after.replayed) == (before.recorded, before.replayed)
    (counted,) = [given for given, count in after.plain.items() if count > before.plain.get(given, 0)]
    assert reason in counted


def test_gradients_take_the_function_itself() -> None:
    cache, _ = cache_of(double)
    x = torch.randn(3, requires_grad=True)
    with torch.enable_grad():
        expect_plain(cache, "gradients are enabled", x)
        cache(x).sum().backward()
    assert torch.equal(x.grad, torch.full((3,), 2.0))


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        ((torch.zeros(3), torch.zeros(3, device="meta")), "not all inputs are on one cpu device"),
        ((torch.zeros(3, device="meta"),), "not all inputs are on one cpu device"),
        ((torch.zeros(3).to_sparse(),), "an input is a tensor of a special kind"),
        ((torch.zeros(0, 3),), "an input is empty"),
        ((2,), "no input is a tensor"),
        ((torch.zeros(3), object()), "an argument is neither a tensor nor a plain value"),
    ],
)
def test_arguments_that_no_graph_can_take(args: Any, reason: str) -> None:
    cache, _ = cache_of(double)
    expect_plain(cache, reason, *args)


def test_the_recording_of_somebody_else_takes_the_function_itself() -> None:
    cache, backend = cache_of(double)
    backend.recording = True
    expect_plain(cache, "a graph is being recorded", torch.zeros(3))


def test_dispatch_modes_see_the_function_itself() -> None:
    cache, _ = cache_of(lambda x: x @ x)
    x = torch.randn(3, 3)
    cache(x)
    with FlopCounterMode(display=False) as counter:
        expect_plain(cache, "a dispatch mode is active", x)
    assert counter.get_total_flops() == 54


def test_a_default_device_changes_nothing() -> None:
    cache, _ = cache_of(double)
    with torch.device("cpu"):
        cache(torch.zeros(3))
    assert recorded_by(cache, torch.zeros(3)) == 0


def test_function_transforms_take_the_function_itself() -> None:
    cache, _ = cache_of(double)
    x = torch.randn(2, 3)
    assert torch.equal(torch.vmap(cache)(x), 2 * x)
    assert list(cache.report().plain) == ["a torch.func transform is running"]
    traced = torch.jit.trace(lambda x: cache(x), x, check_trace=False)
    assert torch.equal(traced(-x), -2 * x)


def test_compiled_whole_without_a_graph() -> None:
    torch.compiler.reset()
    cache, backend = cache_of(double)
    compiled = torch.compile(lambda x: cache(x) + 1, fullgraph=True, backend="aot_eager")
    x = torch.randn(3)
    assert torch.equal(compiled(x), 2 * x + 1)
    assert not backend.graphs


def test_an_error_of_the_function_is_its_own() -> None:
    def function(x: Tensor) -> Tensor:
        raise LookupError("no such layer")

    cache, backend = cache_of(function)
    with pytest.raises(LookupError, match="no such layer"):
        cache(torch.zeros(3))
    assert not backend.graphs
    assert len(cache) == 0


def test_what_runs_and_cannot_be_recorded_is_told() -> None:
    cache, backend = cache_of(double)

    def record(*args: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    backend.record = record
    with pytest.raises(RuntimeError, match=r"graph of float32\[3\] on cpu cannot be recorded.*not permitted.*wait"):
        cache(torch.zeros(3))
    assert len(cache) == 0
    assert cache.report().recorded == 0
    del backend.record
    assert torch.equal(cache(torch.ones(3)), torch.full((3,), 2.0))


def test_running_out_of_memory_is_told_as_it_is() -> None:
    cache, backend = cache_of(double)

    def record(*args: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    backend.record = record
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        cache(torch.zeros(3))


@pytest.mark.parametrize("modes", [(torch.inference_mode, torch.no_grad), (torch.no_grad, torch.inference_mode)])
def test_a_graph_serves_both_modes_without_gradients(modes: Any) -> None:
    cache, _ = cache_of(double)
    for mode in (*modes, *modes):
        with mode():
            x = torch.randn(3)
            result = cache(x)
            assert torch.equal(result, 2 * x)
            result.add_(1)
            assert result.is_inference() is torch.is_inference_mode_enabled()
        with torch.no_grad():
            cache(x)
    assert len(cache) == 1


def test_autocast_has_a_graph_of_its_own() -> None:
    weight = torch.randn(3, 3, requires_grad=True)
    cast = []
    cache, _ = cache_of(lambda x: cast.append(torch.is_autocast_cache_enabled()) or x @ weight)
    x = torch.randn(3, 3)
    assert cache(x).dtype == torch.float32
    for _ in range(2):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert cache(x).dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.float16):
        assert cache(x).dtype == torch.float16
    assert len(cache) == 3
    assert not any(cast), "a cast weight that autocast keeps for itself ends before the graph does"


def test_the_precision_of_products_has_a_graph_of_its_own() -> None:
    cache, _ = cache_of(double)
    x = torch.zeros(3)
    before = torch.get_float32_matmul_precision()
    try:
        for precision, recorded in (("highest", 1), ("high", 1), ("highest", 0)):
            torch.set_float32_matmul_precision(precision)
            assert recorded_by(cache, x) == recorded
    finally:
        torch.set_float32_matmul_precision(before)


def test_threads_take_turns() -> None:
    cache, backend = cache_of(lambda x: (x * 2).sum(0))
    wrong = []

    def work(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for _ in range(20):
                x = torch.randn(3 + seed % 2, 50, generator=generator)
                if not torch.equal(cache(x), (x * 2).sum(0)):
                    wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert backend.most_turns_at_once == 1
    assert cache.report().recorded == 2
    assert cache.report().replayed == 80


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
def test_copies_take_the_function_and_the_limit(copied: Callable[[GraphCache], GraphCache]) -> None:
    cache, _ = cache_of(torch.nn.Linear(3, 3), limit=5)
    x = torch.randn(2, 3)
    expected = cache(x)
    other = copied(cache)
    assert other.limit == 5
    assert len(other) == 0
    assert other.function is not cache.function
    assert torch.equal(other(x), expected)


def test_the_report_as_text() -> None:
    cache, _ = cache_of(double)
    cache(torch.zeros(2, 3), option=None)
    cache(torch.zeros(0))
    assert str(cache.report()).splitlines() == [
        "1 graphs of at most 8, 1 recorded, 0 dropped; 1 calls replayed",
        "  graph: float32[2, 3] on cpu, None",
        "  without a graph, 1 calls: an input is empty",
    ]


def test_a_model_of_bytes_and_floats() -> None:
    model = build().eval()
    model.set_pixel_normalization(MEAN, STD)
    cache, _ = cache_of(model)
    for _ in range(2):
        for pixels in (byte_images(2, 3, 32, 32), torch.randn(2, 3, 32, 32)):
            actual = cache(pixels, output_hidden_states=True)
            assert actual == model(pixels, output_hidden_states=True)
            assert type(actual) is type(model(pixels))
            actual_tuple = cache(pixels, return_dict=False)
            assert torch.equal(actual_tuple[0], model(pixels, return_dict=False)[0])
    assert len(cache) == 4


class FakeCuda:
    """Stands where `CudaGraphs` calls torch.cuda, and writes down in which order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[str] = []
        self.current = "user"
        self.fail_at_end = False
        outer = self

        class Stream:
            def __init__(self, name: Any) -> None:
                self.name = name if isinstance(name, str) else "side"

            def __eq__(self, other: object) -> bool:
                return isinstance(other, Stream) and self.name == other.name

            def wait_event(self, event: Any) -> None:
                outer.log.append(f"{self.name} waits for {event.at}")

            def wait_stream(self, other: Stream) -> None:
                outer.log.append(f"{self.name} waits for {other.name}")

        class Event:
            at = "nothing"

            def record(self, stream: Stream) -> None:
                self.at = f"the end on {stream.name}"

            def synchronize(self) -> None:
                outer.log.append(f"host waits for {self.at}")

        class CUDAGraph:
            pass

        @contextlib.contextmanager
        def stream(given: Stream) -> Iterator[None]:
            before, outer.current = outer.current, given.name
            try:
                yield
            finally:
                outer.current = before

        class Capture:  # as torch's, it stays on its stream where the end of the capture raises
            def __init__(self, graph: Any, pool: Any, stream: Stream, capture_error_mode: str) -> None:
                self.told = f"{stream.name}, pool {pool}, {capture_error_mode}"
                self.stream = stream

            def __enter__(self) -> None:
                outer.log.append(f"capture on {self.told}")
                self.before, outer.current = outer.current, self.stream.name

            def __exit__(self, *args: object) -> None:
                if outer.fail_at_end:
                    raise RuntimeError("capture was invalidated")
                outer.current = self.before

        fakes = {"Stream": Stream, "Event": Event, "CUDAGraph": CUDAGraph, "stream": stream, "graph": Capture}
        fakes["current_stream"] = lambda device=None: Stream(outer.current)
        fakes["device"] = lambda device: contextlib.nullcontext(outer.log.append(f"current device {device.index}"))
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)

    def run(self) -> str:
        self.log.append(f"run on {self.current}")
        return "result"


CUDA = torch.device("cuda", 1)


def test_cuda_warms_up_and_records_on_a_side_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    fake, backend = FakeCuda(monkeypatch), CudaGraphs()
    backend.warm_up(fake.run, CUDA)
    _, result = backend.record(fake.run, CUDA, "P")
    assert result == "result"
    assert fake.current == "user"
    assert fake.log == [
        "side waits for user",
        "run on side",
        "user waits for side",
        "capture on side, pool P, thread_local",
        "run on side",
    ]


def test_cuda_leaves_the_side_stream_where_a_recording_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    fake, backend = FakeCuda(monkeypatch), CudaGraphs()
    fake.fail_at_end = True
    with pytest.raises(RuntimeError, match="capture was invalidated"):
        backend.record(fake.run, CUDA, None)
    assert fake.current == "user"
    fake.fail_at_end = False
    backend.record(fake.run, CUDA, None)


def test_cuda_orders_turns_across_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    fake, backend = FakeCuda(monkeypatch), CudaGraphs()
    backend.drain(CUDA)
    for stream in ("first", "first", "second", "first"):
        fake.current = stream
        with backend.turn(CUDA):
            fake.run()
    with pytest.raises(LookupError), backend.turn(CUDA):
        raise LookupError
    backend.drain(CUDA)
    assert [entry for entry in fake.log if not entry.startswith("current device 1")] == [
        "run on first",
        "run on first",
        "second waits for the end on first",
        "run on second",
        "first waits for the end on second",
        "run on first",
        "host waits for the end on first",
    ]
    assert fake.log.count("current device 1") == 5
