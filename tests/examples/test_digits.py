"""The checkpoint in examples/digits equals its training log; its script trains such a checkpoint."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

from beit_fast import BeitConfig, BeitForImageClassification, BeitForMaskedImageModeling
from beit_fast.utils.names import ATTENTION_IMPLEMENTATIONS

EXAMPLES = Path(__file__).parents[2] / "examples"
DIGITS = EXAMPLES / "digits"
IMAGES = sorted((DIGITS / "images").glob("*.png"))
SHORT = ("--pretraining-epochs", "1", "--fine-tuning-epochs", "1")
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def load_model(folder: Path = DIGITS, attn_implementation: str | None = None) -> BeitForImageClassification:
    model = BeitForImageClassification(BeitConfig.from_pretrained(folder), attn_implementation)
    model.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
    return model.eval()


def preprocess(image: Image.Image, processor: dict[str, Any]) -> Tensor:
    """Preprocess to `[3, height, width]` by `preprocessor_config.json`."""
    size = processor["size"]["width"], processor["size"]["height"]
    pixels = np.asarray(image.convert("RGB").resize(size, processor["resample"]), dtype=np.float64)
    normal = (pixels * processor["rescale_factor"] - processor["image_mean"]) / processor["image_std"]
    return torch.from_numpy(normal).permute(2, 0, 1).float()


@pytest.fixture(scope="module")
def log() -> dict[str, Any]:
    return json.loads((DIGITS / "training_log.json").read_text())


@pytest.fixture(scope="module")
def processor() -> dict[str, Any]:
    return json.loads((DIGITS / "preprocessor_config.json").read_text())


@pytest.fixture(scope="module")
def shown(processor: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The shipped images as model inputs, and the classes from their file names."""
    pixels = torch.stack([preprocess(Image.open(path), processor) for path in IMAGES])
    return pixels, torch.tensor([int(path.stem.split("_")[0]) for path in IMAGES])


