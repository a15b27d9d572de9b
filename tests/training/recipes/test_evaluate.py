"""`evaluate` and `beit-fast eval`: results, classes, unreadable images, errors and two processes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from beit_fast import (
    BeitConfig,
    BeitForImageClassification,
    BeitForMaskedImageModeling,
    BeitForSemanticSegmentation,
    BeitImageProcessor,
)
from beit_fast.cli import main
from beit_fast.training import EvaluateOptions, evaluate
from beit_fast.training.evaluation import FeatureTable, LinearProbe, knn_scores

from ...support.checkout import ROOT
from .finetune_data import COLORS, SIZE, TINY, write_classes, write_pretrained, write_segmentation

NAMES = [*sorted(COLORS, reverse=True), "violet"]  # ids differ from the order of the folders


def save(kind: Any, folder: Path, **fields: Any) -> Any:
    torch.manual_seed(1)
    options = TINY | {"use_relative_position_bias": True} | fields
    model = kind(BeitConfig(**options)).eval()
    model.save_pretrained(folder)
    BeitImageProcessor(size=SIZE).save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classifier")
    save(BeitForImageClassification, folder, id2label=dict(enumerate(NAMES)))
    return folder


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("segmenter")
    fields = {"out_indices": [1, 2, 3, 4], "auxiliary_channels": 6, "pool_scales": (1, 2), "num_labels": 2}
    save(BeitForSemanticSegmentation, folder, **fields)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_classes(tmp_path_factory.mktemp("data") / "classes")


def run(data: Path, model: Path, **options: Any) -> dict[str, Any]:
    values = {"device": "cpu", "num_workers": 0, "batch_size": 4} | options
    return evaluate(EvaluateOptions(data=data, model=str(model), **values))


def pixels_and_labels(data: Path) -> tuple[torch.Tensor, list[str]]:
    files = sorted(data.rglob("*.png"), key=lambda file: (file.parent.name, file.name))
    processor = BeitImageProcessor(size=SIZE)
    pixels = torch.cat([processor(Image.open(file), return_tensors="pt")["pixel_values"] for file in files])
    return pixels, [file.parent.name for file in files]


@torch.no_grad()
def test_classification_equals_the_model_image_by_image(classifier, data):
    pixels, labels = pixels_and_labels(data)
    logits = BeitForImageClassification.from_pretrained(classifier)(pixels).logits
    hits = [NAMES[int(row.argmax())] == label for row, label in zip(logits, labels, strict=True)]
    found = run(data, classifier)
    assert found == {"task": "classification", "top1": sum(hits) / 18, "top5": 1.0, "images": 18, "unreadable": []}
    assert 0 < found["top1"] < 1


@torch.no_grad()
def test_classes_by_order_takes_the_ids_of_the_checkpoint(classifier, tmp_path):
    data = write_classes(tmp_path / "data", names=("a", "b", "c", "d"))
    pixels, labels = pixels_and_labels(data)
    logits = BeitForImageClassification.from_pretrained(classifier)(pixels).logits
    wanted = torch.tensor(["abcd".index(label) for label in labels])
    found = run(data, classifier, classes_by_order=True)
    assert found["top1"] == (logits.argmax(1) == wanted).float().mean().item()
    with pytest.raises(ValueError, match="classes do not fit") as caught:
        run(data, classifier)
    assert "red, green, blue, violet" in str(caught.value)
    assert "a, b, c, d" in str(caught.value)


@torch.no_grad()
def test_segmentation_is_scored_at_the_size_of_the_annotations(segmenter, tmp_path):
    data = write_segmentation(tmp_path / "data")
    found = run(data, segmenter)
    model, processor = BeitForSemanticSegmentation.from_pretrained(segmenter).eval(), BeitImageProcessor(size=SIZE)
    counts = torch.zeros(2, 2)
    for file in sorted((data / "images").iterdir()):
        annotation = torch.from_numpy(np.array(Image.open(data / "annotations" / file.name)))
        outputs = model(processor(Image.open(file), return_tensors="pt")["pixel_values"])
        predicted = processor.post_process_semantic_segmentation(outputs, [(40, 40)])[0]
        for row, column in ((0, 0), (0, 1), (1, 0), (1, 1)):
            counts[row, column] += ((annotation == row) & (predicted == column)).sum()
    iou = counts.diagonal() / (counts.sum(0) + counts.sum(1) - counts.diagonal())
    assert found["mean_iou"] == pytest.approx(iou.nanmean().item())
    assert found["pixel_accuracy"] == pytest.approx((counts.trace() / counts.sum()).item())
    assert (found["pixels"], found["images"]) == (6 * 1600, 6)


def test_ids_outside_the_classes_are_an_error_and_reduced_labels_fit(segmenter, tmp_path):
    data = write_segmentation(tmp_path / "data", background=1)
    with pytest.raises(ValueError, match=r"annotations include 2 \(expected 0 to 1\)"):
        run(data, segmenter)
    assert run(data, segmenter, reduce_labels=True)["pixels"] == 6 * 1600


@torch.no_grad()
def test_features_of_a_pretrained_checkpoint_are_probed(data, tmp_path):
    write_pretrained(tmp_path / "model")
    train = write_classes(tmp_path / "train", images=8)
    found = run(data, tmp_path / "model", knn=train, linear_probe=train)
    trunk = BeitForMaskedImageModeling.from_pretrained(tmp_path / "model").eval().beit
    processor = BeitImageProcessor.from_pretrained(tmp_path / "model")
    tables = []
    for folder in (train, data):
        files = sorted(folder.rglob("*.png"), key=lambda file: (file.parent.name, file.name))
        pixels = torch.cat([processor(Image.open(file), return_tensors="pt")["pixel_values"] for file in files])
        labels = torch.tensor([sorted(COLORS).index(file.parent.name) for file in files])
        tables.append(FeatureTable(trunk(pixels).last_hidden_state[:, 1:].mean(1), labels))
    known, asked = tables
    knn = knn_scores(known, asked.features, 3).argmax(1) == asked.labels
    probe = LinearProbe.fit(known, 3)
    linear = probe.logits(asked.features).argmax(1) == asked.labels
    assert (found["task"], found["images"]) == ("features", 18)
    assert found["knn"]["top1"] == pytest.approx(knn.float().mean().item())
    assert found["linear_probe"] == pytest.approx(
        {"top1": linear.float().mean().item(), "top5": 1.0, "strength": probe.strength}
    )


def test_unreadable_images_are_counted_once_and_left_out(classifier, tmp_path, capsys):
    data = write_classes(tmp_path / "data")
    (data / "red" / "broken.png").write_bytes(b"not an image")
    found = run(data, classifier, knn=data)
    assert found["images"] == 18
    assert [line.partition(":")[0] for line in found["unreadable"]] == ["red/broken.png"] * 2  # DATA and neighbors
    arguments = ["eval", str(data), "--model", str(classifier), "--device", "cpu", "--num-workers", "0"]
    assert main.main(arguments) == 1
    captured = capsys.readouterr()
    assert "18 images, 1 unreadable" in captured.out
    assert "failed: red/broken.png" in captured.err


def test_command_prints_json(classifier, data, capsys):
    arguments = ["eval", str(data), "--model", str(classifier), "--device", "cpu", "--num-workers", "1", "--json"]
    assert main.main(arguments) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["model"] == str(classifier)
    assert facts["top1"] == run(data, classifier)["top1"]


def test_two_processes_print_what_one_returns(classifier, data, tmp_path):
    train = write_classes(tmp_path / "train", images=5)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    options = ["--knn", train, "--linear-probe", train, "--num-workers", "0", "--device", "cpu", "--json"]
    command = [*torchrun, "-m", "beit_fast", "eval", data, "--model", classifier, *options]
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    wanted = run(data, classifier, knn=train, linear_probe=train)
    # Batches of other sizes round features differently, so a probe may differ in one of the 18 images.
    close = {
        name: pytest.approx(value, abs=1.01 / 18) if isinstance(value, float) else value
        for name, value in wanted.items()
    }
    assert {name: facts[name] for name in wanted} == close


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "detection", "k": 0, "device": "tpu"}, "3 errors"),
        ({"task": "features"}, "expected knn or linear_probe"),
        ({"task": "segmentation", "knn": Path("x")}, "need images with classes"),
    ],
)
def test_options_that_do_not_fit_are_one_error(options, message):
    with pytest.raises(ValueError, match=message):
        EvaluateOptions(data=Path("a"), model="b", **options)


def test_checkpoint_without_a_head_is_an_error(data, tmp_path):
    write_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="expected --task, --knn or --linear-probe"):
        run(data, tmp_path / "model")
    with pytest.raises(ValueError, match="expected another task or checkpoint"):
        run(data, tmp_path / "model", task="classification")


def test_neighbors_of_other_classes_are_an_error(classifier, data, tmp_path):
    train = write_classes(tmp_path / "train", names=("blue", "red"))
    with pytest.raises(ValueError, match=r"has blue, red; .* has blue, green, red"):
        run(data, classifier, knn=train)
