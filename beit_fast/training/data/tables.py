"""Sources in tables: Parquet files, and folders of Hugging Face datasets."""

from __future__ import annotations

import io
import os
from bisect import bisect_right
from collections import OrderedDict
from itertools import accumulate
from pathlib import Path
from typing import Any

from ...image_processing.inputs import read_label_image, read_rgb
from ...utils.messages import describe, join_some, raise_value_error
from .sampler import WINDOW
from .source import Example, SourceKind, digest_of
from .table_files import TableFiles, open_tables

_LABEL_COLUMNS: dict[SourceKind, tuple[str, ...]] = {
    "images": (),
    "classes": ("label", "labels"),
    "segmentation": ("annotation", "label"),
}


class TableSource:
    """Images in Parquet files, or in a folder that `datasets` saved.

    The column `image` has encoded images: bytes, or the structs `{bytes, path}` of Hugging Face. Class ids are in
    `label` or `labels`, annotations in `annotation` or `label`. Row groups are read as a whole; each worker keeps
    `WINDOW` of them. Names of the classes are those of Hugging Face's metadata.

    Args:
        path: A Parquet file, a folder of Parquet files, or a folder of `save_to_disk`.
        kind: What to read beside the image.

    Raises:
        ImportError: If pyarrow is not installed.
        ValueError: If columns are missing or have other types, files differ, or there are no rows; the error lists
            every reason.
    """

    def __init__(self, path: str | os.PathLike[str], kind: SourceKind) -> None:
        self.name, self.kind = os.fspath(path), kind
        tables = open_tables(Path(path))
        choices = _LABEL_COLUMNS[kind]
        self._label_column = next((name for name in choices if name in tables.columns), None)
        raise_value_error(f"the table {self.name!r} cannot be used", _column_errors(tables, kind, self._label_column))
        self._tables = tables
        self.groups: tuple[int, ...] | None = tuple(group.rows for group in tables.groups)
        self._ends = list(accumulate(self.groups))
        names = tables.class_names.get(self._label_column) if kind == "classes" and self._label_column else None
        self.classes: tuple[str, ...] | None = names
        self._cache: OrderedDict[int, Any] = OrderedDict()

    def __len__(self) -> int:
        return self._ends[-1]

    def read(self, index: int) -> Example:
        """Read one image with its class id or annotation."""
        number, row = self._place(index)
        table, name = self._group(number), self.name_of(index)
        image = read_rgb(self._encoded(table, "image", row), f"image {name!r}")
        if self._label_column is None:
            return Example(image, None)
        if self.kind == "classes":
            return Example(image, self._class_id(table, row))
        annotation = read_label_image(self._encoded(table, self._label_column, row), "its annotation")
        if annotation.size != image.size:
            sizes = (f"{width}x{height}" for width, height in (annotation.size, image.size))
            raise ValueError("its annotation has {} pixels (expected {}, as the image)".format(*sizes))
        return Example(image, annotation)

    def name_of(self, index: int) -> str:
        """Return the file and the row of one image."""
        number, row = self._place(index)
        group = self._tables.groups[number]
        return f"{group.file}, row {group.first_row + row}"

    def digest(self) -> str:
        """Return a hash of files and classes, in hexadecimal.

        It contains names, row groups, their sizes and the limits of their ids. Rows are not read.
        """
        groups = (f"{group.file} {group.rows} {group.fingerprint}" for group in self._tables.groups)
        return digest_of((self.kind, str(self._label_column), *(self.classes or ()), *groups))

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_cache": OrderedDict()}

    def _place(self, index: int) -> tuple[int, int]:
        """Return the row group of an index, and its row there."""
        number = bisect_right(self._ends, index)
        return number, index - (self._ends[number - 1] if number else 0)

    def _group(self, number: int) -> Any:
        """Read a row group, or take it from the cache."""
        if number not in self._cache:
            while len(self._cache) >= WINDOW:
                self._cache.popitem(last=False)
            columns = ["image", *([] if self._label_column is None else [self._label_column])]
            self._cache[number] = self._tables.read(number, columns)
        self._cache.move_to_end(number)
        return self._cache[number]

    def _encoded(self, table: Any, column: str, row: int) -> io.BytesIO | Path:
        """Return the bytes of an image; its path if the row has no bytes."""
        value = table.column(column)[row].as_py()
        data = value.get("bytes") if isinstance(value, dict) else value
        if data is not None:
            return io.BytesIO(data)
        if isinstance(value, dict) and value.get("path"):
            return self._tables.folder / value["path"]
        raise ValueError(f"cannot be read: its column {column!r} is empty")

    def _class_id(self, table: Any, row: int) -> int:
        label = table.column(self._label_column)[row].as_py()
        if label is None or label < 0 or (self.classes is not None and label >= len(self.classes)):
            expected = "an int from 0" if self.classes is None else f"an int from 0 to {len(self.classes) - 1}"
            raise ValueError(f"its {describe(str(self._label_column), label)} is not a class id (expected {expected})")
        return int(label)


def _column_errors(tables: TableFiles, kind: SourceKind, label_column: str | None) -> list[str]:
    """Return why the columns do not serve a kind of source."""
    errors = []
    if not sum(group.rows for group in tables.groups):
        errors.append("it has no rows")
    images = ["image"]
    if kind == "segmentation" and label_column is not None:
        images.append(label_column)
    for name in images:
        if name not in tables.columns:
            errors.append(f"there is no column {name!r} (its columns are {join_some(map(repr, tables.columns))})")
        elif tables.columns[name] != "image":
            errors.append(
                f"the column {name!r} is {tables.columns[name]} (expected bytes, or structs of bytes and path)"
            )
    choices = _LABEL_COLUMNS[kind]
    if choices and label_column is None:
        expected = " or ".join(map(repr, choices))
        errors.append(f"there is no column {expected} (its columns are {join_some(map(repr, tables.columns))})")
    if kind == "classes" and label_column is not None and tables.columns[label_column] != "integer":
        errors.append(f"the column {label_column!r} is {tables.columns[label_column]} (expected integers, class ids)")
    return errors
