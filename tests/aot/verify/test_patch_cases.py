"""Patch embedding among the executed cases: nvcc compiles it, and its results are in files of their own."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="needs Triton")
if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
    pytest.skip("the Triton interpreter and compiler cannot share a process", allow_module_level=True)

from beit_fast.kernels.aot import nvcc
from beit_fast.kernels.aot.verify import __main__ as command
from beit_fast.kernels.aot.verify import check, loops, mutate, patch_table, sources
from beit_fast.kernels.aot.verify.cases import DTYPES, PatchCase
from beit_fast.kernels.aot.verify.mutations import Limits
from beit_fast.kernels.aot.verify.patch_table import PATCH_CAPABILITIES, patch_cases
from beit_fast.kernels.aot.verify.result_files import Results

from ...support.nvcc import needs_nvcc
from .rows import row_of

CASE = PatchCase(80, "bf16", "uint8", "bf16", "small", (28, 32), (7, 8), 72, "contiguous")


@needs_nvcc
@pytest.mark.parametrize("capability", PATCH_CAPABILITIES)
def test_check_of_patch_embed_returns_errors_within_the_budget(capability: int) -> None:
    row = check.check(CASE._replace(capability=capability), check.SCHEDULES[:2])
    assert row["kernels"] == {"patch_embed": f"64x64x64 {sources.source_hash('patch_embed')}"}
    assert row["launches"] == 2
    assert 0 < row["errors"]["lockstep"]["tokens"] < row["budgets"]["tokens"]
    assert list(row["errors"].values())[1:] == [check.SAME_BITS]
    assert row["wrong"] == []
    assert row["hazards"] == {}


@needs_nvcc
@pytest.mark.parametrize(
    ("kind", "verdict"),
    [
        ("copy from 16 bytes further", "wrong numbers"),
        ("wait for one group of copies less", "PipelineError"),
        ("rows of a first factor exchanged", "wrong numbers"),
    ],
)
def test_judge_of_a_broken_patch_embed_returns_the_fault(kind: str, verdict: str) -> None:
    subject = mutate.Subject("patch_embed_kernel", CASE)
    assert [found.text for found in mutate.judge(subject, Limits(1, 1), kind)] == [verdict]


@pytest.mark.parametrize(
    ("capability", "nvcc_found", "broken"), [(80, True, True), (100, True, False), (80, False, False)]
)
def test_kernels_of_has_patch_embed_where_nvcc_compiles_it(
    capability: int, nvcc_found: bool, broken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mutate, "nvcc_version", lambda: "13.0.88" if nvcc_found else None)
    assert ("patch_embed" in mutate.kernels_of(capability)) is broken
    assert set(mutate.KERNELS) - set(mutate.kernels_of(capability)) <= {"patch_embed"}


@pytest.mark.parametrize("capability", PATCH_CAPABILITIES)
def test_patch_cases_cover_every_tile_dtype_and_read(capability: int) -> None:
    cases = [case for case in patch_cases(capability) if isinstance(case, PatchCase)]
    assert len(set(map(str, cases))) == len(cases)
    assert all(loop.counts for case in cases for loop in loops.loops(case))
    # Also the buffers of the pipeline, of which there are three, are used again.
    assert any(loop.whole_steps > 3 for case in cases if case.tile == "small" for loop in loops.loops(case))
    found = {(case.tile, case.dtype, case.pixels, case.layout) for case in cases}
    layouts = {layout for layout, *_ in patch_table.READS}
    assert found == {
        (tile, dtype, pixels, layout)
        for tile in loops.PATCH_TILES
        for dtype in DTYPES
        for pixels in patch_table.PIXELS
        for layout in layouts
    }
    assert {(case.tile, case.form) for case in cases} == {
        (tile, form) for tile in loops.PATCH_TILES for form in patch_table.ABSENT
    }


def test_patch_tiles_are_those_of_the_kernel() -> None:
    text = (sources.CUDA_FOLDER / "cuda" / "patch_embed" / "arguments.cuh").read_text()
    shipped = re.findall(r"using (\w+)Tile = Tile<(\d+), (\d+), (\d+)>", text)
    assert {name.lower(): tuple(map(int, sizes)) for name, *sizes in shipped} == loops.PATCH_TILES
    assert f"kSlabBytes = {loops.SLAB_BYTES};" in text


def test_source_hash_of_cuda_ignores_comments_and_follows_includes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(sources.CUDA_FOLDER / "cuda", tmp_path / "cuda")
    monkeypatch.setattr(sources, "CUDA_FOLDER", tmp_path)
    gather = tmp_path / "cuda" / "patch_embed" / "gather.cuh"
    text = gather.read_text()

    def hash_of(changed: str) -> str:
        gather.write_text(changed)
        sources.source_hash.cache_clear()
        return sources.source_hash("patch_embed")

    try:
        first = hash_of(text)
        assert first == hash_of(text.replace("#pragma once", "/* a\ncomment */\n#pragma once  // another") + "\n")
        assert first != hash_of(text + "constexpr int kNew = 1;")
        unrelated = tmp_path / "cuda" / "patch_embed" / "operator.cu"
        unrelated.write_text(unrelated.read_text() + "int unrelated;")
        assert first == hash_of(text)
    finally:
        sources.source_hash.cache_clear()


def test_results_of_another_cuda_source_are_not_current(tmp_path: Path) -> None:
    results = Results("nvcc-13.0.88", 80, [CASE], tmp_path)
    assert results.file == tmp_path / "nvcc-13.0.88" / "sm_80.jsonl"
    results.add(row_of(CASE))
    assert results.current(CASE) is not None
    results.add(row_of(CASE, kernels={"patch_embed": "64x64x64 0123456789ab"}))
    assert results.current(CASE) is None


@pytest.fixture
def only_patch_embed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Leave one case in the table, and record which cases run."""
    ran: list[str] = []
    monkeypatch.setattr(command, "cases_of", lambda capability, version: [])
    monkeypatch.setattr(command, "patch_cases", lambda capability: [CASE])
    monkeypatch.setattr(command, "check", lambda case, schedules: ran.append(str(case)) or row_of(case))
    return ran


def test_main_runs_patch_embed_once_for_all_releases_of_triton(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, only_patch_embed: list[str]
) -> None:
    monkeypatch.setattr(command, "nvcc_version", lambda: "13.0.88")
    for version in ("3.7.1", "3.9.0"):
        monkeypatch.setattr(command.triton, "__version__", version)
        assert command.main(["80", "--results", str(tmp_path)]) == 0
    assert only_patch_embed == [str(CASE)]


def test_main_without_nvcc_reports_patch_embed_as_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], only_patch_embed: list[str]
) -> None:
    monkeypatch.setattr(command, "nvcc_version", lambda: None)
    assert command.main(["80", "--results", str(tmp_path)]) == 1
    printed = capsys.readouterr().out
    assert f"{nvcc.MISSING}: patch_embed does not run" in printed
    assert "1 of 1 cases have not run" in printed
    assert f"1 of them are cases of patch_embed: {nvcc.MISSING}" in printed
    # Results of another machine are valid as long as the source is the same.
    Results("nvcc-12.8.93", 80, [CASE], tmp_path).add(row_of(CASE))
    assert command.main(["80", "--results", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "3 launches, 0 wrong, 0 hazards"
    assert only_patch_embed == []


def test_compiled_without_nvcc_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvcc, "find_nvcc", lambda: None)
    with pytest.raises(RuntimeError, match="nvcc was not found"):
        nvcc.compiled(sources.CUDA_FOLDER / "errors.cpp", ".o")
