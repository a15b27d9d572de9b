"""The committed results of `make verify-compiled`."""

from __future__ import annotations

import os

import pytest

pytest.importorskip("triton", reason="needs Triton")
if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
    pytest.skip("the Triton interpreter and compiler cannot share a process", allow_module_level=True)

from beit_fast.kernels.aot.compile import CAPABILITIES
from beit_fast.kernels.aot.verify.loops import checked_kernels
from beit_fast.kernels.aot.verify.patch_table import PATCH_CAPABILITIES, patch_cases
from beit_fast.kernels.aot.verify.result_files import FOLDER, Results, Row, read
from beit_fast.kernels.aot.verify.table import cases_of, is_refused
from beit_fast.kernels.common.compiler_hazards import EXECUTED

REQUIRED_CASES = 1500


def committed(version: str, capability: int) -> Results:
    return Results(version, capability, cases_of(capability, version))


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("version", EXECUTED)
def test_committed_results_are_of_every_case_with_the_kernels_and_tiles_as_they_are(
    version: str, capability: int
) -> None:
    results = committed(version, capability)
    missing = [str(case) for case in results.cases if results.current(case) is None]
    assert not missing, f"{len(missing)} of {len(results.cases)}, such as {missing[0]}: run `make verify-compiled`"


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("version", EXECUTED)
def test_committed_results_are_right_unless_the_pair_is_refused(version: str, capability: int) -> None:
    results = committed(version, capability)
    rows = {case: row for case, row in zip(results.cases, results.rows.values(), strict=True) if row is not None}
    assert rows
    for case, row in rows.items():
        assert len(row["errors"]) == 3 or is_refused(case, version), case
        if not is_refused(case, version):
            assert (row["wrong"], row["hazards"]) == ([], {}), case


@pytest.mark.parametrize("capability", PATCH_CAPABILITIES)
def test_committed_results_of_patch_embed_are_of_every_case_and_right(capability: int) -> None:
    versions = [folder.name for folder in FOLDER.glob("nvcc-*")]
    files = [Results(version, capability, patch_cases(capability)) for version in versions]
    for case in patch_cases(capability):
        rows = [row for file in files if (row := file.current(case)) is not None]
        assert rows, f"{case}: run `make verify-compiled`"
        assert all((row["wrong"], row["hazards"]) == ([], {}) for row in rows), case


def test_committed_budgets_of_a_case_are_the_same_for_every_release() -> None:
    """A budget is that of PyTorch on a CPU, which no release changes."""
    rows: dict[str, list[Row]] = {}
    for file in FOLDER.glob("*/*.jsonl"):
        for row in read(file):
            rows.setdefault(row["case"], []).append(row)
    compared = [found for found in rows.values() if len(found) > 1]
    assert len(compared) > 1000
    for first, *others in compared:
        for other in others:
            assert other["budgets"] == pytest.approx(first["budgets"], rel=0.1), first["case"]


def test_committed_results_show_the_faults_of_refused_pairs() -> None:
    results = committed("3.7.1", 100)
    refused = [results.rows[str(case)] for case in results.cases if is_refused(case, "3.7.1")]
    assert any(row is not None and row["wrong"] for row in refused)
    assert any(row is not None and row["hazards"] for row in refused)


def test_committed_results_hold_enough_distinct_cases() -> None:
    checked = {
        entry
        for version in EXECUTED
        for capability in CAPABILITIES
        for results in [committed(version, capability)]
        for case in results.cases
        if not is_refused(case, version) and results.current(case) is not None
        for entry in checked_kernels(case)
    }
    assert len(checked) >= REQUIRED_CASES
