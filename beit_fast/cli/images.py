"""Read the images of a command by its image processor."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor


class PixelBatch(NamedTuple):
    """The images of one batch, as read.

    Attributes:
        groups: The pixels of all images of one size, float `[n, C, H, W]`, and their indices in the batch.
        errors: Why an image could not be read, by its index in the batch.
    """

    groups: list[tuple[list[int], Tensor]]
    errors: dict[int, str]


def read_pixels(processor: Any, file: Path) -> Tensor | str:
    """Read an image as pixels `[1, C, H, W]`.

    If it cannot be read, return the reason.
    """
    try:
        return processor(file, do_convert_rgb=True, return_tensors="pt")["pixel_values"]
    except MemoryError:
        raise
    except Exception as error:  # Pillow raises nearly any exception for a damaged file
        return unreadable_reason(error, file)


def group_by_size(images: Iterable[Tensor | str]) -> PixelBatch:
    """Stack the results of `read_pixels` that have one size."""
    pixels: dict[torch.Size, list[Tensor]] = {}
    indices: dict[torch.Size, list[int]] = {}
    errors = {}
    for index, image in enumerate(images):
        if isinstance(image, str):
            errors[index] = image
        else:
            pixels.setdefault(image.shape, []).append(image)
            indices.setdefault(image.shape, []).append(index)
    return PixelBatch([(indices[shape], torch.cat(images)) for shape, images in pixels.items()], errors)


def unreadable_reason(error: Exception, file: Path) -> str:
    """Return the error of reading one file, without index and folder.

    The results of `predict` then do not depend on the location of the data set.
    """
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    name = os.fspath(file)
    text = str(error).removeprefix(f"image {name!r} ").replace(name, file.name)
    return text or type(error).__name__
