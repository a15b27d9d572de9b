"""Generated images, annotations and checkpoints for fine-tuning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from beit_fast import BeitConfig, BeitForMaskedImageModeling, BeitImageProcessor

SIZE = 32
COLORS = {"blue": (40, 60, 200), "green": (40, 180, 60), "red": (200, 50, 40)}
TINY: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "image_size": SIZE,
    "patch_size": 8,
    "vocab_size": 16,
    "layer_scale_init_value": 1.0,
    "initializer_range": 0.1,
}


def write_classes(folder: Path, images: int = 6, names: tuple[str, ...] = tuple(COLORS)) -> Path:
    """Write noisy images of one color for each class."""
    draw = np.random.default_rng(0)
    for name in names:
        (folder / name).mkdir(parents=True)
        for index in range(images):
            pixels = np.clip(draw.normal(COLORS.get(name, (90, 90, 90)), 40, (36, 40, 3)), 0, 255)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{index}.png")
    return folder


def write_segmentation(folder: Path, images: int = 6, background: int = 0) -> Path:
    """Write images whose left part is blue and right part red, with their annotations.

    The classes are `background` and the one after it.
    """
    draw = np.random.default_rng(0)
    for name in ("images", "annotations"):
        (folder / name).mkdir(parents=True)
    for index in range(images):
        edge = int(draw.integers(10, 30))
        labels = np.full((40, 40), background, dtype=np.uint8)
        labels[:, edge:] = background + 1
        pixels = np.where((labels == background)[..., None], COLORS["blue"], COLORS["red"])
        Image.fromarray(pixels.astype(np.uint8)).save(folder / "images" / f"{index}.png")
        Image.fromarray(labels).save(folder / "annotations" / f"{index}.png")
    return folder


def write_pretrained(folder: Path, **fields: Any) -> BeitForMaskedImageModeling:
    """Write a pre-trained model with a shared bias table and its image processor, and return it."""
    options = TINY | {"use_mask_token": True, "use_shared_relative_position_bias": True} | fields
    torch.manual_seed(0)
    model = BeitForMaskedImageModeling(BeitConfig(**options))
    for name, parameter in model.named_parameters():
        if name.endswith("bias_table"):
            torch.nn.init.normal_(parameter)
    model.save_pretrained(folder)
    BeitImageProcessor(size=SIZE, image_mean=[0.4, 0.5, 0.6], image_std=[0.3, 0.3, 0.3]).save_pretrained(folder)
    return model
