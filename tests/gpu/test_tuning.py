"""The self-test and the tuner on a GPU."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from beit_fast.kernels.common import tuned_tiles
from beit_fast.tuning import selftest, tune, tune_jobs
from beit_fast.tuning.selftest_cases import Check, checks_for
from beit_fast.tuning.timer import clock_of

from ..support.devices import cuda_unsupported_reason

if _reason := cuda_unsupported_reason():
    pytest.skip(_reason, allow_module_level=True)

DEVICE = torch.device("cuda", torch.cuda.current_device())
SHAPE = tune_jobs.Shape((6, 12), 2, torch.bfloat16, heads=2, head_dim=32, hidden=64, intermediate=128)


def first_of_each_kernel() -> list[Check]:
    return list({check.kernel: check for check in reversed(checks_for(DEVICE, "triton"))}.values())


@pytest.mark.parametrize("check", first_of_each_kernel(), ids=lambda check: check.kernel)
def test_run_check_on_a_gpu_passes_with_graph_stream_and_times(check: Check) -> None:
    row = selftest.run_check(check, DEVICE, functools.partial(clock_of, DEVICE))
    assert row.passed, row.failures
    if row.served_by != "torch":
        assert {"CUDA graph", "second stream"} <= row.same_bits.keys()
    assert all(time > 0 for times in row.seconds.values() for time in times)


def test_count_kernels_counts_each_compiled_kernel_once() -> None:
    job = tune_jobs.jobs_of([SHAPE], DEVICE)[0]
    with selftest.count_kernels("triton") as count:
        trial = job.trial()
        trial.run()
        once = count()
        trial.run()
        assert count() == once > 0


@pytest.mark.parametrize("kernel", tuned_tiles.TILE_FIELDS)
def test_tune_on_a_gpu_chooses_a_tile_that_launches(
    kernel: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(tuned_tiles.VARIABLE, raising=False)
    tuned_tiles.forget_read_files()
    job = next(job for job in tune_jobs.jobs_of([SHAPE], DEVICE) if job.kernel == kernel)
    job = replace(job, tiles=job.tiles[:3])
    (outcome,) = tune.tune([job], DEVICE, functools.partial(clock_of, DEVICE), rounds=2)
    assert outcome.chosen is not None, outcome.excluded
    entries = tuned_tiles.read(tuned_tiles.file_of(tuned_tiles.identity_of(DEVICE)), tuned_tiles.identity_of(DEVICE))
    assert [entry.tile for entry in entries] == [outcome.chosen]
    assert tune.exclusion_reason(kernel, outcome.chosen, job.trial(), may_spill=True) is None
    tuned_tiles.forget_read_files()


def test_tune_tile_beyond_shared_memory_is_excluded() -> None:
    job = next(job for job in tune_jobs.jobs_of([SHAPE], DEVICE) if job.kernel == "linear_gelu")
    reason = tune.exclusion_reason("linear_gelu", (128, 128, 128, 4, 6), job.trial())
    assert reason is not None
    assert reason.startswith("does not run")
