"""The picture of `beit-fast segment`: classes in colors over a photograph."""

from __future__ import annotations

import colorsys
from typing import Any

import torch
from torch import Tensor


def class_shares(classes: Tensor, id2label: dict[int, str]) -> list[dict[str, Any]]:
    """List the classes that occur with share and color, largest first."""
    indices, counts = classes.unique(return_counts=True)
    shares = [
        {
            "index": index,
            "label": id2label.get(index, str(index)),
            "share": count / classes.numel(),
            "color": "#" + bytes(class_color(index)).hex(),
        }
        for index, count in zip(indices.tolist(), counts.tolist(), strict=True)
    ]
    return sorted(shares, key=lambda share: -share["share"])


def overlay(photograph: Any, classes: Tensor, count: int, opacity: float) -> Any:
    """Tint every pixel of the photograph by the color of its class."""
    from PIL import Image

    palette = torch.tensor([class_color(index) for index in range(count)], dtype=torch.uint8)
    return Image.blend(photograph, Image.fromarray(palette[classes].numpy()), opacity)


def class_color(index: int) -> tuple[int, int, int]:
    """The color of a class, 0 to 255: the hues of consecutive classes are a golden angle apart."""
    red, green, blue = colorsys.hsv_to_rgb((index * 0.6180339887) % 1.0, 0.85, 1.0 - 0.25 * (index // 8 % 3))
    return round(255 * red), round(255 * green), round(255 * blue)
