"""CUDA graphs of a function: captured once for each shape of its inputs, kept in a bounded cache, replayed.

A replay launches the captured kernels at the captured addresses. Inputs are copied into static buffers, results are
cloned out of them.

The function may read its arguments, parameters and buffers, and launch work. It must not write to its arguments or wait
for the device. Parameters that change in place are seen. After a parameter was replaced, call `GraphCache.clear`.
"""

from __future__ import annotations

import contextlib
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from ..utils.messages import count_of

DEVICE_TYPE = "cuda"
_PLAIN_TYPES = (type(None), bool, int, float, str, torch.dtype, torch.device)
"""Types of arguments that are not tensors: each value has graphs of its own."""
_CAPTURE_LOCK = threading.Lock()  # CUDA cannot synchronize a device while another thread captures on it


@dataclass(frozen=True)
class GraphReport:
    """The graphs that a `GraphCache` holds, and counts of its calls; `str()` returns a readable summary.

    Attributes:
        limit: the number of graphs kept at most.
        graphs: the inputs of each graph, least recently used first.
        captured, replayed: graphs captured and calls replayed so far.
        dropped: graphs dropped for newer ones. If this grows, `limit` is too low for the shapes in use.
        plain: calls that ran the function without a graph, by reason.
    """

    limit: int
    graphs: tuple[str, ...]
    captured: int
    replayed: int
    dropped: int
    plain: dict[str, int]

    def __str__(self) -> str:
        counts = f"{self.captured} captured, {self.dropped} dropped; {count_of(self.replayed, 'call')} replayed"
        lines = [f"{count_of(len(self.graphs), 'graph')} of at most {self.limit}, {counts}"]
        lines += [f"  graph: {inputs}" for inputs in self.graphs]
        lines += [f"  without a graph, {count_of(count, 'call')}: {reason}" for reason, count in self.plain.items()]
        return "\n".join(lines)


@dataclass
class _Graph:
    """A captured graph with its static inputs and outputs.

    `held` keeps references to the other tensors that the graph reads.
    """

    graph: Any
    inputs: list[Tensor]
    outputs: list[Any]
    output_spec: pytree.TreeSpec
    held: Any
    name: str

    def replay(self, tensors: Sequence[Tensor]) -> Any:
        for buffer, tensor in zip(self.inputs, tensors, strict=True):
            buffer.copy_(tensor, non_blocking=True)
        self.graph.replay()
        written = {id(leaf): leaf for leaf in self.outputs if isinstance(leaf, Tensor)}
        copies = {number: tensor.clone() for number, tensor in written.items()}  # one tensor twice stays one
        return pytree.tree_unflatten([copies.get(id(leaf), leaf) for leaf in self.outputs], self.output_spec)


