"""What a case launches, found without a compiler: by its hash a result is known to be out of date."""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import triton
from torch import Tensor

from ...attention import inputs as attention_inputs
from ...attention import launch as attention
from ...common.launch import Arguments, by_name
from ...linear_gelu import launch as linear_gelu
from ...residual_norm import launch as residual_norm
from ..executor.launchers import launching_for
from .cases import Case, PatchCase
from .loops import loops
from .operators import as_on_gpu, prepare

LaunchKernel = Callable[..., None]


@functools.cache
def plan_hash(case: Case, triton_version: str) -> str:
    """Return a hash of all launches of a case.

    Of each launch count the grid, warps, stages, constants and other numbers, and the dtypes, shapes, strides and
    alignment of tensors. Triton's release counts because launchers avoid the faults of some.
    """
    # The plan of patch embedding is C++, which the hash of its source includes.
    is_patch = isinstance(case, PatchCase)
    plan = [repr([loop[:4] for loop in loops(case)])] if is_patch else _planned(case, triton_version)
    return hashlib.sha256("\n".join(plan).encode()).hexdigest()[:8]


def _planned(case: Case, triton_version: str) -> list[str]:
    prepared, plan = prepare(case), list[str]()

    def note(kernel: Any, programs: int, arguments: Arguments, **options: int) -> None:
        described = {name: _described(value) for name, value in by_name(arguments).items()}
        plan.append(repr((kernel.__name__, programs, described, sorted(options.items()))))

    with (
        as_on_gpu(case),
        launching_for(case.capability, prepared.num_sms),
        launching_by(note),
        mock.patch.object(triton, "__version__", triton_version),
    ):
        prepared.launch()
    return plan


def _described(value: Any) -> object:
    """Return what a launch sees of an argument. Numbers in memory do not count."""
    if isinstance(value, tuple):
        return tuple(map(_described, value))
    if not isinstance(value, Tensor):
        return value
    return str(value.dtype), tuple(value.shape), value.stride(), value.data_ptr() % 16


@contextlib.contextmanager
def launching_by(launch: LaunchKernel) -> Iterator[None]:
    """Call `launch` inside `with` in the place of `common.launch.launch_kernel`."""
    with contextlib.ExitStack() as stack:
        for module in (attention, attention_inputs, linear_gelu, residual_norm):
            stack.enter_context(mock.patch.object(module, "launch_kernel", launch))
        yield
