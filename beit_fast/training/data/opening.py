"""Open a source of images by its path."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import get_args

from ...utils.messages import describe, join_choices
from .folders import ClassFolder, ImageFolder, SegmentationFolder
from .source import ImageSource, SourceKind
from .table_files import is_table
from .tables import TableSource

_FOLDERS: dict[SourceKind, Callable[[Path], ImageSource]] = {
    "images": ImageFolder,
    "classes": ClassFolder,
    "segmentation": SegmentationFolder,
}
_EXPECTED = {
    "images": "a folder of images, or Parquet files",
    "classes": "a folder with one folder of images for each class, or Parquet files",
    "segmentation": "a folder with images/ and annotations/, or Parquet files",
}


def open_source(path: str | os.PathLike[str], kind: SourceKind) -> ImageSource:
    """Open a source of images.

    Args:
        path: A folder; or a Parquet file, a folder of these, or a folder that `datasets` saved by `save_to_disk`. See
            `TableSource` for the columns.
        kind: "images": a folder of images, also in folders below it. "classes": a folder with one folder of images for
            each class; the sorted names are the classes. "segmentation": a folder with `images/` and `annotations/`,
            paired by their names without suffix.

    Raises:
        FileNotFoundError: If there is no such folder or table.
        ImportError: If the source is a table and pyarrow is not installed.
        ValueError: If the folder does not have the images of this kind; the error lists every reason.
    """
    if kind not in _FOLDERS:
        raise ValueError(f"{describe('kind', kind)} is not supported (expected {join_choices(get_args(SourceKind))})")
    if is_table(Path(path)):
        return TableSource(path, kind)
    if not Path(path).is_dir():
        reason = "it is a file" if Path(path).exists() else "there is no such folder"
        raise FileNotFoundError(f"no data set at {os.fspath(path)!r}: {reason} (expected {_EXPECTED[kind]})")
    return _FOLDERS[kind](Path(path))
