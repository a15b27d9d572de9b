"""Row groups of Parquet and Arrow files."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ...utils.files import read_json_object
from ...utils.messages import join_choices, join_some

PARQUET_SUFFIXES = (".parquet", ".pq")
_STATE, _INFO, _SPLITS = "state.json", "dataset_info.json", "dataset_dict.json"  # files of `save_to_disk`


class Group(NamedTuple):
    """A row group of a file.

    Attributes:
        file: The path of the file below the folder of the table.
        number: The number of the group in the file.
        first_row, rows: Its rows in the file.
        fingerprint: Sizes and statistics that change with the contents.
    """

    file: str
    number: int
    first_row: int
    rows: int
    fingerprint: str


class TableFiles(NamedTuple):
    """The row groups of a table.

    Attributes:
        folder: The folder of the files.
        groups: The row groups in order.
        columns: "image", "integer" or another type, by the name of the column.
        class_names: Names of the classes, by the name of the column.
    """

    folder: Path
    groups: tuple[Group, ...]
    columns: dict[str, str]
    class_names: dict[str, tuple[str, ...]]

    def read(self, number: int, columns: list[str]) -> Any:
        """Read columns of a row group as a table of pyarrow."""
        group = self.groups[number]
        file = self.folder / group.file
        if file.suffix != ".arrow":
            from pyarrow.parquet import ParquetFile

            with ParquetFile(file) as opened:
                return opened.read_row_group(group.number, columns, use_threads=False)
        import pyarrow

        for at, batch in enumerate(_batches(file)):
            if at == group.number:
                return pyarrow.Table.from_batches([batch]).select(columns)
        raise ValueError(f"{group.file!r} has fewer record batches than when it was opened")


def is_table(path: Path) -> bool:
    """Whether a path is a table.

    That is a Parquet file, a folder of these, or a folder of `save_to_disk`.
    """
    if path.is_file():
        return path.name.lower().endswith(PARQUET_SUFFIXES)
    return path.is_dir() and (any((path / name).is_file() for name in (_STATE, _SPLITS)) or bool(_parquet_files(path)))


def open_tables(path: Path) -> TableFiles:
    """Open the files of a table; no rows are read.

    Raises:
        ImportError: If pyarrow is not installed.
        ValueError: If a file is damaged, files have different columns, or the folder has several splits.
    """
    _check_pyarrow()
    if (path / _SPLITS).is_file():
        splits = read_json_object(path / _SPLITS).get("splits") or []
        raise ValueError(f"{os.fspath(path)!r} has the splits {join_choices(splits)}: pass the folder of one of them")
    if (path / _STATE).is_file():
        names = [entry["filename"] for entry in read_json_object(path / _STATE).get("_data_files", [])]
        features = read_json_object(path / _INFO).get("features") if (path / _INFO).is_file() else None
        return _collect(path, names, features)
    if path.is_file():
        return _collect(path.parent, [path.name], None)
    return _collect(path, _parquet_files(path), None)


def _parquet_files(folder: Path) -> list[str]:
    names = (entry.name for entry in folder.iterdir() if entry.is_file() and not entry.name.startswith("."))
    return sorted(name for name in names if name.lower().endswith(PARQUET_SUFFIXES))


def _collect(folder: Path, names: list[str], features: Any) -> TableFiles:
    """Collect the row groups of files, which must have the same columns."""
    groups: list[Group] = []
    schemas: dict[str, Any] = {}
    for name in names:
        try:
            schemas[name], found = (_arrow_groups if name.endswith(".arrow") else _parquet_groups)(folder, name)
        except (OSError, ValueError) as error:  # pyarrow's ArrowInvalid is a ValueError
            raise ValueError(f"{os.fspath(folder / name)!r} cannot be read: {error}") from error
        groups += found
    if not schemas:
        return TableFiles(folder, (), {}, {})
    first = next(iter(schemas.values()))
    if others := [name for name, schema in schemas.items() if not schema.equals(first)]:
        raise ValueError(
            f"the files of {os.fspath(folder)!r} have different columns: {join_some(map(repr, others), 5)} differ from "
            f"{names[0]!r}"
        )
    columns = {field.name: _type_name(field.type) for field in first}
    return TableFiles(folder, tuple(groups), columns, _class_names(first, features))


def _parquet_groups(folder: Path, name: str) -> tuple[Any, list[Group]]:
    from pyarrow.parquet import ParquetFile

    with ParquetFile(folder / name) as file:
        metadata, first_row, groups = file.metadata, 0, []
        for number in range(metadata.num_row_groups):
            group = metadata.row_group(number)
            columns = (group.column(at) for at in range(group.num_columns))
            sizes = " ".join(f"{column.total_uncompressed_size} {_limits(column)}" for column in columns)
            groups.append(Group(name, number, first_row, group.num_rows, sizes))
            first_row += group.num_rows
        return file.schema_arrow, groups


def _limits(column: Any) -> str:
    """Return the least and largest number of a column chunk; an empty string for other types."""
    statistics = column.statistics
    if statistics is None or not statistics.has_min_max or not isinstance(statistics.min, int):
        return ""
    return f"{statistics.min} {statistics.max}"


def _arrow_groups(folder: Path, name: str) -> tuple[Any, list[Group]]:
    schema, first_row, groups = None, 0, []
    for number, batch in enumerate(_batches(folder / name)):
        schema = batch.schema
        groups.append(Group(name, number, first_row, batch.num_rows, str(batch.nbytes)))
        first_row += batch.num_rows
    return (_arrow_schema(folder / name) if schema is None else schema), groups


def _batches(file: Path) -> Iterator[Any]:
    """Yield the record batches of an Arrow stream; their buffers are mapped, not read."""
    import pyarrow

    with pyarrow.memory_map(os.fspath(file)) as source:
        yield from pyarrow.ipc.open_stream(source)


def _arrow_schema(file: Path) -> Any:
    import pyarrow

    with pyarrow.memory_map(os.fspath(file)) as source:
        return pyarrow.ipc.open_stream(source).schema


def _type_name(kind: Any) -> str:
    from pyarrow import types

    if types.is_integer(kind):
        return "integer"
    if _is_bytes(kind) or (types.is_struct(kind) and _is_bytes_and_path(kind)):
        return "image"
    return str(kind)


def _is_bytes(kind: Any) -> bool:
    from pyarrow import types

    return bool(types.is_binary(kind) or types.is_large_binary(kind))


def _is_bytes_and_path(kind: Any) -> bool:
    fields = {kind.field(at).name: kind.field(at).type for at in range(kind.num_fields)}
    return "bytes" in fields and _is_bytes(fields["bytes"])


def _class_names(schema: Any, features: Any) -> dict[str, tuple[str, ...]]:
    """Read the names of classes from Hugging Face's description of the columns."""
    if features is None:
        text = (schema.metadata or {}).get(b"huggingface", b"{}")
        try:
            features = json.loads(text).get("info", {}).get("features", {})
        except (ValueError, AttributeError):  # not Hugging Face's: the ids have no names
            features = {}
    named = {name: feature for name, feature in features.items() if isinstance(feature, dict) and "names" in feature}
    return {name: tuple(map(str, feature["names"])) for name, feature in named.items()}


def _check_pyarrow() -> None:
    try:
        import pyarrow  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"tables of images need pyarrow: pip install 'beit-fast[parquet]', or pass a folder of images ({error})"
        ) from error
