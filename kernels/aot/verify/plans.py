"""What a case launches, found without a compiler: it shows which results are out of date or damaged."""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple
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
from .operators import PATCH_RESULTS, as_on_gpu, prepare
from .sources import kernel_name

LaunchKernel = Callable[..., None]


class Plan(NamedTuple):
    """What one order of warps of a case launches and returns."""

    hash: str  # of all launches
    tiles: Mapping[str, str]  # by kernel: see tile_name
    launches: int
    results: frozenset[str]  # the names


@functools.cache
def plan_of(case: Case, triton_version: str) -> Plan:
    """Return the plan of a case.

    In its hash count the grid, warps, stages, constants and other numbers of each launch, and the dtypes, shapes,
    strides and alignment of tensors. Triton's release counts because launchers avoid the faults of some.
    """
    if isinstance(case, PatchCase):
        # The plan of patch embedding is C++, which the hash of its source includes.
        plan = [repr([loop[:4] for loop in loops(case)])]
        return Plan(_hash(plan), patch_tiles(case), 1, frozenset(PATCH_RESULTS))
    prepared, described, tiles = prepare(case), list[str](), dict[str, str]()

    def note(kernel: Any, programs: int, arguments: Arguments, **options: int) -> None:
        named = by_name(arguments)
        values = {name: _described(value) for name, value in named.items()}
        described.append(repr((kernel.__name__, programs, values, sorted(options.items()))))
        tiles[kernel_name(kernel.__name__)] = tile_name(named, options)

    with (
        as_on_gpu(case),
        launching_for(case.capability, prepared.num_sms),
        launching_by(note),
        mock.patch.object(triton, "__version__", triton_version),
    ):
        results = prepared.launch()
    return Plan(_hash(described), tiles, len(described), frozenset(results))


def _hash(described: list[str]) -> str:
    return hashlib.sha256("\n".join(described).encode()).hexdigest()[:8]


def tile_name(arguments: Mapping[str, Any], options: Mapping[str, int]) -> str:
    """Return blocks, warps and stages of a launch as text: "64x64x64 4w 4s"."""
    blocks = [arguments[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K") if name in arguments]
    words = ["x".join(map(str, blocks))] if len(blocks) > 1 else []
    return " ".join(words + [f"{options[name]}{name[4]}" for name in ("num_warps", "num_stages") if name in options])


def patch_tiles(case: PatchCase) -> dict[str, str]:
    """Return the tile that is compiled into patch embedding, by kernel."""
    return {loop.kernel: "x".join(map(str, loop.tile)) for loop in loops(case)}


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
