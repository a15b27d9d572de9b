"""CUDA graphs of a function of tensors: recorded once for each form of its inputs, kept in a bounded cache, replayed.

A graph repeats the same kernels at the same addresses, so one launch takes the place of hundreds. Inputs are copied
into buffers that the graph reads, results are copied out of those that it writes, and what a call returned is never
touched again.

What a recorded function may do: read its arguments, parameters and buffers, and launch work. It must not write to its
arguments, wait for the device, or decide by values on the device; nor may another thread wait for the whole device
while it is recorded. Tensors that it only reads, cached ones included, are held by the recording, so that their memory
stays theirs; parameters that are updated in place are seen, ones that are replaced are not: call `clear`.
"""

from __future__ import annotations

import contextlib
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, is_in_torch_dispatch_mode

_ONE_RECORDING = threading.Lock()
"""CUDA refuses to wait for a device while one of its streams is recorded, and every recording begins with that."""

_CONSTANTS = (type(None), bool, int, float, str, bytes, torch.dtype, torch.device, torch.memory_format)
"""Types of the arguments that are no tensors: each value has graphs of its own."""


class Graph(Protocol):
    """What a backend has recorded."""

    def replay(self) -> None:
        """Repeat it on the current stream."""

    def pool(self) -> Any:
        """Where its memory comes from."""

    def reset(self) -> None:
        """Give up the recording and its memory."""


class GraphBackend(Protocol):
    """Records and replays on the devices of one type; `CudaGraphs`, or what a test puts in its place."""

    device_type: str

    def is_recording(self, device: torch.device) -> bool:
        """Whether somebody records what is launched on the current stream."""

    def turn(self, device: torch.device) -> contextlib.AbstractContextManager[None]:
        """Work that comes after that of every earlier turn on the device, whichever stream it was on."""

    def warm_up(self, run: Callable[[], Any], device: torch.device) -> None:
        """Run once as the recording will: kernels are loaded and workspaces taken."""

    def record(self, run: Callable[[], Any], device: torch.device, pool: Any) -> tuple[Graph, Any]:
        """The graph of one run, with memory from `pool` (None: its own), and the result that replays fill."""

    def drain(self, device: torch.device) -> None:
        """Wait until the turns on the device have ended."""


class CudaGraphs:
    """`torch.cuda.CUDAGraph`: warmed up and recorded on a side stream, replayed on the current one."""

    device_type = "cuda"

    def __init__(self) -> None:
        self._side_streams: dict[torch.device, torch.cuda.Stream] = {}
        self._last_turns: dict[torch.device, tuple[torch.cuda.Stream, torch.cuda.Event]] = {}

    def is_recording(self, device: torch.device) -> bool:
        with torch.cuda.device(device):
            return torch.cuda.is_current_stream_capturing()

    @contextlib.contextmanager
    def turn(self, device: torch.device) -> Iterator[None]:
        with torch.cuda.device(device):
            stream = torch.cuda.current_stream()
            last_stream, ended = self._last_turns.get(device, (stream, None))
            if ended is None:
                ended = torch.cuda.Event()
            elif last_stream != stream:
                stream.wait_event(ended)
            try:
                yield
            finally:
                ended.record(stream)
                self._last_turns[device] = (stream, ended)

    def warm_up(self, run: Callable[[], Any], device: torch.device) -> None:
        side, current = self._side_stream(device), torch.cuda.current_stream(device)
        side.wait_stream(current)
        with torch.cuda.stream(side):
            run()
        current.wait_stream(side)

    def record(self, run: Callable[[], Any], device: torch.device, pool: Any) -> tuple[torch.cuda.CUDAGraph, Any]:
        side, graph = self._side_stream(device), torch.cuda.CUDAGraph()
        # The outer context leaves the side stream even where ending the capture raises. Other threads may launch work.
        with (
            _ONE_RECORDING,
            torch.cuda.stream(side),
            torch.cuda.graph(graph, pool=pool, stream=side, capture_error_mode="thread_local"),
        ):
            result = run()
        return graph, result

    def drain(self, device: torch.device) -> None:
        if device in self._last_turns:
            self._last_turns[device][1].synchronize()

    def _side_stream(self, device: torch.device) -> torch.cuda.Stream:
        if device not in self._side_streams:
            self._side_streams[device] = torch.cuda.Stream(device)
        return self._side_streams[device]


@dataclass(frozen=True)
class GraphReport:
    """What a `GraphCache` holds and has done."""

    limit: int
    graphs: tuple[str, ...]
    """The inputs that each kept graph takes, least recently used first."""
    recorded: int
    replayed: int
    dropped: int
    """Graphs given up for newer ones: where they are many, `limit` is too low for the shapes that come."""
    plain: dict[str, int]
    """Calls that ran the function itself, by reason."""

    def __str__(self) -> str:
        lines = [
            f"{len(self.graphs)} graphs of at most {self.limit}, {self.recorded} recorded, {self.dropped} dropped; "
            f"{self.replayed} calls replayed",
            *(f"  graph: {inputs}" for inputs in self.graphs),
            *(f"  without a graph, {count} calls: {reason}" for reason, count in self.plain.items()),
        ]
        return "\n".join(lines)


