"""A hub cache of small checkpoints and the other files that the documentation reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import beit_fast

from ..support import timm_reference
from ..support.checkout import ROOT
from ..support.transformers_reference import randomize

COMMIT = "0123456789abcdef0123456789abcdef01234567"
"""The revision of every cached repository."""

SMALL = {
    "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64, "num_labels": 5,
    "use_relative_position_bias": True, "layer_scale_init_value": 0.1,
}  # fmt: skip

CHECKPOINTS: dict[str, tuple[str, dict[str, Any]]] = {
    "microsoft/beit-base-patch16-224": ("BeitForImageClassification", {"num_labels": 12, "num_hidden_layers": 1}),
    "microsoft/beit-base-patch16-224-pt22k": (
        "BeitForMaskedImageModeling",
        {"use_mask_token": True, "num_hidden_layers": 1, "vocab_size": 16},
    ),
    "microsoft/beit-base-finetuned-ade-640-640": (
        "BeitForSemanticSegmentation",
        {"image_size": 64, "out_indices": [0, 1, 2, 3], "auxiliary_channels": 8},
    ),
}


def build_hub(home: Path) -> None:
    """Write checkpoints to `home/hub` in the layout of `huggingface_hub`."""
    for name, (class_name, options) in CHECKPOINTS.items():
        repository = home / "hub" / f"models--{name.replace('/', '--')}"
        snapshot = repository / "snapshots" / COMMIT
        snapshot.mkdir(parents=True)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(COMMIT)
        save_small(class_name, snapshot, **options)


def save_small(class_name: str, folder: Path, **options: Any) -> None:
    """Save a small random model and its image processor."""
    config = beit_fast.BeitConfig(**{"image_size": 224, **SMALL, **options})
    model = getattr(beit_fast, class_name)(config)
    randomize(model)
    model.save_pretrained(folder)
    beit_fast.BeitImageProcessor(size=config.image_size, do_center_crop=False).save_pretrained(folder)


def build_workspace(folder: Path) -> None:
    """Write the files that code blocks read: images, a timm checkpoint and the examples."""
    generator = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    names = ("photograph.jpg", "other.png", "street.jpg", "images/one.png", "images/two.jpg")
    for name in names:
        Image.fromarray(generator.integers(0, 256, (480, 640, 3), dtype=np.uint8)).save(folder / name)
    (folder / "examples").symlink_to(ROOT / "examples")
    for split in ("train", "val"):
        for name in ("daisy", "rose", "tulip"):
            (folder / "flowers" / split / name).mkdir(parents=True)
            for index in range(2):
                pixels = generator.integers(0, 256, (64, 80, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / "flowers" / split / name / f"{index}.jpg")
    for part, shape in (("images", (64, 80, 3)), ("annotations", (64, 80))):
        (folder / "rooms" / part).mkdir(parents=True)
        for index in range(2):
            pixels = generator.integers(0, 256 if part == "images" else 2, shape, dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "rooms" / part / f"{index}.png")
    timm_model = timm_reference.build(img_size=224, patch_size=16, use_rel_pos_bias=True)
    torch.save(timm_model.state_dict(), folder / "timm_or_unilm.pth")
