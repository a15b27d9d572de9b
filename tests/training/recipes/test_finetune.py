"""Fine-tuning: classification and segmentation of generated images, with what is saved and how it is scored."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from beit_fast import (
    BeitForImageClassification,
    BeitForMaskedImageModeling,
    BeitForSemanticSegmentation,
    BeitImageProcessor,
)
from beit_fast.checkpoint.key_mapping import to_timm_names
from beit_fast.training import FinetuneOptions, finetune
from beit_fast.training.data import open_source
from beit_fast.training.engine.processes import Processes
from beit_fast.training.recipes.finetune import FinetuneRecipe

from .finetune_data import SIZE, write_classes, write_pretrained, write_segmentation

SMALL: dict[str, Any] = {
    "batch_size": 6,
    "epochs": 2,
    "warmup_epochs": 0.5,
    "lr": 2e-3,
    "num_workers": 0,
    "log_every": 1,
    "device": "cpu",
}
SHARED = "beit.encoder.relative_position_bias.relative_position_bias_table"
TWO_PROCESSES = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
OF_LAYER = "beit.encoder.layer.{}.attention.attention.relative_position_bias.relative_position_bias_table"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with data and a pre-trained checkpoint."""
    folder = tmp_path_factory.mktemp("finetune")
    write_classes(folder / "classes")
    write_classes(folder / "held_out", images=3)
    write_segmentation(folder / "segments")
    write_pretrained(folder / "pretrained")
    return folder


def options(folder: Path, output: Path, **changes: Any) -> FinetuneOptions:
    values = {"data": folder / "classes", "model": str(folder / "pretrained"), "output": output}
    return FinetuneOptions(**(values | SMALL | changes))


def test_classification_learns_colors_and_saves_what_transformers_loads(folder, tmp_path):
    rows = finetune(
        options(folder, tmp_path / "run", eval_data_path=folder / "held_out", epochs=6, aa=None, mixup=0.0, cutmix=0.0)
    )
    scores = [row for row in rows if "top1" in row]
    assert len(scores) == 6
    assert scores[-1]["top1"] >= 8 / 9
    assert scores[-1]["top5"] == 1
    transformers = pytest.importorskip("transformers")
    model = transformers.BeitForImageClassification.from_pretrained(tmp_path / "run/model").eval()
    assert model.config.id2label == {0: "blue", 1: "green", 2: "red"}
    processor = BeitImageProcessor.from_pretrained(tmp_path / "run/model")
    assert processor.image_mean == [0.4, 0.5, 0.6]
    assert (processor.size, processor.crop_size) == ({"shortest_edge": 36}, {"height": SIZE, "width": SIZE})
    photograph = Image.open(folder / "held_out/red/0.png")
    pixels = processor(photograph, return_tensors="pt").pixel_values
    kind = getattr(transformers, "BeitImageProcessorPil", transformers.BeitImageProcessor)  # 5.x, 4.57
    theirs = kind.from_pretrained(tmp_path / "run/model")(photograph, return_tensors="pt").pixel_values
    torch.testing.assert_close(pixels, torch.as_tensor(theirs), atol=1e-5, rtol=0)
    ours = BeitForImageClassification.from_pretrained(tmp_path / "run/model")
    with torch.no_grad():
        torch.testing.assert_close(ours(pixels).logits, model(pixels).logits, atol=1e-4, rtol=1e-4)
        assert model(pixels).logits.argmax().item() == 2


def test_scores_of_the_log_are_those_of_the_saved_model(folder, tmp_path):
    rows = finetune(options(folder, tmp_path / "run", eval_data_path=folder / "held_out", batch_size=4, epochs=1))
    model = BeitForImageClassification.from_pretrained(tmp_path / "run/model")
    processor = BeitImageProcessor.from_pretrained(tmp_path / "run/model")
    hits = 0
    for label, name in enumerate(("blue", "green", "red")):
        for file in sorted((folder / "held_out" / name).iterdir()):
            with torch.no_grad():
                hits += int(model(processor(file, return_tensors="pt").pixel_values).logits.argmax() == label)
    assert [row["top1"] for row in rows if "top1" in row] == [hits / 9]


def test_each_layer_starts_from_a_copy_of_the_shared_table(folder, tmp_path):
    finetune(options(folder, tmp_path / "run", max_steps=1, lr=1e-12, min_lr=0.0, weight_decay=0.0))
    weights = BeitForImageClassification.from_pretrained(tmp_path / "run/model").state_dict()
    pretrained = write_pretrained(tmp_path / "again").state_dict()
    assert SHARED not in weights
    for layer in range(4):
        torch.testing.assert_close(weights[OF_LAYER.format(layer)], pretrained[SHARED], atol=1e-6, rtol=0)
    assert "beit.embeddings.mask_token" not in weights
    config = BeitForImageClassification.from_pretrained(tmp_path / "run/model").config
    assert config.use_mean_pooling
    assert config.drop_path_rate == 0.1


