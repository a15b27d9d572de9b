"""One executed case as a row of the results, and the commands that keep and add up rows."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton", reason="needs Triton")
if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
    pytest.skip("the Triton interpreter and compiler cannot share a process", allow_module_level=True)

from beit_fast.kernels.aot.verify import __main__ as command  # noqa: E402
from beit_fast.kernels.aot.verify import check, operators, sources, table  # noqa: E402
from beit_fast.kernels.aot.verify.cases import Case, LinearCase, NormCase, PatchCase  # noqa: E402
from beit_fast.kernels.aot.verify.result_files import Results, read, result_file  # noqa: E402
from beit_fast.kernels.aot.verify.rows import Row, is_current  # noqa: E402
from beit_fast.kernels.common.compiler_hazards import compiler_hazards  # noqa: E402

from .rows import row_of  # noqa: E402

REFUSED = next(version for version in ("3.6.0", "3.7.1") if compiler_hazards(100, version))
LINEAR = LinearCase(80, "bf16", 70, 144, 72)


@pytest.fixture(autouse=True)
def _no_patch_embed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the cases of nvcc, which have tests of their own."""
    monkeypatch.setattr(command, "patch_cases", lambda capability: [])


def test_check_returns_errors_within_the_budget_and_the_tile() -> None:
    row = check.check(LINEAR, check.SCHEDULES[:2])
    assert json.loads(json.dumps(row)) == row
    assert row["kernels"] == {"linear_gelu": f"64x64x64 4w 4s {sources.source_hash('linear_gelu')}"}
    assert row["launches"] == 2
    assert 0 < row["errors"]["lockstep"]["out"] < row["budgets"]["out"]
    assert row["errors"]["halves 1"] == check.SAME_BITS
    assert row["wrong"] == []
    assert row["hazards"] == {}


def test_check_of_a_launch_that_fails_keeps_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise ValueError("no such tile")

    monkeypatch.setattr(check, "run", fail)
    row = check.check(LINEAR, check.SCHEDULES[:1])
    assert row["wrong"] == ["lockstep: ValueError: no such tile"]
    assert not is_current(row, LINEAR, triton.__version__)


def test_check_of_a_kernel_that_raises_names_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise ValueError("a deadlock")

    monkeypatch.setattr(check, "launch_kernel", fail)
    row = check.check(LINEAR)
    assert row["wrong"] == [f"{order}: ValueError: a deadlock" for order in check.SCHEDULES]
    assert is_current(row, LINEAR, triton.__version__)


def test_check_of_wrong_numbers_names_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    prepare = operators.prepare

    def with_other_reference(case: Case) -> operators.Prepared:
        prepared = prepare(case)
        exact, budgets = prepared.reference()
        return prepared._replace(reference=lambda: operators.Reference({"out": 1.1 * exact["out"]}, budgets))

    monkeypatch.setattr(check, "prepare", with_other_reference)
    assert check.check(LINEAR, check.SCHEDULES[:1])["wrong"] == ["lockstep: out"]


def test_source_hash_ignores_comments_and_follows_imports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def hashes(kernel_file: str, shared_file: str) -> str:
        (tmp_path / "linear_gelu").mkdir(exist_ok=True)
        (tmp_path / "common").mkdir(exist_ok=True)
        (tmp_path / "linear_gelu" / "kernel.py").write_text(kernel_file)
        (tmp_path / "common" / "primitives.py").write_text(shared_file)
        sources.source_hash.cache_clear()
        sources._with_imports.cache_clear()
        return sources.source_hash("linear_gelu")

    monkeypatch.setattr(sources, "FOLDER", tmp_path)
    try:
        kernel, shared = "from ..common.primitives import f\nx = f(1)\n", "def f(x):\n    return x\n"
        first = hashes(kernel, shared)
        assert first == hashes('"""Doc."""\n' + kernel, 'def f(x):\n    """Doc."""\n    return (x)  # comment\n')
        assert first != hashes(kernel, shared.replace("return x", "return -x"))
        assert first != hashes(kernel.replace("1", "2"), shared)
    finally:
        sources.source_hash.cache_clear()
        sources._with_imports.cache_clear()


