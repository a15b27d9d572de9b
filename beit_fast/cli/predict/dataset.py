"""The images of a data set, read as batches of pixels."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from ...image_processing.image_folders import IMAGE_SUFFIXES, files_below, is_image_name
from ...utils.messages import count_of
from ...utils.workers import ignore_interrupt
from ..images import PixelBatch, batch_of, read_pixels


@dataclass(frozen=True)
class Dataset:
    """Images by their paths, sorted and without repetitions.

    Attributes:
        source: The absolute path of the folder or list.
        root: The folder that relative paths start from.
        paths: The paths of the images, with slashes.
        note: What was left out, or an empty string.
    """

    source: Path
    root: Path
    paths: tuple[str, ...]
    note: str

    def digest(self) -> str:
        """A hash of the paths, in hexadecimal."""
        return hashlib.sha256("\0".join(self.paths).encode("utf-8", "surrogateescape")).hexdigest()

    def files_named(self, name: str) -> list[Path]:
        """List the images whose file has this name, in any folder."""
        return [self.root / path for path in self.paths if path.rpartition("/")[2] == name]

    def time(self, path: str) -> float:
        """The time of the last change of an image; 0 if it does not exist."""
        try:
            return (self.root / path).stat().st_mtime
        except OSError:
            return 0.0

    def num_batches(self, size: int) -> int:
        """The number of batches of `size` images; the last one may be smaller."""
        return -(-len(self.paths) // size)

    def batch(self, number: int, size: int) -> tuple[str, ...]:
        """The paths of one batch; they depend on the data set only."""
        return self.paths[number * size : (number + 1) * size]


def find_images(source: str | os.PathLike[str]) -> Dataset:
    """Find the images below a folder or in a list file.

    Hidden files, pipes and devices of a folder are left out. A list has one path per line, relative to its own folder;
    empty lines are ignored.

    Raises:
        FileNotFoundError: If there is no such file or folder.
        ValueError: If there are no images, or the file is not a list.
    """
    path = Path(source)
    if path.is_dir():
        return _in_folder(path)
    if path.is_file():
        return _in_list(path)
    expected = "expected a folder, or a text file with one path per line"
    raise FileNotFoundError(f"no data set at {os.fspath(source)!r}: there is no such file or folder ({expected})")


def _in_folder(folder: Path) -> Dataset:
    files = files_below(folder)
    images = sorted(filter(is_image_name, files))
    if not images:
        raise ValueError(
            f"the folder {os.fspath(folder)!r} does not contain images: none of its {len(files)} files ends in "
            f"{', '.join(IMAGE_SUFFIXES)}"
        )
    left_out = len(files) - len(images)
    note = f"left out: {count_of(left_out, 'file')} with other suffixes" if left_out else ""
    return Dataset(folder.resolve(), folder, tuple(images), note)


def _in_list(file: Path) -> Dataset:
    name = os.fspath(file)
    expected = "expected a folder of images, or a text file with one path per line"
    if is_image_name(name):
        raise ValueError(f"{name!r} is an image ({expected})")
    text = file.read_text(encoding="utf-8-sig", errors="surrogateescape")
    if "\0" in text:
        raise ValueError(f"{name!r} is not a text file ({expected})")
    lines = [PurePath(line.rstrip("\r")).as_posix() for line in text.split("\n") if line.strip()]
    if not lines:
        raise ValueError(f"the list {name!r} is empty (expected one path per line)")
    images = sorted(set(lines))
    left_out = len(lines) - len(images)
    note = f"left out: {count_of(left_out, 'repeated line')}" if left_out else ""
    return Dataset(file.resolve(), file.parent, tuple(images), note)


class ImageBatch(NamedTuple):
    """One batch as it is read: the number of the batch, and its images."""

    number: int
    images: PixelBatch


class ImageBatches(TorchDataset[ImageBatch]):
    """Batches of a data set by number, for a DataLoader's workers.

    Args:
        dataset: The images.
        batch_size: Images in a batch.
        processor: The image processor, which turns a file into `pixel_values`.
    """

    def __init__(self, dataset: Dataset, batch_size: int, processor: Any) -> None:
        self.dataset = dataset
        self.batch_size = batch_size
        self.processor = processor

    def __len__(self) -> int:
        return self.dataset.num_batches(self.batch_size)

    def __getitem__(self, number: int) -> ImageBatch:
        paths = self.dataset.batch(number, self.batch_size)
        return ImageBatch(number, batch_of(self.read(self.dataset.root / path) for path in paths))

    def read(self, file: Path) -> Tensor | str:
        """Read an image as pixels `[1, C, H, W]`.

        If it cannot be read, return the reason.
        """
        return read_pixels(self.processor, file)

    def read_ahead(self, numbers: Sequence[int], workers: int) -> DataLoader[ImageBatch]:
        """Read the batches `numbers` in this order.

        The next batches are read in `workers` processes.
        """
        workers = min(workers, max(len(numbers) - 1, 0))  # a single batch has nothing to read ahead of
        return DataLoader(
            self,
            batch_size=None,
            sampler=numbers,
            num_workers=workers,
            prefetch_factor=1 if workers else None,  # shared memory is 64 MiB in a container
            worker_init_fn=ignore_interrupt,
        )
