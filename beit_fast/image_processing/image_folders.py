"""Find image files below a folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

IMAGE_SUFFIXES = (
    *(".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpeg", ".jpg", ".pbm"),
    *(".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"),
)
"""Suffixes of the images of a folder, in any case."""


def files_below(folder: Path) -> list[str]:
    """List the files below a folder by their relative paths.

    Paths have slashes. Hidden files, pipes and devices are left out. Links are followed, except
    a link to a parent folder.
    """
    return [file.relative_to(folder).as_posix() for file in _walk(folder, frozenset())]


def is_image_name(path: str) -> bool:
    """Whether a path has the suffix of an image."""
    return path.lower().endswith(IMAGE_SUFFIXES)


def _walk(folder: Path, above: frozenset[tuple[int, int]]) -> Iterator[Path]:
    status = folder.stat()
    identity = status.st_dev, status.st_ino
    if identity in above:
        return
    with os.scandir(folder) as entries:
        visible = [entry for entry in entries if not entry.name.startswith(".")]
    for entry in visible:
        if entry.is_dir():
            yield from _walk(Path(entry.path), above | {identity})
        elif entry.is_file() or not os.path.exists(entry.path):  # a broken link is a failure
            yield Path(entry.path)
