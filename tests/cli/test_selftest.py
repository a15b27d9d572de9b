"""`beit-fast selftest` and `beit-fast tune` as a user runs them."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from beit_fast.cli import info, main
from beit_fast.cli import selftest as command
from beit_fast.cli import tune as tune_command
from beit_fast.cli.options import TuneOptions
from beit_fast.ops.dispatch import availability
from beit_fast.tuning import tune as tuning
from beit_fast.tuning.selftest import Row
from beit_fast.tuning.tune import Outcome
from beit_fast.utils import variables

PASSED = Row(
    *("attention", "2x253x4", "bfloat16", "paired", "triton"),
    errors={"out": 1e-3, "dq": 2e-3},
    budgets={"out": 1e-2, "dq": 4e-3},
    same_bits={"launch 2": True, "CUDA graph": True},
    seconds={"forward": (1e-3, 4e-3)},
    baseline="SDPA with the dense bias",
)
FAILED = Row(
    "residual norm",
    "2x7x40",
    "float32",
    "-",
    "triton",
    {"sum": 1.0},
    {"sum": 0.1},
    {"launch 2": False},
    failures=("sum: too far",),
)


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> list[Row]:
    """The rows that the self-test finds."""
    found = [PASSED]
    monkeypatch.setattr(command, "run_checks", lambda checks, device, clock: iter(found))
    return found


def test_selftest_all_passed_prints_a_table_and_exits_with_0(
    rows: list[Row], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.main(["selftest", "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any("The GPU kernels are not tested here" in line for line in lines)
    (line,) = [line for line in lines if line.startswith("attention")]
    assert "1.0e-03 (10%)" in line
    assert "2.0e-03 (50%)" in line
    assert "1.000 / 4.000" in line
    assert line.endswith("ok")
    assert lines[-1].startswith("all 1 cases passed")


def test_selftest_a_failure_is_explained_and_exits_with_1(rows: list[Row], capsys: pytest.CaptureFixture[str]) -> None:
    rows.append(FAILED)
    assert main.main(["selftest", "--device", "cpu"]) == 1
    lines = capsys.readouterr().out.splitlines()
    (line,) = [line for line in lines if line.startswith("residual norm") and line.endswith("FAILED")]
    assert " NO " in line
    assert "  sum: too far" in lines
    assert lines[-1].startswith("1 of 2 cases failed")


def test_selftest_json_and_rows_hold_the_same(
    rows: list[Row], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows.append(FAILED)
    file = tmp_path / "results" / "selftest.jsonl"
    assert main.main(["selftest", "--device", "cpu", "--json", "--rows", str(file)]) == 1
    printed = json.loads(capsys.readouterr().out)
    written = [json.loads(line) for line in file.read_text().splitlines()]
    assert printed["passed"] is False
    assert printed["rows"] == [entry["row"] for entry in written[1:]]
    assert written[0]["conditions"] == printed["environment"]


def test_selftest_rows_are_written_before_the_next_check(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file, lengths = tmp_path / "rows.jsonl", []

    def slow(checks: object, device: object, clock: object) -> Iterator[Row]:
        for row in (PASSED, PASSED):
            lengths.append(len(file.read_text().splitlines()))
            yield row

    monkeypatch.setattr(command, "run_checks", slow)
    assert main.main(["selftest", "--device", "cpu", "--rows", str(file)]) == 0
    assert lengths == [1, 2]


def stopped_after(*found: object) -> Iterator[object]:
    """Results of a command that Ctrl-C stops."""
    yield from found
    raise KeyboardInterrupt


@pytest.mark.parametrize("found", [[], [PASSED], [PASSED, FAILED]])
def test_selftest_interrupted_prints_the_rows_so_far(
    found: list[Row], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "run_checks", lambda checks, device, clock: stopped_after(*found))
    monkeypatch.setattr(command, "checks_for", lambda device, kernel: [PASSED] * 3)
    assert main.main(["selftest", "--device", "cpu"]) == 130
    out, err = capsys.readouterr()
    assert err.splitlines()[-1] == f"beit-fast selftest: interrupted after {len(found)} of 3 cases"
    assert "Traceback" not in err
    assert all(any(line.startswith(row.kernel) for line in out.splitlines()) for row in found)
    assert "all" not in out.splitlines()[-1]
    assert main.main(["selftest", "--device", "cpu", "--json"]) == 130
    printed = json.loads(capsys.readouterr().out)
    assert (printed["interrupted"], printed["passed"], len(printed["rows"])) == (True, False, len(found))


def test_command_interrupted_elsewhere_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "checks_for", lambda device, kernel: next(stopped_after()))
    assert main.main(["selftest", "--device", "cpu"]) == 130
    assert capsys.readouterr() == ("", "beit-fast selftest: interrupted\n")


@pytest.mark.parametrize("line", ["selftest --device cpu", "tune", "tune --show", "tune --forget"])
@pytest.mark.parametrize("value", ["2", "yes"])
def test_command_unknown_value_of_the_variable_is_one_error(
    line: str, value: str, rows: list[Row], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(variables._VALUES, variables.TUNED, value)
    assert main.main(line.split()) == 2
    message = f"BEIT_FAST_TUNED={value!r} is not supported (expected '0' or '1', or unset)"
    assert capsys.readouterr() == ("", f"beit-fast {line.split()[0]}: {message}\n")


def test_selftest_device_without_a_kernel_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["selftest", "--device", "meta:0" if torch.cuda.is_available() else "cuda"]) == 2
    assert "no kernel runs on" in capsys.readouterr().err


@pytest.mark.parametrize("line", ["tune --device cpu", "tune --device cpu --show", "tune --device cpu --forget"])
def test_tune_without_a_gpu_is_refused(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(line.split()) == 2
    assert "only GPU kernels can be tuned" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["selftest", "tune"])
def test_unknown_device_is_one_plain_error(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main([command, "--device", "nope"]) == 2
    message = "--device 'nope' is not supported (expected cpu, cuda or cuda:INDEX)"
    assert capsys.readouterr().err == f"beit-fast {command}: {message}\n"


def options(**changes: object) -> TuneOptions:
    given = {
        "image_size": [],
        "batch": [],
        "dtype": [],
        "model": None,
        "head_dim": None,
        "device": None,
        "budget": None,
    }
    given |= {"forget": False, "show": False, "local_files_only": True, "json": False, "rows": None}
    return TuneOptions(**(given | changes))


def test_shapes_of_options_combine_sizes_batches_and_dtypes(tmp_path: Path) -> None:
    usual = tune_command.shapes_of(options())
    assert [(shape.window, shape.batch) for shape in usual] == [((14, 14), 64), ((24, 24), 16), ((24, 24), 1)]
    chosen = tune_command.shapes_of(options(image_size=[224, (224, 288)], batch=[1, 2], dtype=["float16", "float32"]))
    assert len(chosen) == 8
    assert {shape.window for shape in chosen} == {(14, 14), (14, 18)}
    assert {shape.dtype for shape in chosen} == {torch.float16, torch.float32}
    assert [shape.head_dim for shape in tune_command.shapes_of(options(head_dim=80))] == [80, 80, 80]
    with pytest.raises(ValueError, match="has no patch"):
        tune_command.shapes_of(options(image_size=[8]))


def test_shapes_of_a_model_have_its_sizes(tmp_path: Path) -> None:
    sizes = {"hidden_size": 48, "num_attention_heads": 3, "intermediate_size": 100, "patch_size": 8, "image_size": 40}
    (tmp_path / "config.json").write_text(json.dumps({**sizes, "use_relative_position_bias": True}))
    (shape,) = tune_command.shapes_of(options(model=str(tmp_path)))
    assert (shape.window, shape.heads, shape.head_dim) == ((5, 5), 3, 16)
    assert (shape.hidden, shape.intermediate, shape.biased) == (48, 100, True)


@pytest.fixture
def tuned_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Outcome]:
    """The outcomes that the tuner finds on a device that stands in for a GPU."""
    outcomes = [
        Outcome(
            "forward", "1x16", (64, 64, 4, 2), (32, 64, 4, 2), {"64x64x4x2": 2e-3, "32x64x4x2": 1e-3}, {"1x1": "spills"}
        )
    ]
    monkeypatch.setattr(tune_command, "_gpu", lambda name: torch.device("cpu"))
    monkeypatch.setattr(tune_command, "_check_kernels", lambda shapes, device: None)
    monkeypatch.setattr(tune_command, "jobs_of", lambda shapes, device: outcomes)
    monkeypatch.setattr(tuning, "tune", lambda jobs, device, clock: iter(jobs))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return outcomes


def test_tune_prints_what_it_chose_and_excluded(tuned_gpu: list[Outcome], capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["tune"]) == 0
    out = capsys.readouterr().out
    (line,) = [line for line in out.splitlines() if line.startswith("forward")]
    assert line.split()[1:] == ["1x16", "64x64x4x2", "32x64x4x2", "2.000", "1.000", "1"]
    assert "  1x1: spills" in out.splitlines()
    tuned_gpu.append(Outcome("backward_dq", "1x16", (64, 64, 4, 2)))
    assert main.main(["tune"]) == 1
    assert "run beit-fast selftest" in capsys.readouterr().out


def test_tune_budget_stops_after_a_kernel(
    tuned_gpu: list[Outcome], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tuned_gpu *= 3
    times = iter([0.0, 5.0, 11.0])
    monkeypatch.setattr(tune_command, "time", SimpleNamespace(monotonic=lambda: next(times)))
    file = tmp_path / "rows.jsonl"
    assert main.main(["tune", "--budget", "10", "--rows", str(file)]) == 0
    assert len(file.read_text().splitlines()) == 3


@pytest.mark.parametrize("budget", ["nan", "inf", "-1", "-inf"])
def test_tune_budget_that_is_not_a_time_is_refused(budget: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main.main(["tune", f"--budget={budget}"])
    assert caught.value.code == 2
    assert f"argument --budget: {budget} is not a number of seconds, 0 or more" in capsys.readouterr().err


def test_tune_interrupted_prints_the_outcomes_so_far(
    tuned_gpu: list[Outcome], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tuning, "tune", lambda jobs, device, clock: stopped_after(*jobs))
    assert main.main(["tune"]) == 130
    out, err = capsys.readouterr()
    assert err.splitlines()[-1] == "beit-fast tune: interrupted after 1 of 1 kernels"
    assert any(line.startswith("forward") for line in out.splitlines())
    assert "written to" in out
    monkeypatch.setattr(tuning, "tune", lambda jobs, device, clock: stopped_after())
    assert main.main(["tune", "--json"]) == 130
    printed = json.loads(capsys.readouterr().out)
    assert (printed["interrupted"], printed["rows"]) == (True, [])
    assert main.main(["tune"]) == 130
    assert "nothing was written" in capsys.readouterr().out


def test_tune_show_and_forget_without_a_file_say_so(
    tuned_gpu: list[Outcome], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.main(["tune", "--show"]) == 0
    assert "none were measured" in capsys.readouterr().out
    assert main.main(["tune", "--forget"]) == 0
    assert "there are no tuned tiles" in capsys.readouterr().out


def test_info_lists_the_tuned_tiles_of_each_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {
        "cuda:0": {"file": "a.json", "tiles": [1, 2], "reason": None},
        "cuda:1": {"file": "b.json", "tiles": [], "reason": "none"},
    }
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(tuning, "describe", lambda device: found[str(device)])
    rows = info._tuned_tiles()
    assert [info._tuned_line(row) for row in rows] == [("cuda:0", "2 in use"), ("cuda:1", "not in use: none")]


REFUSED = Row(
    "attention",
    "2x253x4",
    "float16",
    "paired",
    "triton",
    {"out": 1.0},
    {"out": 0.1},
    failures=("out: far",),
    refused=("a fault",),
)


def test_selftest_refused_rows_are_labelled(rows: list[Row], capsys: pytest.CaptureFixture[str]) -> None:
    rows.append(REFUSED)
    assert main.main(["selftest", "--device", "cpu", "--include-refused"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert any(line.endswith("FAILED, refused") for line in lines)
    assert "refused: a fault" in lines


def test_selftest_refused_pair_runs_only_if_asked(
    rows: list[Row],
    fake_gpu: Callable[[tuple[int, int], str], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The dispatcher sees a GPU and a Triton with known faults; the rows are those of the fixture."""
    fake_gpu((10, 0), "3.6.0")
    conditions = dict.fromkeys(("beit_fast", "device_name", "torch", "cuda", "triton"))
    monkeypatch.setattr(command, "environment", lambda device: conditions)
    monkeypatch.setattr(command, "checks_for", lambda device, kernel: [])
    monkeypatch.setattr(command, "count_kernels", lambda kernel: contextlib.nullcontext(lambda: 0))
    assert main.main(["selftest", "--device", "cuda"]) == 2
    error = capsys.readouterr().err
    assert "Triton 3.6.0" in error
    assert "--include-refused runs it all the same" in error
    assert main.main(["selftest", "--device", "cuda", "--include-refused"]) == 0
    # The dispatcher refuses the pair again.
    reasons = availability.attention_unsupported_reasons("triton", torch.device("cuda"), torch.float16, 64)
    assert reasons == availability.compiler_hazards_of(torch.device("cuda")) != ()
