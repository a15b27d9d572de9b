"""Small image sets for the tests of this folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def picture(number: int, size: tuple[int, int] = (12, 8)) -> Image.Image:
    """Return an RGB image of one color, whose red is `number`."""
    return Image.new("RGB", size, (number, 100, 200))


def write_image(file: Path, number: int = 0) -> Path:
    """Write a `picture` as PNG."""
    file.parent.mkdir(parents=True, exist_ok=True)
    picture(number).save(file, "PNG")
    return file


def write_classes(folder: Path, counts: dict[str, int]) -> Path:
    """Write `counts` images of each class; red counts all images."""
    number = 0
    for name, count in counts.items():
        for index in range(count):
            write_image(folder / name / f"{index}.png", number)
            number += 1
    return folder


def write_annotation(file: Path, ids: np.ndarray, palette: bool = False) -> Path:
    """Write class ids uint8 `[H, W]`, with a palette or as gray."""
    file.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(ids)
    if palette:
        image.putpalette([value for index in range(256) for value in (255 - index, 0, index)])
    image.save(file, "PNG")
    return file


def red_of(image: Image.Image) -> int:
    """Return the red of a `picture`."""
    assert image.mode == "RGB"
    return image.getpixel((0, 0))[0]
