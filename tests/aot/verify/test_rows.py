"""Rows of results: damaged ones are errors, and those of another state of the sources are not current."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton", reason="needs Triton")
if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
    pytest.skip("the Triton interpreter and compiler cannot share a process", allow_module_level=True)

from beit_fast.kernels.aot.verify import __main__ as command  # noqa: E402
from beit_fast.kernels.aot.verify import table  # noqa: E402
from beit_fast.kernels.aot.verify.cases import Case, LinearCase, NormCase, PatchCase  # noqa: E402
from beit_fast.kernels.aot.verify.check import SAME_BITS  # noqa: E402
from beit_fast.kernels.aot.verify.plans import plan_of  # noqa: E402
from beit_fast.kernels.aot.verify.result_files import Results  # noqa: E402
from beit_fast.kernels.aot.verify.rows import ORDERS, DamagedRowError, Row, is_current  # noqa: E402
from beit_fast.kernels.attention import configs as attention_configs  # noqa: E402
from beit_fast.kernels.attention import launch as attention  # noqa: E402
from beit_fast.kernels.common import compiler_hazards as hazards_table  # noqa: E402
from beit_fast.kernels.linear_gelu import configs as linear_configs  # noqa: E402
from beit_fast.kernels.residual_norm import configs as norm_configs  # noqa: E402

from .rows import ERROR, row_of  # noqa: E402

LINEAR = LinearCase(80, "bf16", 70, 144, 72)
ATTENTION = table.quick_cases(100)[0]
PAIRED = table.quick_cases(80)[0]
NORM = NormCase(80, "bf16", "bf16", 768)
PATCH = PatchCase(80, "bf16", "uint8", "bf16", "small", (28, 32), (7, 8), 72, "contiguous")
VERSION = triton.__version__


@pytest.fixture
def fresh_plans() -> Iterator[None]:
    """Forget plans of launches as they were, and as a test changed them."""
    plan_of.cache_clear()
    yield
    plan_of.cache_clear()


@pytest.mark.parametrize(
    ("case", "owner", "name", "value"),
    [
        (LINEAR, linear_configs, "GROUP", 4),
        (NORM, norm_configs, "FORWARD_WARP_COLUMNS", 256),
        (NORM, norm_configs, "PARTIALS_WARPS", 4),
        (ATTENTION, attention_configs, "PREPROCESS_BLOCK", 64),
        (ATTENTION, attention_configs, "DIAGONAL_BLOCK_PATCHES", 64),
        (ATTENTION, attention_configs, "PACK_BLOCK", 256),
        (ATTENTION, attention_configs, "lse_stride", lambda patches: patches + 16),
        (PAIRED, attention_configs, "bias_layout", lambda *kind: attention_configs.BiasLayout("paired", 2)),
        (ATTENTION, attention, "_options", lambda tile: {"num_warps": tile.num_warps, "num_stages": 1}),
    ],
)
def test_results_of_other_launches_are_not_current(
    case: Case, owner: Any, name: str, value: Any, monkeypatch: pytest.MonkeyPatch, fresh_plans: None
) -> None:
    row = row_of(case)
    assert is_current(row, case, VERSION)
    plan_of.cache_clear()
    monkeypatch.setattr(owner, name, value)
    assert not is_current(row, case, VERSION)


def test_results_of_another_tile_are_not_current(monkeypatch: pytest.MonkeyPatch, fresh_plans: None) -> None:
    row, select = row_of(LINEAR), linear_configs.select
    plan_of.cache_clear()
    monkeypatch.setattr(linear_configs, "select", lambda *sizes: select(*sizes)._replace(num_stages=7))
    assert not is_current(row, LINEAR, VERSION)


def test_results_are_not_current_when_a_release_of_triton_gets_another_fault(
    monkeypatch: pytest.MonkeyPatch, fresh_plans: None
) -> None:
    row = row_of(ATTENTION, "3.9.0")
    assert is_current(row, ATTENTION, "3.9.0")
    plan_of.cache_clear()
    monkeypatch.setattr(hazards_table, "is_pipelined", lambda kernel, capability, version: kernel != "forward")
    assert not is_current(row, ATTENTION, "3.9.0")


@pytest.mark.parametrize("errors", [{}, {"lockstep": {"out": ERROR}, "halves 1": SAME_BITS}], ids=str)
def test_results_without_a_verdict_on_every_order_are_not_current(errors: dict[str, Any]) -> None:
    assert not is_current(row_of(LINEAR, errors=errors), LINEAR, VERSION)


def test_results_of_other_orders_are_not_current() -> None:
    row = row_of(LINEAR)
    row["errors"]["halves 3"] = row["errors"].pop("halves 2")
    assert not is_current(row, LINEAR, VERSION)


def test_results_of_a_launch_that_fails_in_some_orders_are_current() -> None:
    row = row_of(PAIRED)
    row["errors"] = {"halves 1": row["errors"]["lockstep"]}
    row |= {"launches": row["launches"] // 3, "wrong": ["lockstep: BarrierError: a", "halves 2: RaceError: b"]}
    assert is_current(row, PAIRED, VERSION)
    row["wrong"].append("halves 1: dq")
    row["errors"]["halves 1"]["dq"] = 2e-6
    assert is_current(row, PAIRED, VERSION)
    early = row_of(PAIRED, errors={}, launches=0, wrong=[f"{order}: RaceError: b" for order in ORDERS])
    del early["kernels"]["backward_dq"]
    assert is_current(early, PAIRED, VERSION)


def _scale(row: Row, budgets: float, errors: float) -> None:
    first = row["errors"]["lockstep"]
    row["budgets"] = {name: number * budgets for name, number in row["budgets"].items()}
    row["errors"]["lockstep"] = {name: number * errors for name, number in first.items()}


def _without_a_result(row: Row) -> None:
    name = min(row["budgets"])
    del row["budgets"][name], row["errors"]["lockstep"][name]


def _with_another_tile(row: Row) -> None:
    name = "patch_embed" if "patch_embed" in row["kernels"] else "forward"
    row["kernels"][name] = "999x999 " + row["kernels"][name].split()[-1]


def _with_another_kernel(row: Row) -> None:
    row["kernels"]["other"] = "4w 0123456789ab"


def _with_other_bits(row: Row) -> None:
    row["errors"]["halves 1"] = row["errors"]["lockstep"]


DAMAGES: dict[str, tuple[Callable[[Row], object], str]] = {
    "a kernel less": (lambda row: row["kernels"].popitem(), " missing"),
    "another kernel": (_with_another_kernel, "kernels other are not launched"),
    "another tile": (_with_another_tile, "is '999x999' (expected '"),
    "one launch": (lambda row: row.update(launches=1), "'launches' is 1 (expected "),
    "no number": (lambda row: row["errors"].update(lockstep=SAME_BITS), "lockstep is 'same bits', but the first order"),
    "other bits": (_with_other_bits, "halves 1 has numbers (expected 'same bits', or a text in 'wrong')"),
    "an error above its budget": (lambda row: _scale(row, 1, 100), ", above its budget of 1e-06"),
    "larger budgets": (lambda row: _scale(row, 1e6, 1e5), " (expected above 0, up to 0.5)"),
    "budgets of zero": (lambda row: _scale(row, 0, 0), "is 0.0 (expected above 0"),
    "a budget less": (lambda row: row["budgets"].popitem(), "budgets of "),
    "an error less": (lambda row: row["errors"]["lockstep"].popitem(), "errors of "),
    "a result less": (_without_a_result, "(expected "),
    "the text of a hazard": (lambda row: row.update({"first hazard": "a race"}), "'first hazard' without hazards"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("case", [PAIRED, PATCH], ids=str)
def test_results_that_contradict_the_case_or_themselves_are_an_error(damage: str, case: Case, tmp_path: Path) -> None:
    change, error = DAMAGES[damage]
    row = row_of(case)
    assert is_current(row, case, VERSION)
    change(row)
    other = case._replace(batch=5)
    results = Results(VERSION, 80, [other, case], tmp_path)
    for one in (row_of(other), row):
        results.add(one)
    with pytest.raises(ValueError, match="restore the file, or delete the line and rerun") as raised:
        Results(VERSION, 80, [other, case], tmp_path).current(case)
    assert str(raised.value).startswith(f"{results.file}, line 2 is damaged ({case}): ")
    assert error in str(raised.value)


def test_results_that_are_damaged_twice_are_one_error() -> None:
    row = row_of(NORM, launches=1)
    _scale(row, 1, 100)
    with pytest.raises(DamagedRowError, match=r"'launches' is 1 .*; the error of dbias .*; the error of sum"):
        is_current(row, NORM, VERSION)


def test_budgets_are_compared_with_the_coarsest_dtype_of_the_case() -> None:
    mixed, single = (NormCase(80, dtype, "fp32", 768) for dtype in ("bf16", "fp32"))
    for case, budget in ((mixed, 0.4), (single, 7e-6)):
        row = row_of(case)
        row["budgets"]["sum"] = budget
        assert is_current(row, case, VERSION)
    row["budgets"]["sum"] = 0.4
    with pytest.raises(DamagedRowError, match=r"the budget of sum is 0\.4"):
        is_current(row, single, VERSION)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("plan", 3),
        ("kernels", [1]),
        ("kernels", {"linear_gelu": ""}),
        ("kernels", {"linear_gelu": "64x64"}),
        ("launches", "x"),
        ("launches", -3),
        ("launches", True),
        ("budgets", 3),
        ("budgets", {"out": None}),
        ("budgets", {"out": math.nan}),
        ("errors", []),
        ("errors", {"lockstep": "other bits"}),
        ("errors", {"lockstep": {"out": "0.1"}}),
        ("hazards", {"a race": 2}),
        ("wrong", "lockstep: out"),
        ("wrong", [""]),
        ("first hazard", None),
    ],
)
def test_main_of_a_value_of_the_wrong_type_names_the_line(
    name: str, value: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = json.dumps(row_of(LINEAR, "3.9.0", **{name: value}))
    assert f"line 2 is not a row of results: {name!r} is " in _error_of_main(line, tmp_path, capsys)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", "is not JSON"),
        ("[]", "is not a row of results: it is [] (expected an object)"),
        (
            '{"case": "a", "launches": 1.5}',
            "errors, hazards, kernels, plan, wrong missing; 'launches' is 1.5 (expected",
        ),
    ],
)
def test_main_of_a_damaged_file_names_the_line(
    line: str, problem: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert problem in _error_of_main(line, tmp_path, capsys)


def _error_of_main(line: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Return what the command prints about a file with a second line."""
    results = Results("3.9.0", 80, [LINEAR], folder)
    results.add(row_of(LINEAR, "3.9.0"))
    with results.file.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(SystemExit) as stopped:
        command.main(["80", "--results", str(folder), "--summary", "3.9.0"])
    assert stopped.value.code == 2
    printed = capsys.readouterr().err
    assert f"{results.file}, line 2 is" in printed
    return printed


def test_main_of_a_damaged_row_names_the_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "cases_of", lambda capability, version: [LINEAR])
    results = Results("3.9.0", 80, [LINEAR], tmp_path)
    results.add(row_of(LINEAR, "3.9.0", launches=1))
    with pytest.raises(SystemExit) as stopped:
        command.main(["80", "--results", str(tmp_path), "--summary", "3.9.0"])
    assert stopped.value.code == 2
    assert f"{results.file}, line 1 is damaged" in capsys.readouterr().err
