"""A Triton driver that executes launches on CPU tensors.

    with ExecutorDriver(80) as driver:
        kernel[grid](*cpu_tensors, ...)

Triton specializes and compiles as for a GPU of that compute capability. The launch binds parameters as Triton's CUDA
launcher does. These are the arguments of the signature that are not constants, tuples flattened, and two pointers to
scratch memory behind them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import torch
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver

from . import kernel_code, launch
from .dtypes import UNINITIALIZED, Array
from .global_memory import GlobalMemory
from .kernel_code import Code
from .launch import Launch, Options
from .parameters import Argument, bind

SHARED_MEMORY = 227 * 1024
"""Bytes of shared memory that Triton may use; its compiler has no other limit."""


class ExecutorDriver(DriverBase):
    """Triton's active driver inside `with`.

    Args:
        capability: Compute capability, 80 for 8.0.
        options: How kernels are executed.
        edit: Changes the PTX of every kernel before it is executed.
    """

    def __init__(
        self, capability: int, options: Options | None = None, edit: Callable[[str], str] | None = None
    ) -> None:
        self.capability = capability
        self.options = options or Options()
        self.edit = edit
        self.launches: list[Launch] = []
        self.launcher_cls = _Launcher
        self.utils = SimpleNamespace(load_binary=self._load_binary, get_device_properties=self._device_properties)
        self._loading = ""
        self._stack = contextlib.ExitStack()

    @classmethod
    def is_active(cls) -> bool:
        return False

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError("the launcher of the executor is not compiled")

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        # Triton caches compiled kernels by device, so each target has a device of its own.
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> Any:
        raise NotImplementedError("executed kernels are not timed")

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            stack.callback(setattr, driver, "_active", driver._active)
            driver.set_active(self)
            stack.enter_context(marked_allocations())
            knobs.runtime.kernel_load_start_hook.add(self._remember_ptx)
            stack.callback(knobs.runtime.kernel_load_start_hook.remove, self._remember_ptx)
            stack.enter_context(knobs.runtime.scope())
            knobs.runtime.add_stages_inspection_hook = without_machine_code
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    @staticmethod
    def _device_properties(device: int) -> dict[str, int]:
        return {"max_shared_mem": SHARED_MEMORY}

    def _remember_ptx(self, module: Any, function: Any, name: str, files: dict[str, str], key: str) -> None:
        self._loading = next(Path(path).read_text() for path in files.values() if str(path).endswith(".ptx"))

    def _load_binary(self, name: str, cubin: bytes, shared: int, device: int) -> tuple[None, str, int, int, int]:
        """Return the PTX as the handle of the function."""
        return None, self._loading, 0, 0, 1024

    def execute(self, ptx: str, shared: int, grid: tuple[int, int, int], arguments: Iterable[Argument]) -> Launch:
        """Execute a kernel that Triton compiled.

        Args:
            ptx: The module.
            shared: Bytes of shared memory of a CTA.
            grid: CTAs by axis.
            arguments: The arguments that are not constants.
        """
        program = self.load(ptx)
        memory = GlobalMemory()
        parameters = bind(program, memory, [*arguments, *_SCRATCH])
        threads = program.function.threads
        if threads is None:
            raise ValueError(f"{program.function.name} has no .reqntid")
        return self.launch(program, memory, parameters, grid, threads, shared)

    def load(self, ptx: str) -> Code:
        """Parse the module of a kernel, which `edit` may change before."""
        return kernel_code.load(self.edit(ptx) if self.edit else ptx)

    def launch(
        self,
        program: Code,
        memory: GlobalMemory,
        parameters: Array,
        grid: tuple[int, int, int],
        threads: int,
        shared: int,
    ) -> Launch:
        """Execute a kernel, see `launch.run`, and record the launch."""
        record = launch.run(program, memory, parameters, grid, (threads, 1, 1), shared, self.options)
        self.launches.append(record)
        return record


_SCRATCH = (Argument("global scratch", "i64", 0), Argument("profile scratch", "i64", 0))


class _Launcher:
    """Called by Triton for each launch of one compiled kernel."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self._signature = source.signature
        self._shared = metadata.shared
        refused = {
            "scratch memory": metadata.global_scratch_size or metadata.profile_scratch_size,
            "clusters": metadata.num_ctas != 1 or tuple(getattr(metadata, "cluster_dims", (1, 1, 1))) != (1, 1, 1),
            "cooperative grids": metadata.launch_cooperative_grid,
            "dependent launches": metadata.launch_pdl,
            "tensor descriptors": getattr(metadata, "tensordesc_meta", None),
        }
        names = [name for name, is_used in refused.items() if is_used]
        if names:
            raise NotImplementedError(f"{metadata.name} uses {', '.join(names)}")

    def __call__(self, x: int, y: int, z: int, stream: int, ptx: str, *rest: Any) -> None:
        # Two metadata objects and two hooks precede the kernel's arguments.
        arguments = flatten(self._signature.items(), rest[4:])
        active = driver.active
        assert isinstance(active, ExecutorDriver)
        active.execute(ptx, self._shared, (x, y, z), arguments)


def flatten(signature: Iterable[tuple[str, Any]], values: Iterable[Any]) -> Iterator[Argument]:
    """Yield the arguments that are not constants; those of tuples one by one."""
    for (name, kind), value in zip(signature, values, strict=True):
        if isinstance(kind, tuple):
            yield from flatten(((f"{name}[{place}]", part) for place, part in enumerate(kind)), value)
        elif kind != "constexpr":
            yield Argument(name, kind, value)


def without_machine_code(backend: Any = None, stages: Any = None, *rest: Any) -> tuple[str, str]:
    """Let Triton end with PTX: a hook, which is also asked for a part of the key of Triton's cache."""
    if stages is not None:
        stages["cubin"] = lambda ptx, metadata: b""
    return "ends with PTX", ""


@contextlib.contextmanager
def marked_allocations() -> Iterator[None]:
    """Fill what torch.empty and torch.empty_like return with the pattern of uninitialized memory."""

    def marking(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def allocate_marked(*args: Any, **kwargs: Any) -> Tensor:
            tensor = allocate(*args, **kwargs)
            storage = torch.tensor([], dtype=torch.uint8).set_(tensor.untyped_storage())
            half = torch.tensor([UNINITIALIZED & 0xFF, UNINITIALIZED >> 8], dtype=torch.uint8)
            storage.copy_(half.repeat(-(-len(storage) // 2))[: len(storage)])
            return tensor

        return allocate_marked

    originals = {name: getattr(torch, name) for name in ("empty", "empty_like")}
    for name, allocate in originals.items():
        setattr(torch, name, marking(allocate))
    try:
        yield
    finally:
        for name, allocate in originals.items():
            setattr(torch, name, allocate)
