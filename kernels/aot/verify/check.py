"""Run one case in several orders of warps and judge it."""

from __future__ import annotations

import contextlib
import gc
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ....tuning.reference import relative_error
from ...common.launch import Arguments, by_name, launch_kernel
from ...linear_gelu.kernel import linear_gelu_kernel
from .. import attention_variants, residual_norm_variants
from ..executor.errors import KernelError
from ..executor.kernel_code import load
from ..executor.launch import Launch, Options
from ..executor.launchers import on_gpu
from ..executor.schedule import HALVES, LOCKSTEP, Schedule
from .cases import Case, PatchCase
from .operators import Prepared, Results, as_on_gpu, prepare
from .plans import launching_by, patch_tiles, plan_of, tile_name
from .sources import kernel_name, source_hash

SCHEDULES = (Schedule(LOCKSTEP), Schedule(HALVES, 1), Schedule(HALVES, 2))
"""The orders of warps of the table."""
SAME_BITS = "same bits"

KERNELS = (*attention_variants.KERNELS.values(), *residual_norm_variants.KERNELS.values(), linear_gelu_kernel)

Edit = Callable[[str], str]


class Run(NamedTuple):
    """The results of a case in one order of warps."""

    results: Results
    launches: list[Launch]
    tiles: dict[str, str]  # by kernel


def run(
    case: Case,
    prepared: Prepared,
    schedule: Schedule,
    edit: Edit | None = None,
    tiles: dict[str, str] | None = None,
    collect: bool = True,
) -> Run:
    """Execute the launches of a case. Hazards are counted; other errors of a kernel are raised.

    `tiles` gets the kernels that were launched, also if one raises. Without `collect`, the first hazard is raised.
    """
    options = Options(schedule, collect=collect)
    tiles = {} if tiles is None else tiles
    with contextlib.ExitStack() as stack:
        stack.enter_context(as_on_gpu(case))
        stack.enter_context(_recorded(tiles))
        driver = stack.enter_context(on_gpu(case.capability, prepared.num_sms, options, edit))
        results = prepared.launch()
    if isinstance(case, PatchCase):
        tiles.update(patch_tiles(case))
    return Run(results, driver.launches, tiles)


@contextlib.contextmanager
def _recorded(tiles: dict[str, str]) -> Iterator[None]:
    """Note the blocks, warps and stages of each kernel that is launched."""

    def launch(kernel: Any, programs: int, arguments: Arguments, **options: int) -> None:
        tiles[kernel_name(kernel.__name__)] = tile_name(by_name(arguments), options)
        launch_kernel(kernel, programs, arguments, **options)

    with launching_by(launch):
        yield


def check(case: Case, schedules: Sequence[Schedule] = SCHEDULES) -> dict[str, Any]:
    """Run a case in each order of warps; return a row of the results, which JSON can hold.

    The row has the hash of the plan, the launched kernels with tile and source hash, and the number of launches. It
    also has the budgets, the errors in each order, hazards with their number in each order, and a list of what is
    wrong. If there are hazards, it has the whole text of the first one: source line, instruction, thread and address.
    """
    # Parsed kernels are many small objects, which the collector would visit again and again.
    gc.disable()
    try:
        return _check(case, schedules)
    finally:
        _forget_kernels()
        gc.enable()
        gc.collect()


def _check(case: Case, schedules: Sequence[Schedule]) -> dict[str, Any]:
    prepared = prepare(case)
    reference = prepared.reference()
    plan = plan_of(case, triton.__version__)
    row: dict[str, Any] = {"case": str(case), "plan": plan.hash, "kernels": {}, "launches": 0}
    row |= {"budgets": _rounded(reference.budgets), "errors": {}, "hazards": {}, "wrong": []}
    first: Results | None = None
    for schedule in schedules:
        tiles: dict[str, str] = {}
        try:
            done = run(case, prepared, schedule, tiles=tiles)
        # Anything that stops a kernel is a result: the other orders and cases go on.
        except Exception as error:
            row["wrong"].append(f"{schedule}: {type(error).__name__}: {error}")
            continue
        finally:
            row["kernels"] |= {name: f"{tile} {source_hash(name)}".strip() for name, tile in tiles.items()}
        row["launches"] += len(done.launches)
        for text, count in _hazards(done.launches).items():
            row["hazards"].setdefault(text, {})[str(schedule)] = count
        if row["hazards"] and "first hazard" not in row:
            row["first hazard"] = _first_hazard(case, prepared, schedule)
        if first is not None and _same_bits(first, done.results):
            row["errors"][str(schedule)] = SAME_BITS
            continue
        errors = {name: error_of(done.results[name], exact) for name, exact in reference.exact.items()}
        row["errors"][str(schedule)] = _rounded(errors)
        row["wrong"] += [
            f"{schedule}: {name}" for name, error in errors.items() if not error <= reference.budgets[name]
        ]
        if first is not None:
            # Kernels are deterministic.
            row["wrong"].append(f"{schedule}: other bits than in {next(iter(row['errors']))}")
        first = first or done.results
    return row


def _first_hazard(case: Case, prepared: Prepared, schedule: Schedule) -> str:
    """Return the whole text of the first hazard. Counting hazards loses it."""
    try:
        run(case, prepared, schedule, collect=False)
    except KernelError as error:
        return str(error)
    raise AssertionError(f"{case}, {schedule}: hazards were counted, and none is raised")


def _forget_kernels() -> None:
    """Drop compiled and parsed kernels: a table has thousands, of several megabytes each."""
    for kernel in KERNELS:
        kernel.device_caches.clear()
    load.cache_clear()


def error_of(actual: Tensor, exact: Tensor) -> float:
    return relative_error(actual, exact) if torch.isfinite(actual).all() else float("inf")


def _same_bits(first: Results, second: Results) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


def _hazards(launches: Sequence[Launch]) -> Counter[str]:
    """Count hazards by kernel and problem; lines and instructions differ from one version to the next."""
    counts: Counter[str] = Counter()
    for launch in launches:
        for hazard, count in launch.hazards.items():
            counts[f"{hazard.kind} in {kernel_name(hazard.kernel)}: {hazard.problem}"] += count
    return counts


def _rounded(numbers: dict[str, float]) -> dict[str, float]:
    return {name: float(f"{number:.2g}") for name, number in numbers.items()}
