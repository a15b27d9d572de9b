"""Parts of the training loop: settings, schedule, folder, checkpoints, log and average."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from beit_fast.training.engine.average import WeightAverage
from beit_fast.training.engine.checkpoints import Checkpoints
from beit_fast.training.engine.logs import RunLog, read_rows
from beit_fast.training.engine.processes import Processes
from beit_fast.training.engine.run_folder import RunFolder
from beit_fast.training.engine.schedule import Plan, Schedule
from beit_fast.training.engine.settings import EngineSettings
from beit_fast.training.seeding import derived_generator, derived_seed

ALONE = Processes(torch.device("cpu"))


def model_and_optimizer(seed: int = 0) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW([{"params": list(model.parameters()), "lr": 0.1}])
    model(torch.randn(4, 3)).square().sum().backward()
    optimizer.step()
    return model, optimizer


def test_settings_list_every_value_that_does_not_fit():
    with pytest.raises(ValueError, match="3 errors") as caught:
        EngineSettings(output=Path("x"), epochs=0, opt_betas=(0.9, 1.0), precision="fp8")  # type: ignore[arg-type]
    assert all(name in str(caught.value) for name in ("epochs=0", "opt_betas=(0.9, 1.0)", "'float32' or 'bfloat16'"))
    with pytest.raises(TypeError, match="seed='1'"):
        EngineSettings(output=Path("x"), seed="1")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"min_lr=0.1 \(expected at most lr=0.01\)"):
        EngineSettings(output=Path("x"), lr=0.01, min_lr=0.1)


def test_settings_take_strings_as_paths():
    assert EngineSettings(output="runs/a").output == Path("runs/a")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="the path of the output is empty"):
        EngineSettings(output="")  # type: ignore[arg-type]


def test_learning_rates_are_in_proportion_to_the_images_of_a_step():
    settings = EngineSettings(output=Path("x"), batch_size=32, gradient_accumulation=2)
    resolved = settings.resolved(processes=4)
    assert settings.images_per_step(4) == 256
    assert resolved.lr == pytest.approx(settings.reference_lr * 256 / settings.reference_batch)
    assert resolved.min_lr == pytest.approx(settings.reference_min_lr * 256 / settings.reference_batch)
    assert EngineSettings(output=Path("x"), lr=1e-9).resolved(1).min_lr == 1e-9  # never above lr
    given = EngineSettings(output=Path("x"), lr=0.5, min_lr=0.25).resolved(8)
    assert (given.lr, given.min_lr) == (0.5, 0.25)


def schedule_of(**changes: Any) -> Schedule:
    settings = EngineSettings(output=Path("x"), lr=1.0, min_lr=0.1, **changes)
    groups = [{"lr": 1.0, "weight_decay": 0.05}, {"lr": 0.5, "weight_decay": 0.0}]
    return Schedule(settings, Plan(10, 10, 100), groups)


def test_schedule_is_linear_then_half_a_cosine():
    schedule = schedule_of(warmup_epochs=1.0, warmup_lr=0.1)
    assert [schedule.factor(step) for step in range(10)] == pytest.approx([0.1 * (step + 1) for step in range(10)])
    assert schedule.factor(10) == pytest.approx(1.0)
    assert schedule.factor(55) == pytest.approx(0.55)
    assert schedule.factor(100) == pytest.approx(0.1)
    assert schedule_of(warmup_steps=0).factor(0) == 1.0
    assert schedule_of(warmup_epochs=50.0).factor(99) == pytest.approx(1.0)  # a warmup longer than the run


def test_schedule_sets_rates_and_weight_decay_of_each_group():
    optimizer = torch.optim.AdamW([{"params": [nn.Parameter(torch.ones(1))]} for _ in range(2)])
    schedule_of(warmup_epochs=0, weight_decay_end=0.25).apply(optimizer, 50)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.55, 0.275])
    assert [group["weight_decay"] for group in optimizer.param_groups] == pytest.approx([0.15, 0.0])


def test_derived_seeds_differ_by_every_part():
    parts = [(), (0,), (1,), (0, 0), (0, 1), (1, 0), (0, 0, 0)]
    assert len({derived_seed(*part) for part in parts}) == len(parts)
    first, second = (torch.rand(3, generator=derived_generator(3, 4)) for _ in range(2))
    assert torch.equal(first, second)


def test_average_is_exponential_and_is_exchanged_only_in_the_block():
    model = nn.Linear(2, 1, bias=False)
    start = model.weight.detach().clone()
    average = WeightAverage(model, 0.75)
    with torch.no_grad():
        model.weight.add_(4.0)
    present = model.weight.detach().clone()
    average.update()
    with average.applied():
        torch.testing.assert_close(model.weight.detach(), start + 1.0)
    assert torch.equal(model.weight, present)
    with pytest.raises(KeyError), average.applied():
        raise KeyError
    assert torch.equal(model.weight, present)


def test_checkpoints_restore_weights_optimizer_and_average(tmp_path):
    model, optimizer = model_and_optimizer()
    average = WeightAverage(model, 0.5)
    checkpoints = Checkpoints(tmp_path / "all", 2, ALONE)
    assert checkpoints.restore(model, optimizer, average) == 0
    for step in (1, 2, 3):
        checkpoints.save(step, model, optimizer, average)
    assert checkpoints.steps() == [2, 3]
    other, other_optimizer = model_and_optimizer(seed=1)
    other_average = WeightAverage(other, 0.5)
    assert checkpoints.restore(other, other_optimizer, other_average) == 3
    assert torch.equal(other.weight, model.weight)
    assert torch.equal(other_average.weights["weight"], average.weights["weight"])
    ours, expected = (each.state_dict()["state"] for each in (other_optimizer, optimizer))
    assert all(torch.equal(ours[key][name], expected[key][name]) for key in expected for name in expected[key])


def test_checkpoints_ignore_and_remove_what_a_killed_process_left(tmp_path):
    model, optimizer = model_and_optimizer()
    checkpoints = Checkpoints(tmp_path, 2, ALONE)
    checkpoints.save(1, model, optimizer, None)
    shutil.copytree(tmp_path / "step-000000001", tmp_path / ".unfinished-step-000000002")
    assert checkpoints.restore(model, optimizer, None) == 1
    checkpoints.save(3, model, optimizer, None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000000001", "step-000000003"]


def test_checkpoints_that_cannot_be_written_are_one_error_and_keep_the_others(tmp_path, monkeypatch):
    model, optimizer = model_and_optimizer()
    checkpoints = Checkpoints(tmp_path, 2, ALONE)
    checkpoints.save(1, model, optimizer, None)

    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match=r"a checkpoint cannot be written to .*No space left on device"):
        checkpoints.save(2, model, optimizer, None)
    assert checkpoints.steps() == [1]


def test_checkpoints_that_cannot_be_read_are_one_error_with_the_path(tmp_path):
    model, optimizer = model_and_optimizer()
    Checkpoints(tmp_path, 2, ALONE).save(1, model, optimizer, None)
    next((tmp_path / "step-000000001").glob("*.distcp")).write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"step-000000001' cannot be read .* delete it to resume"):
        Checkpoints(tmp_path, 2, ALONE).restore(model, optimizer, None)


def test_log_of_a_resumed_run_drops_rows_after_its_step(tmp_path):
    file = tmp_path / "log.jsonl"
    file.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"ste')
    assert [row["step"] for row in read_rows(file)] == [1, 2, 3]
    log = RunLog(file, None, step=2, total=4)
    log.add({"step": 4, "loss": 0.5})
    log.close()
    assert read_rows(file) == [{"step": 1}, {"step": 2}, {"step": 4, "loss": 0.5}]


def test_log_without_its_incomplete_last_line_is_continued(tmp_path):
    file = tmp_path / "log.jsonl"
    file.write_text('{"step": 1}\n{"ste')
    log = RunLog(file, None, step=1, total=4)
    log.add({"step": 2})
    log.close()
    assert read_rows(file) == [{"step": 1}, {"step": 2}]


def test_log_writes_the_numbers_to_tensorboard(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    log = RunLog(tmp_path / "log.jsonl", tmp_path / "tb", step=0, total=2)
    log.add({"step": 1, "loss": 0.5, "unreadable": ["a"]})
    log.close()
    events = accumulator.EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 0.5)]


def test_log_without_tensorboard_names_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match=r'pip install "beit-fast\[train\]"'):
        RunLog(tmp_path / "log.jsonl", tmp_path / "tb", step=0, total=2)


HOLD = """
import sys
from pathlib import Path
from beit_fast.training.engine.run_folder import RunFolder
folder = RunFolder(Path(sys.argv[1]))
folder.begin({"a": 1}, {}, overwrite=False)
print("held", flush=True)
sys.stdin.read()
"""


def test_folder_of_a_running_process_is_an_error(tmp_path):
    run = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    with subprocess.Popen(run, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(BlockingIOError, match="another process trains in"):
            RunFolder(tmp_path / "run").begin({"a": 1}, {}, overwrite=True)
        assert json.loads((tmp_path / "run/run.json").read_text())["settings"] == {"a": 1}
        holder.communicate()
    folder = RunFolder(tmp_path / "run")
    folder.begin({"a": 1}, {}, overwrite=False)
    folder.close()


def test_folder_overwrite_deletes_the_run_and_nothing_else(tmp_path):
    folder = RunFolder(tmp_path)
    folder.begin({"a": 1}, {}, overwrite=False)
    folder.close()
    for name in ("model", "checkpoints", "mine"):
        (tmp_path / name).mkdir()
    folder.check({"a": 2}, overwrite=True)
    folder.begin({"a": 2}, {}, overwrite=True)
    folder.close()
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["mine"]
    assert json.loads((tmp_path / "run.json").read_text())["settings"] == {"a": 2}


def test_folder_whose_output_is_a_file_or_damaged_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        RunFolder(tmp_path / "file").check({}, overwrite=False)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/run.json").write_text('{"settings": 3}')
    with pytest.raises(ValueError, match="is damaged"):
        RunFolder(tmp_path / "run").check({}, overwrite=False)


def test_error_of_the_main_process_is_raised():
    def fail() -> None:
        raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        ALONE.on_main(fail)
    assert ALONE.on_main(lambda: 3) == 3
