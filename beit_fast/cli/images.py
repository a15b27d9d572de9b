"""Read the images of a command by its image processor."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from torch import Tensor

from ..image_processing.image_files import error_without_path, open_image_file
from ..image_processing.inputs import read_rgb
from ..image_processing.size_groups import group_by_size

Result = TypeVar("Result")


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
    return result_or_reason(file, lambda: processor(file, do_convert_rgb=True, return_tensors="pt")["pixel_values"])


def read_photograph(path: str) -> Any:
    """Read an image as an upright RGB image of Pillow.

    If it cannot be read, return the reason, a string.
    """
    return result_or_reason(Path(path), lambda: read_rgb(path, f"image {path!r}"))


def unreadable_images(paths: Iterable[str]) -> dict[str, str]:
    """Return why images cannot be opened; no pixels are decoded.

    A pipe is left out, because it can be read once only.
    """
    opened = {path: result_or_reason(Path(path), functools.partial(_try_to_open, path)) for path in paths}
    return {path: reason for path, reason in opened.items() if reason is not None}


def result_or_reason(file: Path, read: Callable[[], Result]) -> Result | str:
    """Return the result of `read`, or why the file cannot be read."""
    try:
        return read()
    except MemoryError:
        raise
    except Exception as error:  # Pillow raises nearly any exception for a damaged file
        return error_without_path(error, file)


def _try_to_open(path: str) -> None:
    if not path:
        raise ValueError("the path is empty (expected an image file)")
    if Path(path).is_dir():
        raise IsADirectoryError(f"image {path!r} is a folder (expected an image file; for a folder: beit-fast predict)")
    if not Path(path).is_fifo():
        open_image_file(path, f"image {path!r}").close()


def batch_of(images: Iterable[Tensor | str]) -> PixelBatch:
    """Collect the results of `read_pixels`."""
    read = dict(enumerate(images))
    groups = group_by_size((index, image) for index, image in read.items() if not isinstance(image, str))
    return PixelBatch(groups, {index: image for index, image in read.items() if isinstance(image, str)})