def test_results_keep_rows_in_the_order_of_the_table(tmp_path: Path) -> None:
    cases: list[Case] = [LINEAR, NormCase(80, "bf16", "bf16", 768), NormCase(80, "fp32", "fp32", 768)]
    results = Results("3.7.1", 80, cases, tmp_path)
    for case in reversed(cases[1:]):
        results.add(row_of(case, "3.7.1"))
    lines = result_file("3.7.1", 80, tmp_path).read_text().splitlines()
    assert [json.loads(line)["case"] for line in lines] == [str(case) for case in cases[1:]]
    again = Results("3.7.1", 80, cases, tmp_path)
    assert [again.current(case) is not None for case in cases] == [False, True, True]


def test_results_of_two_processes_keep_the_rows_of_both(tmp_path: Path) -> None:
    cases: list[Case] = [LINEAR, NormCase(80, "bf16", "bf16", 768)]
    first, second = (Results("3.7.1", 80, cases, tmp_path) for _ in range(2))
    first.add(row_of(cases[0]))
    second.add(row_of(cases[1]))
    assert [row["case"] for row in read(first.file)] == [str(case) for case in cases]


def test_results_of_another_source_are_not_current(tmp_path: Path) -> None:
    results = Results(triton.__version__, 80, [LINEAR], tmp_path)
    results.add(row_of(LINEAR, kernels={"linear_gelu": "64x64x64 4w 4s 0123456789ab"}))
    assert results.current(LINEAR) is None


def test_check_of_a_hazard_keeps_the_whole_text_of_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    run = check.run

    def without_barriers(*arguments: Any, **options: Any) -> check.Run:
        return run(*arguments, **options, edit=lambda ptx: ptx.replace("bar.sync", "// bar.sync"))

    monkeypatch.setattr(check, "run", without_barriers)
    row = check.check(LINEAR, check.SCHEDULES[:1])
    assert any(text.startswith("RaceError in linear_gelu") for text in row["hazards"])
    assert "kernel.py:" in row["first hazard"]
    assert "thread" in row["first hazard"]


