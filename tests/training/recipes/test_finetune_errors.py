"""Options, classes and checkpoints of fine-tuning that do not fit: one error, and nothing is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from beit_fast.training import FinetuneOptions, finetune

from .finetune_data import write_classes, write_pretrained, write_segmentation
from .test_finetune import SMALL


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("finetune_errors")
    write_classes(folder / "classes")
    write_segmentation(folder / "segments")
    write_pretrained(folder / "pretrained")
    write_pretrained(folder / "shallow", num_hidden_layers=3)
    return folder


def error_of(folder: Path, output: Path, kind: type[Exception] = ValueError, **changes: Any) -> str:
    """Fine-tune, expect one error and no output, and return the message."""
    values = {"data": folder / "classes", "model": str(folder / "pretrained"), "output": output}
    with pytest.raises(kind) as error:
        finetune(FinetuneOptions(**(values | SMALL | changes)))
    assert not (output / "run.json").exists()
    return str(error.value)


SEGMENTATION = {"task": "segmentation"}


def test_options_that_do_not_fit_are_one_error(folder, tmp_path):
    message = error_of(folder, tmp_path / "run", task="detection", layer_decay=0.0, drop_path=2, recount=0, mixup=-1)
    assert "5 errors" in message
    for text in ("task='detection'", "layer_decay=0.0", "drop_path=2", "recount=0", "mixup=-1"):
        assert text in message


def test_policy_of_the_augmentation_that_does_not_exist_is_an_error(folder, tmp_path):
    assert "'x9'" in error_of(folder, tmp_path / "run", aa="rand-x9")


def test_segmentation_options_without_that_task_are_an_error(folder, tmp_path):
    message = error_of(folder, tmp_path / "run", reduce_labels=True, class_names=Path("names.txt"))
    assert "2 errors" in message
    assert "task='segmentation' only" in message


def test_images_without_classes_are_an_error(folder, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "photograph.png")
    message = error_of(folder, tmp_path / "run", data=tmp_path)
    assert "photograph.png" in message


def test_number_of_classes_and_one_class_are_checked(folder, tmp_path):
    assert "nb_classes=5, but" in error_of(folder, tmp_path / "run", nb_classes=5)
    write_classes(tmp_path / "one", names=("red",))
    assert "expected at least 2" in error_of(folder, tmp_path / "run", data=tmp_path / "one")


def test_other_classes_in_the_evaluation_images_are_an_error_with_both(folder, tmp_path):
    write_classes(tmp_path / "held", names=("blue", "pink", "red"))
    message = error_of(folder, tmp_path / "run", eval_data_path=tmp_path / "held")
    assert "alone has green" in message
    assert "alone has pink" in message


def test_paths_that_do_not_exist_are_errors(folder, tmp_path):
    for name in ("data", "eval_data_path", "model"):
        kind = str if name == "model" else Path
        message = error_of(folder, tmp_path / "run", FileNotFoundError, **{name: kind(tmp_path / "missing")})
        assert "missing" in message


def test_segmentation_without_a_number_of_classes_is_an_error(folder, tmp_path):
    message = error_of(folder, tmp_path / "run", data=folder / "segments", **SEGMENTATION)
    assert "expected nb_classes or class_names" in message


def test_names_of_classes_that_do_not_fit_are_one_error(folder, tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("sea\n\nland\nsea\n\n", encoding="utf-8")
    changes = {"data": folder / "segments", "class_names": names, "nb_classes": 2}
    message = error_of(folder, tmp_path / "run", **SEGMENTATION, **changes)
    for text in ("line 2 is empty", "given twice: sea", "4 names, but nb_classes=2"):
        assert text in message
    missing = {"data": folder / "segments", "class_names": tmp_path / "other.txt"}
    assert "other.txt" in error_of(folder, tmp_path / "run", FileNotFoundError, **SEGMENTATION, **missing)


def test_segmentation_of_a_model_with_three_layers_is_an_error(folder, tmp_path):
    changes = {"data": folder / "segments", "model": str(folder / "shallow"), "nb_classes": 2}
    assert "3 layers" in error_of(folder, tmp_path / "run", **SEGMENTATION, **changes)


def test_configuration_that_changes_shapes_of_the_trunk_is_an_error(folder, tmp_path):
    message = error_of(folder, tmp_path / "run", configuration={"intermediate_size": 64})
    assert "intermediate" in message


@pytest.mark.parametrize("part", ["training", "evaluation"])
def test_annotation_with_ids_outside_the_classes_is_an_error_that_names_the_image(part, folder, tmp_path):
    write_segmentation(tmp_path / "data")
    Image.fromarray(np.full((40, 40), 7, dtype=np.uint8)).save(tmp_path / "data/annotations/3.png")
    paths = {"data": tmp_path / "data"}
    if part == "evaluation":
        paths = {"data": folder / "segments", "eval_data_path": tmp_path / "data"}
    values = {"model": str(folder / "pretrained"), "output": tmp_path / "run", "nb_classes": 2, "epochs": 1}
    for workers in (0, 1):
        with pytest.raises(ValueError, match=r"^image '.*3.png': the annotation has the class ids 7 .*is ignored\)$"):
            finetune(FinetuneOptions(**(SMALL | paths | values | SEGMENTATION | {"num_workers": workers})))


def test_other_names_in_the_same_file_are_another_run(folder, tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("sea\nland\n", encoding="utf-8")
    changes = {"data": folder / "segments", "class_names": names, "output": tmp_path / "run", "max_steps": 1}
    values = SMALL | SEGMENTATION | {"model": str(folder / "pretrained"), "batch_size": 3} | changes
    finetune(FinetuneOptions(**values))
    names.write_text("sea\nsky\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"classes: \['sea', 'land'\] before, \['sea', 'sky'\] now"):
        finetune(FinetuneOptions(**values))


def test_evaluation_images_may_differ_when_a_run_is_resumed(folder, tmp_path):
    values = SMALL | {"data": folder / "classes", "model": str(folder / "pretrained"), "output": tmp_path / "run"}
    assert "top1" not in finetune(FinetuneOptions(**values, max_steps=1))[-1]
    assert "top1" in finetune(FinetuneOptions(**values, eval_data_path=folder / "classes"))[-1]


def test_another_run_in_the_output_is_kept(folder, tmp_path):
    values = {"data": folder / "classes", "model": str(folder / "pretrained"), "output": tmp_path / "run"}
    finetune(FinetuneOptions(**(values | SMALL | {"epochs": 1})))
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=r"layer_decay: 0.65 before, 0.75 now"):
        finetune(FinetuneOptions(**(values | SMALL | {"epochs": 1, "layer_decay": 0.75})))
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