@dataclass
class _Recording:
    """One graph, the buffers that it reads and writes, and what else must stay where it is."""

    device: torch.device
    inputs: list[Tensor]
    graph: Graph
    outputs: list[Any]
    output_spec: pytree.TreeSpec
    held: list[Any]
    name: str

    def __post_init__(self) -> None:
        self.written = {id(leaf): leaf for leaf in self.outputs if isinstance(leaf, Tensor)}

    def replay(self, tensors: Sequence[Tensor]) -> Any:
        """The result for these inputs, in memory of its own; what is one tensor twice stays one."""
        for buffer, tensor in zip(self.inputs, tensors, strict=True):
            buffer.copy_(tensor, non_blocking=True)
        self.graph.replay()
        copies = {number: tensor.clone() for number, tensor in self.written.items()}
        leaves = [copies.get(id(leaf), leaf) for leaf in self.outputs]
        return pytree.tree_unflatten(leaves, self.output_spec)


@dataclass
class _Counts:
    recorded: int = 0
    replayed: int = 0
    dropped: int = 0
    plain: Counter[str] = field(default_factory=Counter)


class GraphCache:
    """A function of tensors that is recorded as a graph for each form of its inputs, and replayed.

    The form is: shapes, dtypes, devices and memory formats of all tensors, however nested, every other argument's
    value, autocast, and the precision of fp32 products. Other global switches are read when a graph is recorded.

    The function itself runs, and `report` counts it with the reason, where gradients are enabled, somebody else records
    a graph, `torch.jit.trace`, `torch.func`, `torch.vmap` or a dispatch mode looks on, an input lies on another device
    or is empty, or an argument is neither a tensor nor a plain value. `torch.compile` and `torch.export` see only the
    function. Graphs share one pool of memory on each device, so replays on different streams wait for one another, and
    threads take turns.

    Copies and pickles take the function and the limit, not the graphs.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        limit: int = 8,
        backend: GraphBackend | None = None,
        held: Callable[[], Any] | None = None,
    ) -> None:
        """
        Args:
            function: its arguments and its result may be nested in tuples, lists, dicts and model outputs.
            limit: graphs kept; beyond it the least recently used is dropped. One more lives while it is recorded.
            backend: what records; CUDA's graphs if None.
            held: gives what a new graph has to keep alive beside the tensors that torch's operators were seen to
                read: what kernels launched without an operator read.
        """
        if type(limit) is not int or limit < 1:
            raise ValueError(f"limit is {limit!r}; the number of graphs kept must be an integer of at least 1")
        self.function = function
        self.limit = limit
        self._held = held
        self._backend: GraphBackend = CudaGraphs() if backend is None else backend
        self._recordings: OrderedDict[Hashable, _Recording] = OrderedDict()
        self._counts = _Counts()
        self._lock = threading.RLock()
        self._counts_lock = threading.Lock()  # taken inside another cache's recording, where no other may be waited for

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The function's result, in memory of its own. The first call with a form records, which takes several runs.

        Raises:
            RuntimeError: the function ran, and cannot be recorded.
        """
        if torch.compiler.is_compiling():
            return self.function(*args, **kwargs)
        tensors: list[Tensor] = []
        given = (args, dict(sorted(kwargs.items())))
        form = _form(given, tensors)
        reason = self._reason_for_plain(form, tensors)
        if reason is not None:
            with self._counts_lock:
                self._counts.plain[reason] += 1
            return self.function(*args, **kwargs)
        device = tensors[0].device
        key = (form, *_surroundings(device.type))
        with self._lock, self._backend.turn(device):
            recording = self._recordings.get(key)
            if recording is None:
                recording = self._record(given, tensors)
                self._recordings[key] = recording
                self._drop_beyond(self.limit)
            self._recordings.move_to_end(key)
            self._counts.replayed += 1
            return recording.replay(tensors)

    def __len__(self) -> int:
        """Graphs kept."""
        return len(self._recordings)

    def report(self) -> GraphReport:
        """What is kept, and how often what was done."""
        with self._lock, self._counts_lock:
            counts = self._counts
            return GraphReport(
                self.limit,
                tuple(recording.name for recording in self._recordings.values()),
                counts.recorded,
                counts.replayed,
                counts.dropped,
                dict(counts.plain),
            )

    def clear(self) -> None:
        """Give up every graph and its memory, once the device has done with them."""
        with self._lock:
            self._drop_beyond(0)

    def __getstate__(self) -> tuple[Any, ...]:
        return self.function, self.limit, type(self._backend), self._held

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        function, limit, backend, held = state
        self.__init__(function, limit, backend(), held)  # type: ignore[misc]

    def _reason_for_plain(self, form: Hashable | None, tensors: Sequence[Tensor]) -> str | None:
        if torch.is_grad_enabled():
            return "gradients are enabled: call under torch.inference_mode() or torch.no_grad()"
        if torch._C._are_functorch_transforms_active():
            return "a torch.func transform is running"
        if torch.jit.is_tracing():
            return "torch.jit.trace is running"
        if is_in_torch_dispatch_mode():
            return "a dispatch mode is active"
        if form is None:
            return "an argument is neither a tensor nor a plain value"
        return _unrecordable(tensors, self._backend)

    def _record(self, given: tuple[tuple[Any, ...], dict[str, Any]], tensors: Sequence[Tensor]) -> _Recording:
        """Warm up twice, the second time to see which tensors are read, and record."""
        device = tensors[0].device
        with torch.inference_mode(False), torch.no_grad():  # buffers that may be written in either mode
            inputs = [torch.empty_like(x, memory_format=_memory_format(x)).copy_(x) for x in tensors]
        following = iter(inputs)
        args, kwargs = pytree.tree_map(lambda leaf: next(following) if isinstance(leaf, Tensor) else leaf, given)
        seen = _SeenTensors()

        def run() -> Any:
            with _autocast_without_cache(device.type):
                return self.function(*args, **kwargs)

        def run_and_see() -> Any:
            with seen:
                return run()

        self._backend.warm_up(run, device)
        self._backend.warm_up(run_and_see, device)
        name = ", ".join(map(_describe, pytree.tree_leaves(given)))
        pool = next((other.graph.pool() for other in self._recordings.values() if other.device == device), None)
        try:
            graph, result = self._backend.record(run, device, pool)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise RuntimeError(
                f"a graph of {name} cannot be recorded, though the function itself runs: {error}. "
                "A recorded function must not wait for the device; call the function without a graph instead"
            ) from error
        self._counts.recorded += 1
        held = [*seen.tensors.values(), self._held() if self._held else None]
        return _Recording(device, inputs, graph, *pytree.tree_flatten(result), held, name)

    def _drop_beyond(self, count: int) -> None:
        while len(self._recordings) > count:
            _, recording = self._recordings.popitem(last=False)
            self._backend.drain(recording.device)
            recording.graph.reset()
            self._counts.dropped += 1