@pytest.mark.parametrize("kind", ["transformers", "unilm"])
def test_run_starts_from_files_of_other_projects(kind, folder, tmp_path):
    pretrained = BeitForMaskedImageModeling.from_pretrained(folder / "pretrained")
    if kind == "transformers":
        transformers = pytest.importorskip("transformers")
        model = tmp_path / "theirs"
        transformers.BeitForMaskedImageModeling.from_pretrained(folder / "pretrained").save_pretrained(model)
    else:
        model = tmp_path / "unilm.pth"
        trunk = {f"beit.{name}": tensor for name, tensor in pretrained.beit.state_dict().items()}
        del trunk["beit.embeddings.mask_token"]
        torch.save({"model": to_timm_names(trunk)}, model)
    still = {"max_steps": 1, "lr": 1e-12, "min_lr": 0.0, "weight_decay": 0.0}
    finetune(options(folder, tmp_path / "run", model=str(model), **still))
    weights = BeitForImageClassification.from_pretrained(tmp_path / "run/model").state_dict()
    for layer in range(4):
        torch.testing.assert_close(weights[OF_LAYER.format(layer)], pretrained.state_dict()[SHARED])
    query = "beit.encoder.layer.1.attention.attention.query.weight"
    torch.testing.assert_close(weights[query], pretrained.state_dict()[query])


def test_larger_images_resize_the_tables(folder, tmp_path):
    finetune(options(folder, tmp_path / "run", input_size=48, max_steps=1, precision="bfloat16"))
    model = BeitForImageClassification.from_pretrained(tmp_path / "run/model")
    assert model.config.image_size == 48
    assert len(model.state_dict()[OF_LAYER.format(0)]) == (2 * 6 - 1) ** 2 + 3
    assert BeitImageProcessor.from_pretrained(tmp_path / "run/model").crop_size == {"height": 48, "width": 48}


def test_segmentation_learns_two_sides_and_saves_what_transformers_loads(folder, tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("sea\nland\n", encoding="utf-8")
    rows = finetune(
        options(
            folder,
            tmp_path / "run",
            task="segmentation",
            data=folder / "segments",
            eval_data_path=folder / "segments",
            class_names=names,
            epochs=10,
            batch_size=3,
            color_jitter=None,
        )
    )
    scores = [row for row in rows if "mean_iou" in row]
    assert scores[-1]["mean_iou"] > 0.7
    transformers = pytest.importorskip("transformers")
    model = transformers.BeitForSemanticSegmentation.from_pretrained(tmp_path / "run/model").eval()
    assert model.config.id2label == {0: "sea", 1: "land"}
    ours = BeitForSemanticSegmentation.from_pretrained(tmp_path / "run/model")
    pixels = torch.randn(1, 3, SIZE, SIZE)
    with torch.no_grad():
        torch.testing.assert_close(ours(pixels).logits, model(pixels).logits, atol=1e-4, rtol=1e-4)


def test_segmentation_of_ignored_pixels_alone_does_not_stop_a_run(folder, tmp_path):
    write_segmentation(tmp_path / "data")
    for file in (tmp_path / "data/annotations").iterdir():
        Image.new("L", (40, 40), 255).save(file)
    changes = {"data": tmp_path / "data", "task": "segmentation", "nb_classes": 2, "batch_size": 3, "epochs": 1}
    rows = finetune(options(folder, tmp_path / "run", **changes))
    assert {row["loss"] for row in rows} == {0.0}


def test_reduced_labels_start_at_the_second_class_and_are_in_the_processor(folder, tmp_path):
    write_segmentation(tmp_path / "data", background=1)
    changes = {"data": tmp_path / "data", "task": "segmentation", "nb_classes": 2, "batch_size": 3, "epochs": 1}
    finetune(options(folder, tmp_path / "run", reduce_labels=True, **changes))
    assert BeitImageProcessor.from_pretrained(tmp_path / "run/model").do_reduce_labels


def test_continued_classifier_keeps_its_head_and_another_task_begins_a_new_one(folder, tmp_path):
    still = {"max_steps": 1, "lr": 1e-12, "min_lr": 0.0, "weight_decay": 0.0}
    finetune(options(folder, tmp_path / "first", epochs=1))
    finetune(options(folder, tmp_path / "second", model=str(tmp_path / "first/model"), **still))
    write_classes(tmp_path / "two", names=("blue", "red"))
    finetune(options(folder, tmp_path / "third", model=str(tmp_path / "first/model"), data=tmp_path / "two", **still))
    first, second, third = (
        BeitForImageClassification.from_pretrained(tmp_path / name / "model").classifier.weight
        for name in ("first", "second", "third")
    )
    torch.testing.assert_close(first, second)
    assert third.shape == (2, 32)


def test_average_of_the_weights_is_evaluated_and_saved(folder, tmp_path):
    rows = finetune(options(folder, tmp_path / "run", eval_data_path=folder / "held_out", model_ema_decay=0.5))
    assert {"top1", "ema_top1"} <= rows[-1].keys()
    models = [BeitForImageClassification.from_pretrained(tmp_path / "run" / name) for name in ("model", "model_ema")]
    assert not torch.equal(*(model.classifier.weight for model in models))


def test_unreadable_images_are_skipped_in_training_and_left_out_of_scores(folder, tmp_path):
    for name in ("train", "held"):
        write_classes(tmp_path / name, images=4)
        (tmp_path / name / "red/0.png").write_bytes(b"not an image")
    rows = finetune(options(folder, tmp_path / "run", data=tmp_path / "train", eval_data_path=tmp_path / "held"))
    assert any("red/0.png" in text for row in rows for text in row.get("unreadable", []))
    assert rows[-1]["unreadable_images"] == 1


def without_speed(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name != "images_per_second"} for row in rows]


