"""The benchmark of decoding and augmentation: tasks, rates, the estimate of cores."""

from __future__ import annotations

import json
import time

import pytest
import torch

from benchmarks import input_pipeline
from benchmarks.baselines import torchvision_transforms

from ..support.benchmarks import BENCHMARKS

COMMITTED = sorted((BENCHMARKS / "results" / "input-pipeline").glob("*.json"))


@pytest.fixture
def without_torchvision(monkeypatch):
    def fail():
        raise ImportError("No module named 'torchvision'")

    monkeypatch.setattr(torchvision_transforms, "import_torchvision", fail)


def test_main_without_torchvision_writes_a_row_of_ours_for_each_task(without_torchvision, tmp_path, capsys):
    input_pipeline.main(["--images", "4", "--rounds", "1", "--results", str(tmp_path)])
    (file,) = (tmp_path / "input-pipeline").iterdir()
    results = json.loads(file.read_text())
    assert json.loads(capsys.readouterr().out) == results
    assert [(row["task"], row["baseline"]) for row in results["rows"]] == [
        (task, "beit_fast") for task in input_pipeline.TASKS
    ]
    assert results["conditions"]["torchvision"] is None
    assert results["conditions"]["bytes_per_image"] > 20_000


def test_main_with_required_baselines_fails_without_torchvision(without_torchvision):
    with pytest.raises(ImportError, match="torchvision"):
        input_pipeline.main(["--images", "1", "--rounds", "1", "--require-baselines"])


def test_our_pipeline_gives_the_views_of_training(tmp_path):
    input_pipeline.write_images(tmp_path, 4)
    source = input_pipeline.ImageFolder(tmp_path)
    assert [source.read(index).image.size for index in range(2)] == [(375, 500), (500, 375)]
    views = input_pipeline.our_pipeline(source, "two-views")(1)
    assert [tuple(view.shape) for view in views.values()] == [(3, 224, 224), (3, 112, 112)]
    assert torch.equal(views["pixel_values"], input_pipeline.our_pipeline(source, "two-views")(1)["pixel_values"])
    assert input_pipeline.our_pipeline(source, "classification")(1)["pixel_values"].shape == (3, 224, 224)


def test_measure_counts_images_per_second_of_cpu_time():
    def work(index):
        end = time.process_time() + 0.01
        while time.process_time() < end:
            pass

    rates = input_pipeline.measure({"slow": work, "sleeping": lambda index: time.sleep(0.01)}, count=3, rounds=2)
    assert [len(values) for values in rates.values()] == [2, 2]
    assert 50 < rates["slow"][0] <= 100
    assert rates["sleeping"][0] > 200


def test_estimate_of_cores_follows_the_plain_flops():
    assert input_pipeline.training_flops_per_image() == pytest.approx(3 * 36.2e9, rel=0.02)
    cores = input_pipeline.cores_for_h200(100.0)
    assert cores == pytest.approx(989e12 * 0.4 / input_pipeline.training_flops_per_image() / 100)
    assert input_pipeline.cores_for_h200(200.0) == pytest.approx(cores / 2)


@pytest.mark.parametrize("file", COMMITTED, ids=lambda file: file.stem)
def test_committed_results_have_both_baselines_and_true_estimates(file):
    results = json.loads(file.read_text())
    rows = {(row["task"], row["baseline"]): row for row in results["rows"]}
    assert rows.keys() == {(task, name) for task in input_pipeline.TASKS for name in ("beit_fast", "torchvision")}
    for task in input_pipeline.TASKS[1:]:
        ours = rows[task, "beit_fast"]
        cores = input_pipeline.cores_for_h200(ours["images_per_second_and_core"])
        assert ours["cores_for_an_h200_estimated"] == pytest.approx(cores, abs=0.2)


def test_results_are_committed():
    assert COMMITTED