class GraphCache:
    """A function of tensors that is replayed as a CUDA graph.

    One graph is captured for each shape of the inputs. The key of a graph holds shapes, dtypes, devices and memory
    formats of all tensors. It also holds the values of other arguments, autocast and the precision of fp32 GEMMs. Calls
    that no graph can serve run the function, and `report` counts them with the reason. All graphs share one memory
    pool, so replays on different streams wait for each other. Copies and pickles take the function and the limit, not
    the graphs.

    Args:
        function: a function whose arguments and result may be nested in tuples, lists, dicts and model outputs.
        limit: the number of graphs kept; beyond it the least recently used graph is dropped.
        held: returns the cached tensors that the function reads. A graph captures their addresses, so it must keep a
            reference.

    Raises:
        ValueError: If `limit` is not an integer of at least 1.
    """

    def __init__(self, function: Callable[..., Any], limit: int = 8, held: Callable[[], Any] = lambda: None) -> None:
        if type(limit) is not int or limit < 1:
            raise ValueError(f"limit={limit!r} is not supported (expected an integer of at least 1)")
        self.function, self.limit, self._held = function, limit, held
        self._graphs: OrderedDict[Hashable, _Graph] = OrderedDict()
        self._captured = self._replayed = self._dropped = 0
        self._plain: Counter[str] = Counter()
        self._last: tuple[Any, Any] | None = None  # stream and event of the last replay
        self._lock = threading.RLock()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the function's result in newly allocated memory; the first call with a shape captures a graph.

        Raises:
            RuntimeError: If the function runs but cannot be captured.
        """
        if torch.compiler.is_compiling():
            return self.function(*args, **kwargs)
        leaves, spec = pytree.tree_flatten((args, dict(sorted(kwargs.items()))))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        reason = _unsupported_reason(leaves, tensors)
        if reason is not None:
            self._plain[reason] += 1
            return self.function(*args, **kwargs)
        key = (str(spec), *map(_leaf_key, leaves), *_global_key(tensors[0].device.type))
        with self._lock, self._after_last_replay(tensors[0].device):
            graph = self._graphs.get(key)
            if graph is None:
                graph = self._graphs[key] = self._capture(leaves, tensors, spec)
                self._drop_to(self.limit)
            self._graphs.move_to_end(key)
            self._replayed += 1
            return graph.replay(tensors)

    def __len__(self) -> int:
        return len(self._graphs)

    def report(self) -> GraphReport:
        """Return the graphs and the counts of calls."""
        with self._lock:
            names = tuple(graph.name for graph in self._graphs.values())
            return GraphReport(self.limit, names, self._captured, self._replayed, self._dropped, dict(self._plain))

    def clear(self) -> None:
        """Drop every graph and free its memory."""
        with self._lock:
            self._drop_to(0)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.function, self.limit, self._held)

    def _capture(self, leaves: list[Any], tensors: list[Tensor], spec: pytree.TreeSpec) -> _Graph:
        device = tensors[0].device
        with torch.inference_mode(False), torch.no_grad():  # buffers that both modes may write
            inputs = [torch.empty_like(x, memory_format=_memory_format(x)).copy_(x) for x in tensors]
        following = iter(inputs)
        static = [next(following) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        args, kwargs = pytree.tree_unflatten(static, spec)

        def run() -> Any:
            with _autocast_without_cache(
                device.type
            ):  # the cache of cast weights ends with autocast, the graph does not
                return self.function(*args, **kwargs)

        name = ", ".join(map(_describe, leaves))
        pool = next((graph.graph.pool() for graph in self._graphs.values() if graph.inputs[0].device == device), None)
        warm_up(run, device)
        try:
            graph, result = capture(run, device, pool)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise RuntimeError(
                f"the function runs for {name}, but cannot be captured as a CUDA graph: {error}. It must not wait for "
                "the device; pass graphs=False to launch every kernel in every call"
            ) from error
        self._captured += 1
        return _Graph(graph, inputs, *pytree.tree_flatten(result), self._held(), name)

    def _drop_to(self, count: int) -> None:
        while len(self._graphs) > count:
            _, graph = self._graphs.popitem(last=False)
            if self._last is not None:
                self._last[1].synchronize()  # a replay may still run
            graph.graph.reset()
            self._dropped += 1

    @contextlib.contextmanager
    def _after_last_replay(self, device: torch.device) -> Iterator[None]:
        """Order the work inside the block after the last replay.

        Replays use the same buffers on every stream.
        """
        with torch.cuda.device(device):
            stream, event = torch.cuda.current_stream(), torch.cuda.Event()
            if self._last is not None and self._last[0] != stream:
                stream.wait_event(self._last[1])
            try:
                yield
            finally:
                event.record(stream)
                self._last = stream, event


def warm_up(run: Callable[[], Any], device: torch.device) -> None:
    """Run once on a side stream before the capture.

    This call loads the kernels and allocates the workspaces.
    """
    side, current = torch.cuda.Stream(device), torch.cuda.current_stream(device)
    side.wait_stream(current)
    with torch.cuda.stream(side):
        run()
    current.wait_stream(side)


def capture(run: Callable[[], Any], device: torch.device, pool: Any) -> tuple[torch.cuda.CUDAGraph, Any]:
    """Capture one run with memory from `pool` (None: a new pool); return the graph and its static result."""
    graph = torch.cuda.CUDAGraph()
    # Other threads may launch work during the capture. The outer context leaves the side stream if the capture fails.
    side = torch.cuda.Stream(device)
    with (
        _CAPTURE_LOCK,
        torch.cuda.stream(side),
        torch.cuda.graph(graph, pool=pool, stream=side, capture_error_mode="thread_local"),
    ):
        result = run()
    return graph, result


def is_capturing() -> bool:
    """Whether the current stream is being captured by the caller."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _unsupported_reason(leaves: Sequence[Any], tensors: Sequence[Tensor]) -> str | None:
    """Return the reason why a graph cannot serve a call, or None."""
    if torch.is_grad_enabled():
        return "gradients are enabled: call under torch.inference_mode() or torch.no_grad()"
    if torch._C._are_functorch_transforms_active():
        return "a torch.func transform is active"
    if torch.jit.is_tracing():
        return "torch.jit.trace is active"
    if is_in_torch_dispatch_mode():
        return "a dispatch mode is active"
    if any(not isinstance(leaf, (Tensor, *_PLAIN_TYPES)) for leaf in leaves):
        return "an argument is neither a tensor nor a plain value"
    if not tensors:
        return "no argument is a tensor"
    if any(x.device.type != DEVICE_TYPE or x.device != tensors[0].device for x in tensors):
        return f"the arguments are not on one {DEVICE_TYPE} device"
    if any(type(x) not in (Tensor, torch.nn.Parameter) or x.layout != torch.strided for x in tensors):
        return "an argument is a tensor subclass or not strided"
    if any(x.numel() == 0 for x in tensors):
        return "an argument is empty"
    return "a CUDA graph is being captured by the caller" if is_capturing() else None


def _leaf_key(leaf: Any) -> Hashable:
    if isinstance(leaf, Tensor):
        return leaf.shape, leaf.dtype, leaf.device, _memory_format(leaf)
    return type(leaf), leaf.hex() if isinstance(leaf, float) else leaf  # by bits: -0.0 is not 0.0, NaN is NaN


def _memory_format(tensor: Tensor) -> torch.memory_format:
    """The format of the static buffer: channels last is kept, other strides become contiguous."""
    if tensor.ndim == 4 and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format


def _global_key(device_type: str) -> tuple[Hashable, ...]:
    """The global settings that choose kernels."""
    autocast = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None
    return autocast, torch.backends.cuda.matmul.fp32_precision, torch.are_deterministic_algorithms_enabled()


def _autocast_without_cache(device_type: str) -> torch.autocast:
    dtype, enabled = torch.get_autocast_dtype(device_type), torch.is_autocast_enabled(device_type)
    return torch.autocast(device_type, dtype=dtype, enabled=enabled, cache_enabled=False)


def _describe(leaf: Any) -> str:
    if isinstance(leaf, Tensor):
        return f"{str(leaf.dtype).removeprefix('torch.')}{list(leaf.shape)} on {leaf.device}"
    return repr(leaf)
