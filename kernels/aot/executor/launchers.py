"""Run the package's launchers on CPU tensors as on a GPU. The caller chooses the GPU's compute capability."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

from triton.runtime.jit import JITFunction

from ...attention import inputs
from ...attention import launch as attention
from ...common import device, gpu
from ...linear_gelu import launch as linear_gelu
from ...residual_norm import launch as residual_norm
from ..compile import require_compiler
from .driver import ExecutorDriver
from .launch import Options


@contextlib.contextmanager
def on_gpu(
    capability: int, num_sms: int, options: Options | None = None, edit: Callable[[str], str] | None = None
) -> Iterator[ExecutorDriver]:
    """Execute the launches of attention, linear GELU and residual norm.

    Tiles, bias layouts and splits are those of the GPU.

    Args:
        capability: Compute capability, 80 for 8.0.
        num_sms: Number of SMs, by which the launchers choose splits.
        options: How kernels are executed.
        edit: Changes the PTX of every kernel before it is executed.

    Raises:
        RuntimeError: If TRITON_INTERPRET is set.
    """
    require_compiler()
    run = JITFunction.run

    @functools.wraps(run)
    def run_compiled(self: Any, *args: Any, **kwargs: Any) -> Any:
        # Launchers set UPCAST for CPU tensors, which Triton's interpreter needs.
        if "UPCAST" in kwargs:
            kwargs["UPCAST"] = False
        return run(self, *args, **kwargs)

    with launching_for(capability, num_sms), contextlib.ExitStack() as stack:
        _replace(stack, JITFunction, "run", run_compiled)
        yield stack.enter_context(ExecutorDriver(capability, options, edit))


@contextlib.contextmanager
def launching_for(capability: int, num_sms: int) -> Iterator[None]:
    """Let the launchers choose for CPU tensors as on a GPU.

    They choose tiles, bias layouts, splits, and what avoids faults of the compiler.
    """
    architecture = gpu.architecture_class(*divmod(capability, 10))
    with contextlib.ExitStack() as stack:
        for module in (inputs, linear_gelu):
            _replace(stack, module, "architecture_of", lambda tensor: architecture)
        _replace(stack, device, "capability_of", lambda tensor: capability)
        for module in (attention, residual_norm):
            _replace(stack, module, "num_sms_of", lambda tensor: num_sms)
        yield


def _replace(stack: contextlib.ExitStack, owner: Any, name: str, value: Any) -> None:
    """Set an attribute until the stack closes."""
    stack.callback(setattr, owner, name, getattr(owner, name))
    setattr(owner, name, value)
