"""The files that `beit-fast predict` writes: JSON Lines, and Parquet with the same fields."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .journal import Record, Writer

SUFFIXES = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet", ".pq": "parquet"}
"""Endings of names, and the format that each stands for."""

FORMATS = ("jsonl", "parquet")
OUTPUTS = ("classes", "logits", "features")
"""What is recorded of an image: its field in the results."""

_ROW_GROUP = 8192


def format_of(out: Path, asked: str | None) -> str:
    """The format of `out`, by its name or as asked for.

    Raises:
        ImportError: it is Parquet and there is no pyarrow.
        ValueError: the name says nothing, or something else.
    """
    named = SUFFIXES.get(out.suffix.lower())
    if asked is not None and named is not None and asked != named:
        raise ValueError(f"{str(out)!r} ends as {named} does, and --format is {asked}; give one of them")
    kind = named if asked is None else asked
    if kind is None:
        raise ValueError(f"{str(out)!r} has none of the endings {', '.join(SUFFIXES)}; give --format")
    if kind == "parquet":
        _pyarrow()
    return kind


def writer(kind: str, output: str) -> Writer:
    """A function that writes batches of records, with the fields path, `output` and error, to a file."""
    return functools.partial(_write_parquet, output=output) if kind == "parquet" else _write_jsonl


def check_names(kind: str, paths: Sequence[str]) -> None:
    """ValueError for names that the format cannot hold."""
    refused = [path for path in paths if kind == "parquet" and not _is_unicode(path)]
    if refused:
        raise ValueError(
            f"Parquet holds no names that are not UTF-8, as {len(refused)} are here, {refused[0]!r} for one; rename "
            "them, or write .jsonl"
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


def _write_parquet(path: Path, batches: Iterator[Sequence[Record]], output: str) -> None:
    pyarrow = _pyarrow()
    from pyarrow.parquet import ParquetWriter

    schema = _schema(pyarrow, output)
    with ParquetWriter(path, schema) as table:
        waiting: list[Record] = []
        for records in batches:
            waiting += records
            if len(waiting) >= _ROW_GROUP:
                table.write_table(pyarrow.Table.from_pylist(waiting, schema))
                waiting = []
        if waiting:
            table.write_table(pyarrow.Table.from_pylist(waiting, schema))


def _schema(pyarrow: Any, output: str) -> Any:
    value = pyarrow.float32()
    if output == "classes":
        names = {"index": pyarrow.int32(), "label": pyarrow.string(), "probability": pyarrow.float32()}
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
