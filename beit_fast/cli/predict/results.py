"""The result files of `beit-fast predict`: JSON Lines, and Parquet with the same fields."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..forward import ScoreName
from ..options import Format, Output
from .journal import Record, Writer

SUFFIXES: dict[str, Format] = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet", ".pq": "parquet"}
"""Suffixes of OUT and the format of each."""

_ROW_GROUP = 8192


def format_of(out: Path, requested: Format | None) -> Format:
    """Infer the format of `out` from its name.

    If a format is requested, check that they match.

    Raises:
        ImportError: If the format is Parquet and pyarrow is not installed.
        ValueError: If the format cannot be inferred, or differs from the requested one.
    """
    inferred = SUFFIXES.get(out.suffix.lower())
    if requested is not None and inferred is not None and requested != inferred:
        raise ValueError(f"the suffix of {str(out)!r} means {inferred}, but --format is {requested}")
    file_format = inferred if requested is None else requested
    if file_format is None:
        raise ValueError(f"the suffix of {str(out)!r} is not supported (expected {', '.join(SUFFIXES)}, or --format)")
    if file_format == "parquet":
        _pyarrow()
    return file_format


def writer(file_format: Format, output: Output, score: ScoreName) -> Writer:
    """Return a function that writes batches of records to a file.

    The fields of a record are path, `output` and error; a class has index, label and `score`.
    """
    if file_format == "parquet":
        return functools.partial(_write_parquet, output=output, score=score)
    return _write_jsonl


def check_names(file_format: Format, paths: Sequence[str]) -> None:
    """Check that the format can store all paths.

    Raises:
        ValueError: If the format is Parquet and a path is not UTF-8.
    """
    errors = [path for path in paths if file_format == "parquet" and not _is_unicode(path)]
    if errors:
        raise ValueError(
            f"Parquet cannot store the {len(errors)} paths that are not UTF-8, such as {errors[0]!r}; rename them, or "
            "write .jsonl"
        )


def _is_unicode(path: str) -> bool:
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


def _write_jsonl(path: Path, batches: Iterator[Sequence[Record]]) -> None:
    with path.open("w", encoding="utf-8", errors="backslashreplace", newline="\n") as stream:
        for records in batches:
            for record in records:
                stream.write(json.dumps(record, ensure_ascii=False) + "\n")


def _write_parquet(path: Path, batches: Iterator[Sequence[Record]], output: Output, score: ScoreName) -> None:
    pyarrow = _pyarrow()
    from pyarrow.parquet import ParquetWriter

    schema = _schema(pyarrow, output, score)
    with ParquetWriter(path, schema) as table:
        rows: list[Record] = []
        for records in batches:
            rows += records
            if len(rows) >= _ROW_GROUP:
                table.write_table(pyarrow.Table.from_pylist(rows, schema))
                rows = []
        if rows:
            table.write_table(pyarrow.Table.from_pylist(rows, schema))


def _schema(pyarrow: Any, output: Output, score: ScoreName) -> Any:
    value = pyarrow.float32()
    if output == "classes":
        names = {"index": pyarrow.int32(), "label": pyarrow.string(), score: pyarrow.float32()}
        value = pyarrow.struct(list(names.items()))
    return pyarrow.schema([("path", pyarrow.string()), (output, pyarrow.list_(value)), ("error", pyarrow.string())])


def _pyarrow() -> Any:
    try:
        import pyarrow
    except ImportError as error:
        raise ImportError(
            f"Parquet needs pyarrow: pip install 'beit-fast[parquet]', or write .jsonl ({error})"
        ) from error
    return pyarrow
