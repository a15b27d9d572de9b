"""Which images a data set has: all that lie below a folder, or those that a text file lists."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath

IMAGE_SUFFIXES = (
    *(".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpeg", ".jpg", ".pbm"),
    *(".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"),
)
"""What the names of images in a folder end in, in any case."""


@dataclass(frozen=True)
class Dataset:
    """Images by their paths, each once and sorted.

    Attributes:
        root: the folder that relative paths start from.
        paths: of the images, with slashes; as in the list, where a list names them.
        remark: what was left out, for people; empty where nothing was.
    """

    source: Path
    root: Path
    paths: tuple[str, ...]
    remark: str

    def digest(self) -> str:
        """A number that changes with the paths, in hexadecimals."""
        return hashlib.sha256("\0".join(self.paths).encode("utf-8", "surrogateescape")).hexdigest()

    def batches(self, size: int) -> int:
        """How many batches of `size` there are, the last one perhaps smaller."""
        return -(-len(self.paths) // size)

    def batch(self, number: int, size: int) -> tuple[str, ...]:
        """The paths of one batch, which is the same whoever asks."""
        return self.paths[number * size : (number + 1) * size]


def find_images(source: str | os.PathLike[str]) -> Dataset:
    """The images below the folder `source`, hidden ones left out, or those that the text file `source` lists.

    A list has a path in each line, relative to the folder of the list; empty lines count for nothing.

    Raises:
        FileNotFoundError: there is no such file or folder, or a folder below cannot be listed.
        ValueError: there is no image, or the file is no list.
    """
    path = Path(source)
    if path.is_dir():
        return _in_folder(path)
    if path.is_file():
        return _in_list(path)
    accepted = "a folder, or a text file with the path of an image in each line"
    raise FileNotFoundError(
        f"no data set at {os.fspath(source)!r}: there is no such file or folder; accepted: {accepted}"
    )


def _in_folder(folder: Path) -> Dataset:
    files = [file.relative_to(folder).as_posix() for file in _files_below(folder, frozenset())]
    images = sorted(file for file in files if file.lower().endswith(IMAGE_SUFFIXES))
    if not images:
        raise ValueError(
            f"the folder {os.fspath(folder)!r} holds no image: it has {len(files)} files, none of which ends in "
            f"{', '.join(IMAGE_SUFFIXES)}"
        )
    return Dataset(
        folder.resolve(), folder, tuple(images), _left_out(len(files) - len(images), "files with other endings")
    )


def _files_below(folder: Path, above: frozenset[tuple[int, int]]) -> Iterator[Path]:
    """Files of a folder and of those in it, also by links; a link to a folder that it lies in is not followed."""
    status = folder.stat()
    identity = status.st_dev, status.st_ino
    if identity in above:
        return
    with os.scandir(folder) as entries:
        visible = [entry for entry in entries if not entry.name.startswith(".")]
    for entry in visible:
        if entry.is_dir():
            yield from _files_below(Path(entry.path), above | {identity})
        else:
            yield Path(entry.path)


def _in_list(file: Path) -> Dataset:
    name = os.fspath(file)
    if name.lower().endswith(IMAGE_SUFFIXES):
        raise ValueError(f"{name!r} is an image; accepted: a folder of images, or a text file that lists some")
    text = file.read_text(encoding="utf-8-sig", errors="surrogateescape")
    if "\0" in text:
        raise ValueError(f"{name!r} is no text file; accepted: a folder of images, or a text file that lists some")
    lines = [PurePath(line.rstrip("\r")).as_posix() for line in text.split("\n") if line.strip()]
    if not lines:
        raise ValueError(f"the list {name!r} is empty; accepted: the path of an image in each line")
    images = sorted(set(lines))
    return Dataset(
        file.resolve(), file.parent, tuple(images), _left_out(len(lines) - len(images), "lines that repeat others")
    )


def _left_out(count: int, what: str) -> str:
    return f"{count} {what} are left out" if count else ""
