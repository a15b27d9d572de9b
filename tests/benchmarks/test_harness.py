"""Cases of the benchmarks, and the command lines of the Makefile."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import bench_cpu_attention, bench_patch_embed
from benchmarks.baselines import attention, models
from benchmarks.harness import cases, hf_docs_cases, model_cases
from benchmarks.harness.cases import Case
from benchmarks.report import plot, plot_models, plot_patches, targets

from ..support.benchmarks import BENCHMARKS


def unique(names: Iterable[Any]) -> bool:
    listed = [str(name) for name in names]
    return len(set(listed)) == len(listed) > 0


def test_cases_have_unique_names() -> None:
    for full in (False, True):
        for device in ("cpu", "cuda"):
            assert unique(cases.cases(device, full))
            assert unique(hf_docs_cases.hf_docs_cases(device, full))
            assert unique(model_cases.model_cases(device, full))
        for bench in (bench_cpu_attention, bench_patch_embed):
            assert unique(bench.run_name(*run) for run in bench.runs(full))


def test_runs_have_all_cases_of_the_targets() -> None:
    quick = cases.cases("cuda", full=False)
    for mode in cases.MODES:
        sizes = {(case.batch, case.tokens) for case in quick if case.mode == mode and case.dtype == torch.bfloat16}
        assert sizes == {(64, 197), (32, 577), (8, 1025), (8, 1601), (1, 577), (1, 1025), (1, 1601)}
    on_cpu = {
        (case.mode, cases.DTYPE_NAMES[case.dtype], case.batch, case.tokens, threads)
        for case, threads in bench_cpu_attention.runs(full=True)
    }
    for threads in (1, 2):
        for dtype in ("fp32", "bf16", "fp16"):
            assert {("forward", dtype, 1, tokens, threads) for tokens in (197, 577, 1025, 1601)} < on_cpu
        assert {("training", "fp32", 1, tokens, threads) for tokens in (577, 1025)} < on_cpu
    assert ("training", "fp32", 1, 1601, 1) in on_cpu
    patches = {(case.mode, case.dtype, case.batch, threads) for case, threads in bench_patch_embed.runs(full=True)}
    asked = {(mode, dtype, 1, 2) for mode in bench_patch_embed.BASELINES for dtype in ("fp32", "bf16")}
    assert asked < patches
    for device in ("cpu", "cuda"):
        some, most, every = (
            model_cases.model_cases(device, *flags) for flags in ((False, False), (False, True), (True,))
        )
        assert set(some) <= set(most) <= set(every)
        assert not any(model_cases.too_long_reason(case) for case in most)
    assert [(c.mode, c.batch, c.height, c.width, c.dtype) for c in hf_docs_cases.hf_docs_cases("cuda")] == [
        ("training", 2, 1048, 640, "fp16"),
        *(("inference", batch, 224, 224, "fp16") for batch in (1, 4, 16, 32)),
    ]
    assert [(c.height, c.steps) for c in hf_docs_cases.hf_docs_cases("cpu")[:1]] == [(524, 3)]


def test_too_long_cases_have_a_reason_on_a_cpu_only() -> None:
    long, short = (model_cases.ModelCase("inference", "base", 640, batch, "fp32") for batch in (64, 1))
    assert (model_cases.too_long_reason(long) or "").startswith("time: 23.6 TFLOP a call")
    assert model_cases.too_long_reason(short) is None
    assert not any(map(model_cases.too_long_reason, model_cases.model_cases("cuda", full=True)))


def test_baselines_have_unique_names_and_looks_and_targets_name_them() -> None:
    names = {one.name for one in attention.BASELINES}
    of_models = {one.name for one in models.MODEL_BASELINES}
    of_patches = {name for of_mode in bench_patch_embed.BASELINES.values() for name in of_mode}
    assert unique(attention.BASELINES)
    assert unique(models.MODEL_BASELINES)
    for declared, looks in ((names, plot.STYLES), (of_models, plot_models.COLORS), (of_patches, plot_patches.COLORS)):
        assert declared == set(looks)
        assert unique(looks.values())
    named = {name for target in targets.TARGETS for name in (target.ours, target.baseline) if name is not None}
    assert named <= names | of_models | of_patches
    assert set().union(*bench_cpu_attention.COMPARED.values()) <= names
    learnable = {one.name for one in attention.BASELINES if one.learnable}
    assert {"flex_attention", "sdpa gathered bias efficient", "transformers sdpa"} <= learnable
    assert not any("prebuilt" in name or "without" in name or "cudnn" in name for name in learnable)


def test_counts_of_work_bytes_and_memory() -> None:
    forward, training, backward = (
        Case(mode, 8, (14, 14), torch.bfloat16, "cpu") for mode in ("forward", "training", "backward")
    )
    assert forward.flops == 4 * 8 * 12 * 197 * 197 * 64
    assert training.flops * 2 == forward.flops * 7
    assert backward.flops + forward.flops == training.flops
    assert forward.least_bytes(biased=False) == 4 * 8 * 197 * 768 * 2
    assert forward.least_bytes(biased=True) - forward.least_bytes(biased=False) == 732 * 12 * 2
    lse = 8 * 12 * 197 * 4  # written by the forward of a training step
    assert backward.least_bytes(True) + forward.least_bytes(True) + lse == training.least_bytes(True)
    docs = hf_docs_cases.hf_docs_cases("cpu", full=True)[0]
    one_matrix_per_layer = 12 * 2 * 12 * docs.tokens**2 * 4
    assert docs.bytes_needed(4) - docs.bytes_needed(0) == 4 * one_matrix_per_layer


def test_make_gpu_uses_the_given_python() -> None:
    command = ["make", "--dry-run", "gpu", "RESULTS=elsewhere", "COMMIT=0123abc", "GPU_PYTHON=some-python"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=BENCHMARKS.parent, check=True)
    assert "pip" not in done.stdout
    assert ".venv" not in done.stdout
    for target, bench in (("gpu-bench", "attention"), ("gpu-bench-models", "model")):
        assert (BENCHMARKS / f"bench_{bench}.py").exists()
        assert f"some-python -m pytest benchmarks/bench_{bench}.py --device=cuda" in done.stdout
        assert f'--rows="elsewhere/{target}.jsonl"' in done.stdout
        for module in ("plot", "targets"):
            assert (BENCHMARKS / "report" / f"{module}.py").exists()
            assert f'some-python -m benchmarks.report.{module} "elsewhere/{target}.jsonl"' in done.stdout


def dry_run(*arguments: str) -> str:
    command = ["make", "--dry-run", "gpu", "GPU_PYTHON=some-python", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=BENCHMARKS.parent, check=True).stdout


WHEEL_SECONDS = 30
"""Time to install Triton from a wheel."""


def gpu_stages(printed: str) -> dict[str, int]:
    """Return the stages of `make gpu` with their limits in seconds."""
    (stages,) = re.findall(r"for stage in (.*); do", printed)
    return {name: int(limit) for name, limit in (stage.split(":") for stage in stages.split())}


def test_make_gpu_takes_12_minutes_with_wheels_starts_and_kills() -> None:
    printed = dry_run()
    limits, (kill_after,) = gpu_stages(printed), re.findall(r"--kill-after=(\d+)", printed)
    assert sum(limit + int(kill_after) for limit in limits.values()) + WHEEL_SECONDS <= 12 * 60
    (budget,) = map(int, re.findall(r"GPU_BUDGET=(\d+)", printed))
    # Imports, the check of the library and the pictures come on top of what is measured.
    assert min(limits["bench"], limits["bench-models"]) >= budget + 20


def test_make_gpu_stages_have_the_documented_limits() -> None:
    page = (BENCHMARKS.parent / "docs" / "self-test-and-tuning.md").read_text()
    section = page.partition("## make gpu\n")[2]
    documented = [int(seconds) for seconds in re.findall(r"^\| .* \| (\d+) \|$", section, re.MULTILINE)]
    stages = gpu_stages(dry_run())
    assert documented == list(stages.values())
    assert f"leave {12 * 60 - sum(documented)} seconds" in section


def test_make_gpu_runs_the_self_test_first() -> None:
    printed = dry_run("RESULTS=elsewhere")
    assert list(gpu_stages(printed))[:2] == ["library", "selftest"]
    first, *others = [
        printed.find(f"elsewhere/gpu-{name}.jsonl") for name in ("selftest", "bench-parts", "bench", "tune")
    ]
    assert 0 < first < min(others)
    assert max(others) == others[-1]


def test_make_gpu_takes_triton_from_wheels(tmp_path: Path) -> None:
    (tmp_path / "triton-3.8.0-cp311.whl").touch()
    printed = dry_run(f"TRITON_WHEELS={tmp_path}")
    target = "--target build/gpu-triton triton"
    assert f'some-python -m pip install --no-deps --no-index --find-links "{tmp_path}" {target}' in printed


@pytest.mark.parametrize("is_folder", [True, False])
def test_make_gpu_folder_without_wheels_is_one_error(is_folder: bool, tmp_path: Path) -> None:
    folder = tmp_path if is_folder else tmp_path / "missing"
    (tmp_path / "torch-2.14.whl").touch()
    command = ["make", "--dry-run", "gpu-selftest", "GPU_PYTHON=some-python", f"TRITON_WHEELS={folder}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=BENCHMARKS.parent, check=False)
    message = f"TRITON_WHEELS={folder} has no wheel of Triton (expected a folder with triton-*.whl)"
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr


def test_make_gpu_installs_other_wheels_again(tmp_path: Path) -> None:
    """Each folder and each wheel is installed once, over what was there before."""
    shutil.copy(BENCHMARKS.parent / "Makefile", tmp_path)
    pip = tmp_path / "python"
    pip.write_text('#!/bin/sh\ncase "$*" in *" pip "*) echo install; mkdir -p build/gpu-triton;; esac\n')
    pip.chmod(0o755)
    wheels = [tmp_path / "one" / "triton-3.7.1.whl", tmp_path / "two wheels" / "triton-3.7.1.whl"]
    for wheel in wheels:
        wheel.parent.mkdir()
        wheel.touch()

    def installs(folder: str) -> int:
        command = ["make", "gpu-selftest", f"GPU_PYTHON={pip}", f"TRITON_WHEELS={folder}"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True)
        return done.stdout.splitlines().count("install")

    assert [installs("one") for _ in range(2)] == [1, 0]
    assert installs(str(tmp_path / "one")) == 0
    assert [installs("two wheels") for _ in range(2)] == [1, 0]
    assert installs("one") == 1
    wheels[0].rename(wheels[0].with_name("triton-3.8.0.whl"))
    assert installs("one") == 1