@pytest.fixture(scope="module")
def held_out(log: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The held-out indices, uint8 images `[n, 8, 8]` and classes, from the seed of the log."""
    data = load_digits()
    _, indices = train_test_split(
        np.arange(len(data.target)),
        test_size=log["split"]["held_out"],
        stratify=data.target,
        random_state=log["split"]["random_state"],
    )
    return indices, np.rint(data.images[indices] * 255 / 16).astype(np.uint8), data.target[indices]


def test_checkpoint_is_small_and_in_hub_layout() -> None:
    file = DIGITS / "model.safetensors"
    assert file.stat().st_size < 2_000_000
    with safe_open(file, "pt") as tensors:
        assert tensors.metadata() == {"format": "pt"}
    model = load_model()
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float32}
    assert model.config.architectures == ["BeitForImageClassification"]
    assert model.config.id2label == dict(enumerate(NAMES))


def test_checkpoint_in_transformers_gives_equal_logits(shown: tuple[Tensor, Tensor], processor: dict[str, Any]) -> None:
    theirs, loading = transformers.BeitForImageClassification.from_pretrained(DIGITS, output_loading_info=True)
    assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    pixels, _ = shown
    with torch.no_grad():
        torch.testing.assert_close(theirs.eval()(pixels).logits, load_model()(pixels).logits)


def test_checkpoint_tables_differ_between_layers() -> None:
    tables = [table for name, table in load_model().named_parameters() if name.endswith("relative_position_bias_table")]
    assert len(tables) == load_model().config.num_hidden_layers
    assert all(table.std() > 0.1 for table in tables)
    assert all(not torch.equal(tables[0], table) for table in tables[1:])


def test_shipped_images_are_two_held_out_digits_per_class(
    held_out: tuple[np.ndarray, np.ndarray, np.ndarray], shown: tuple[Tensor, Tensor]
) -> None:
    assert shown[1].bincount().tolist() == [2] * 10
    originals = {int(index): (image, label) for index, image, label in zip(*held_out, strict=True)}
    for path in IMAGES:
        label, index = map(int, path.stem.split("_"))
        image, original_label = originals[index]
        assert label == original_label
        with Image.open(path) as picture:
            assert picture.mode == "RGB"
            np.testing.assert_array_equal(np.asarray(picture), np.repeat(image[:, :, None], 3, axis=2))


@pytest.mark.parametrize("implementation", ATTENTION_IMPLEMENTATIONS)
def test_checkpoint_accuracy_every_attention_equals_log(
    implementation: str, shown: tuple[Tensor, Tensor], log: dict[str, Any]
) -> None:
    pixels, labels = shown
    with torch.no_grad():
        logits = load_model(attn_implementation=implementation)(pixels).logits
        exact = load_model(attn_implementation="eager").double()(pixels.double()).logits
        eager = load_model(attn_implementation="eager")(pixels).logits
    assert (logits.argmax(-1) == labels).double().mean().item() == log["images_accuracy"]
    floor = 4 * torch.finfo(torch.float32).eps * exact.norm()
    assert (logits - exact).norm() <= 2 * (eager - exact).norm() + floor


def test_held_out_accuracy_equals_log(
    held_out: tuple[np.ndarray, np.ndarray, np.ndarray], processor: dict[str, Any], log: dict[str, Any]
) -> None:
    _, images, labels = held_out
    assert log["split"]["held_out"] / (log["split"]["held_out"] + log["split"]["training"]) >= 0.2
    pixels = torch.stack([preprocess(Image.fromarray(image), processor) for image in images])
    with torch.no_grad():
        right = load_model()(pixels).logits.argmax(-1).numpy() == labels
    assert right.mean() == log["held_out_accuracy"] >= 0.97


def test_training_log_covers_every_epoch(log: dict[str, Any]) -> None:
    assert log["options"]["quick"] is False
    for stage in ("pretraining", "fine_tuning"):
        assert [row["epoch"] for row in log[stage]] == list(range(1, log["options"][f"{stage}_epochs"] + 1))
        assert log[stage][-1]["loss"] < log[stage][0]["loss"]
    assert log["pretraining"][0]["loss"] < math.log(load_model().config.vocab_size) + 0.1
    assert log["fine_tuning"][-1]["held_out_accuracy"] == round(log["held_out_accuracy"], 4)
    assert log["seconds"] < 300


def test_readme_figures_equal_log(log: dict[str, Any]) -> None:
    text = (DIGITS / "README.md").read_text()
    right = round(log["held_out_accuracy"] * log["split"]["held_out"])
    assert f"{log['held_out_accuracy']:.2%} ({right} of {log['split']['held_out']})".replace("%", " %") in text
    assert f"{log['seconds']:.0f} seconds" in text


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("beit_fast_train_digits", EXAMPLES / "train_digits.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_blockwise_mask_covers_two_fifths_in_blocks(script: ModuleType) -> None:
    random = np.random.default_rng(0)
    masks = np.stack([script.blockwise_mask((6, 6), random) for _ in range(300)])
    shares = masks.mean((1, 2))
    assert shares.min() > 0.4
    assert shares.mean() < 0.5
    assert masks.any(0).all()
    masked_beside_masked = masks[:, :, 1:][masks[:, :, :-1]].mean()
    assert masked_beside_masked > shares.mean() + 0.1


def test_augment_keeps_the_background(script: ModuleType, shown: tuple[Tensor, Tensor]) -> None:
    pixels, _ = shown
    moved = script.augment(pixels)
    assert moved.shape == pixels.shape
    assert moved.min() == -1
    assert moved.max() <= 1
    change = (moved - pixels).flatten(1).norm(dim=1) / (pixels + 1).flatten(1).norm(dim=1)
    assert change.min() > 0
    assert change.max() < 1


def test_start_from_copies_trunk_and_shared_table(script: ModuleType) -> None:
    sizes = script.ARCHITECTURE
    pretrained = BeitForMaskedImageModeling(
        BeitConfig(use_mask_token=True, use_shared_relative_position_bias=True, **sizes)
    ).eval()
    torch.nn.init.normal_(pretrained.beit.encoder.relative_position_bias.relative_position_bias_table)
    model = BeitForImageClassification(BeitConfig(use_relative_position_bias=True, num_labels=10, **sizes)).eval()
    script.start_from(pretrained, model)
    pixels = torch.randn(2, 3, sizes["image_size"], sizes["image_size"])
    with torch.no_grad():
        expected, found = (trunk(pixels).last_hidden_state for trunk in (pretrained.beit, model.beit))
        torch.testing.assert_close(found, expected)
        first, second, *_ = (layer.attention.attention.relative_position_bias for layer in model.beit.encoder.layer)
        first.relative_position_bias_table.zero_()
        assert second.relative_position_bias_table.abs().sum() > 0


def losses_in(log: dict[str, Any]) -> list[float]:
    return [row["loss"] for stage in ("pretraining", "fine_tuning") for row in log[stage]]


def run_script(out: Path, *options: str) -> dict[str, Any]:
    command = [sys.executable, str(EXAMPLES / "train_digits.py"), "--quick", "--out", str(out), *options]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert "held-out accuracy" in done.stdout
    return json.loads((out / "training_log.json").read_text())


@pytest.mark.slow
def test_train_digits_reduces_loss(tmp_path: Path) -> None:
    log = run_script(tmp_path, "--pretraining-epochs", "4", "--fine-tuning-epochs", "16")
    losses = losses_in(log)
    assert losses[3] < losses[0] - 0.1
    assert losses[-1] < losses[4] - 0.5
    assert log["held_out_accuracy"] > 0.2  # twice the accuracy of guessing


@pytest.mark.slow
def test_train_digits_seed_decides_weights_attention_does_not(tmp_path: Path) -> None:
    """The same seed gives the same bits; other attention gives the same losses up to rounding."""
    runs = {"first": ("0", "triton"), "again": ("0", "triton"), "eager": ("0", "eager"), "other": ("1", "sdpa")}
    losses, files = {}, {}
    for name, (seed, implementation) in runs.items():
        losses[name] = losses_in(run_script(tmp_path / name, *SHORT, "--seed", seed, "--attn", implementation))
        files[name] = (tmp_path / name / "model.safetensors").read_bytes()
    assert files["first"] == files["again"]
    assert losses["eager"] == pytest.approx(losses["first"], abs=5e-4)
    assert losses["other"] != pytest.approx(losses["first"], abs=5e-4)
    assert {path.name for path in (tmp_path / "first").iterdir()} == {path.name for path in DIGITS.iterdir()} - {
        "README.md"
    }