class _SeenTensors(TorchDispatchMode):
    """Collects the tensors that operators are given and none of them has made, one for each storage."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors: dict[int, Tensor] = {}
        self._made: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for address, tensor in _by_address((args, kwargs)):
            if address not in self._made:
                self.tensors.setdefault(address, tensor)
        result = func(*args, **(kwargs or {}))
        self._made.update(address for address, _ in _by_address(result))
        return result


def _by_address(tree: Any) -> Iterator[tuple[int, Tensor]]:
    for leaf in pytree.tree_leaves(tree):
        if isinstance(leaf, Tensor):
            yield leaf.untyped_storage().data_ptr(), leaf


def _unrecordable(tensors: Sequence[Tensor], backend: GraphBackend) -> str | None:
    """What is wrong with the inputs, or with the stream that they come on."""
    if not tensors:
        return "no input is a tensor"
    device = tensors[0].device
    if any(x.device.type != backend.device_type or x.device != device for x in tensors):
        return f"not all inputs are on one {backend.device_type} device"
    if any(type(x) not in (Tensor, nn.Parameter) or x.layout != torch.strided for x in tensors):
        return "an input is a tensor of a special kind"
    if any(x.numel() == 0 for x in tensors):
        return "an input is empty"
    return "a graph is being recorded" if backend.is_recording(device) else None


def _form(value: Any, tensors: list[Tensor]) -> Hashable | None:
    """What a graph depends on in an argument, whose tensors go into `tensors`; None where a part of it is unknown.

    Floats count by their bits, so that -0.0 is not 0.0 and NaN is NaN.
    """
    kind = type(value)
    if isinstance(value, Tensor):
        tensors.append(value)
        return value.shape, value.dtype, value.device, _memory_format(value)
    if kind in _CONSTANTS:
        return kind, value.hex() if kind is float else value
    if kind is dict:
        parts = [_form(part, tensors) for part in value.values()]
        return None if None in parts else (tuple(value), *parts)
    if kind in (tuple, list):
        parts = [_form(part, tensors) for part in value]
        return None if None in parts else (kind, *parts)
    return None


def _memory_format(tensor: Tensor) -> torch.memory_format:
    """Of the buffer that stands for the tensor: channels last as it is, any other strides contiguous."""
    if tensor.ndim == 4 and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format


def _surroundings(device_type: str) -> tuple[Hashable, ...]:
    """The global switches that choose kernels."""
    autocast = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None
    return autocast, torch.backends.cuda.matmul.fp32_precision, torch.are_deterministic_algorithms_enabled()


def _autocast_without_cache(device_type: str) -> torch.autocast:
    """Autocast as it is, without its cache of cast weights: it ends with autocast, and the graph does not."""
    return torch.autocast(
        device_type,
        dtype=torch.get_autocast_dtype(device_type),
        enabled=torch.is_autocast_enabled(device_type),
        cache_enabled=False,
    )


def _describe(leaf: Any) -> str:
    if isinstance(leaf, Tensor):
        return f"{str(leaf.dtype).removeprefix('torch.')}{list(leaf.shape)} on {leaf.device}"
    return repr(leaf)