def test_check_of_a_result_that_is_written_twice_names_the_place(monkeypatch: pytest.MonkeyPatch) -> None:
    run = check.run

    def stored_twice(*arguments: Any, **options: Any) -> check.Run:
        return run(*arguments, **options, edit=lambda ptx: re.sub(r"((?:@%p\d+ )?st\.global[^;]*;)", r"\1 \1", ptx))

    monkeypatch.setattr(check, "run", stored_twice)
    row = check.check(LINEAR, check.SCHEDULES[:1])
    ((hazard, counts),) = row["hazards"].items()
    assert hazard.startswith("RewriteError in linear_gelu: writes what its CTA wrote before in the same launch, in ")
    assert list(counts) == ["lockstep"]
    assert row["first hazard"].startswith("RewriteError in linear_gelu_kernel: ")
    for part in ("from kernel.py:", "st.global", "thread 0 of CTA 0", "+0 bytes"):
        assert part in row["first hazard"]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["75"], "compute capabilities [75] are not supported (expected 80,"),
        (["--quick", "70"], "compute capabilities [70] are not supported"),
        (["--summary", "3.9.0", "80"], "takes releases of Triton, such as 3.9.0, and not 80"),
        (["--jobs", "0"], "--jobs is 0 (expected 1 or more)"),
        (["--quick", "--only", "bf16"], "--only and --summary do not go with it"),
        (["80", "--only", "bf17"], "no case contains 'bf17'; the first one is 'attention sm_80"),
    ],
)
def test_main_with_wrong_options_exits(arguments: list[str], error: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        command.main(arguments)
    assert stopped.value.code == 2
    assert error in capsys.readouterr().err


def test_main_resumes_with_the_cases_that_are_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cases: list[Case] = [LINEAR, NormCase(80, "bf16", "bf16", 768)]
    monkeypatch.setattr(command, "cases_of", lambda capability, version: cases)
    ran = []

    def record(case: Case, schedules: Any) -> Row:
        ran.append(case)
        return row_of(case)

    monkeypatch.setattr(command, "check", record)
    Results(triton.__version__, 80, cases, tmp_path).add(row_of(cases[0]))
    assert command.main(["80", "--results", str(tmp_path)]) == 0
    assert ran == cases[1:]
    assert capsys.readouterr().out.splitlines()[-1] == "12 launches, 0 wrong, 0 hazards"


def test_main_summary_fails_for_hazards_unless_the_pair_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    linear = LINEAR._replace(capability=100)
    monkeypatch.setattr(command, "cases_of", lambda capability, version: [linear])
    for version in (REFUSED, "3.9.0"):
        hazards = {"RaceError in linear_gelu: a race": {"lockstep": 2}}
        row = row_of(linear, version, hazards=hazards, wrong=["lockstep: out"])
        Results(version, 100, [linear], tmp_path).add(row)
    assert command.main(["100", "--results", str(tmp_path), "--summary", REFUSED]) == 0
    assert "refused pairs, recorded only: 3 launches, 1 wrong, 2 hazards" in capsys.readouterr().out
    assert command.main(["100", "--results", str(tmp_path), "--summary", "3.9.0"]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "3 launches, 1 wrong, 2 hazards"


def test_main_summary_fails_if_a_case_has_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["80", "--results", str(tmp_path), "--summary", "3.9.0"]) == 1
    assert f"{len(table.table(80))} of {len(table.table(80))} cases have not run" in capsys.readouterr().out


def test_main_summary_counts_distinct_cases(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cases: list[Case] = [LINEAR, LINEAR._replace(rows=71), LINEAR._replace(inputs=160), LINEAR._replace(inputs=48)]
    monkeypatch.setattr(command, "cases_of", lambda capability, version: cases)
    for version in ("3.8.0", "3.9.0"):
        results = Results(version, 80, cases, tmp_path)
        for case in cases:
            results.add(row_of(case, version))
    command.main(["80", "--results", str(tmp_path), "--summary", "3.8.0", "3.9.0"])
    # The number of rows is not a property of a case, and 48 inputs are less than one step.
    assert capsys.readouterr().out.startswith("2 distinct cases")


PATCH = PatchCase(80, "bf16", "uint8", "bf16", "small", (28, 32), (7, 8), 72, "contiguous")
EVERY_KERNEL = (
    LINEAR,
    NormCase(80, "bf16", "bf16", 768),
    table.attention_case(80, "bf16", 32, "paired"),
    table.attention_case(80, "bf16", 32, "none", split=True, backward=False),
)


@pytest.fixture
def quick_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Results:
    """Results with rows of every kernel, all current."""
    monkeypatch.setattr(command, "quick_cases", lambda capability: list(EVERY_KERNEL))
    monkeypatch.setattr(command, "check", lambda case, schedules: row_of(case))
    Results("nvcc-13.0.88", 80, [PATCH], tmp_path).add(row_of(PATCH))
    results = Results(triton.__version__, 80, EVERY_KERNEL, tmp_path)
    for case in EVERY_KERNEL:
        results.add(row_of(case))
    return results


def test_main_quick_fails_if_the_results_are_of_another_source(
    quick_results: Results, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(["80", "--quick", "--results", str(tmp_path)]) == 0
    row = row_of(EVERY_KERNEL[2])
    row["kernels"]["backward_dq"] = "64x64 4w 2s 0123456789ab"
    quick_results.add(row)
    assert command.main(["80", "--quick", "--results", str(tmp_path)]) == 1
    assert "backward_dq: results are of another source" in capsys.readouterr().out


def test_main_quick_fails_if_a_case_is_launched_in_another_way(
    quick_results: Results, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quick_results.add(row_of(LINEAR, plan="01234567"))
    assert command.main(["80", "--quick", "--results", str(tmp_path)]) == 1
    assert f"{LINEAR}: no result is of its launches as they are" in capsys.readouterr().out


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_run_executes_every_product_of_the_compiled_kernels(capability: int) -> None:
    case = table.quick_cases(capability)[0]
    launches = check.run(case, operators.prepare(case), check.SCHEDULES[0]).launches
    products = [
        launch.executed[number]
        for launch in launches
        for number, block in enumerate(launch.code.blocks)
        for instruction in launch.code.instructions[block.first : block.last + 1]
        if instruction.opcode == "mma" or {"mma", "mma_async"} & set(instruction.modifiers)
    ]
    assert len(products) > 20
    assert all(products)