def command_of(folder: Path, output: Path, **changes: Any) -> list[str]:
    command = ["beit_fast", "finetune", str(folder / "classes"), str(output)]
    paths = {"model": folder / "pretrained", "eval_data_path": folder / "held_out"}
    for name, value in (paths | SMALL | changes).items():
        command += ["--" + name.replace("_", "-"), *([] if value is True else [str(value)])]
    return command


def test_killed_run_resumes_to_the_same_numbers(folder, tmp_path):
    values = options(folder, tmp_path / "whole", epochs=6, eval_data_path=folder / "held_out", num_workers=2)
    whole = finetune(values)
    killed = tmp_path / "killed"
    command = [sys.executable, "-m", *command_of(folder, killed, epochs=6, num_workers=2)]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}  # as in this process: sums of several threads round differently
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=one_thread)
    log, deadline = killed / "log.jsonl", time.monotonic() + 240
    while not log.exists() or len(log.read_text().splitlines()) < 5:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert len(log.read_text().splitlines()) < len(whole)
    subprocess.run(command, check=True, capture_output=True, env=one_thread)
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert without_speed(rows) == without_speed(whole)
    ours, expected = (path / "model/model.safetensors" for path in (killed, tmp_path / "whole"))
    assert ours.read_bytes() == expected.read_bytes()


def test_interrupted_segmentation_resumes_to_the_same_weights_and_statistics(folder, tmp_path):
    changes = {"task": "segmentation", "nb_classes": 2, "batch_size": 3, "data": folder / "segments"}
    changes |= {"save_every_steps": 1, "model_ema_decay": 0.9, "eval_data_path": folder / "segments"}
    whole = finetune(options(folder, tmp_path / "whole", **changes))
    for steps in (1, 3, None):  # the second epoch begins after step 2
        rows = finetune(options(folder, tmp_path / "parts", **changes, max_steps=steps))
    assert without_speed([row for row in rows if row["step"] == 4]) == without_speed(
        [row for row in whole if row["step"] == 4]
    )
    for name in ("model", "model_ema"):
        ours, expected = (tmp_path / run / name / "model.safetensors" for run in ("parts", "whole"))
        assert ours.read_bytes() == expected.read_bytes()


@pytest.mark.parametrize("fsdp", [False, True])
def test_two_processes_train_and_evaluate_as_one_does(fsdp, folder, tmp_path):
    changes: dict[str, Any] = {"mixup": 0.0, "cutmix": 0.0, "drop_path": 0.0, "epochs": 1}
    held_out = write_classes(tmp_path / "held_out", images=3)
    for name in ("blue/0.png", "red/1.png"):
        (held_out / name).unlink()  # shares of 3 and 4 images: one process has a batch more
    changes["eval_data_path"] = held_out
    rows = finetune(options(folder, tmp_path / "one", **changes))
    command = command_of(folder, tmp_path / "two", **(changes | {"batch_size": 3} | ({"fsdp": True} if fsdp else {})))
    subprocess.run([*TWO_PROCESSES, *command], check=True, capture_output=True, timeout=300)
    both = [json.loads(line) for line in (tmp_path / "two/log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in both] == [row["step"] for row in rows]
    for ours, expected in zip(both, rows, strict=True):
        for name in ("loss", "top1", "top5"):
            assert ours.get(name, -1) == pytest.approx(expected.get(name, -1), rel=1e-3), name


def test_two_processes_train_segmentation_whose_last_block_has_no_gradient(folder, tmp_path):
    changes: dict[str, Any] = {"task": "segmentation", "nb_classes": 2, "batch_size": 2, "epochs": 1}
    command = command_of(folder, tmp_path / "run", **(changes | {"eval_data_path": folder / "segments"}))
    command[2] = str(folder / "segments")
    subprocess.run([*TWO_PROCESSES, *command], check=True, capture_output=True, timeout=300)
    row = json.loads((tmp_path / "run/log.jsonl").read_text().splitlines()[-1])
    again = options(folder, tmp_path / "again", **changes, data=folder / "segments").resolved(1)
    source = open_source(folder / "segments", "segmentation")
    recipe = FinetuneRecipe(again, source, source, ["sea", "land"], Processes(torch.device("cpu")), {})
    recipe.model.load_state_dict(BeitForSemanticSegmentation.from_pretrained(tmp_path / "run/model").state_dict())
    recipe.model.eval()
    scores = recipe.evaluate()
    assert {name: row[name] for name in scores} == pytest.approx(scores)
