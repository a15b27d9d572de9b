"""Configurations as JSON: plain values, files that are replaced whole, errors that name the file."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..configuration.fields import describe

CONFIG_NAME = "config.json"


def plain(value: Any) -> Any:
    """A deep copy in JSON's types: lists for tuples, names such as "float16" for dtypes; others as is."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value


def json_text(values: Mapping[str, Any], owner: str) -> str:
    """`values` as indented JSON with sorted keys; one TypeError names every value that JSON cannot hold."""
    refused = [describe(name, value) for name, value in values.items() if not _fits_json(value)]
    if refused:
        raise TypeError(f"{owner} cannot be written as JSON, which cannot hold {', '.join(refused)}")
    return json.dumps(values, indent=2, sort_keys=True) + "\n"


def _fits_json(value: Any) -> bool:
    try:
        json.dumps(value, sort_keys=True)
    except (TypeError, ValueError):
        return False
    return True


def replace_file(path: Path, text: str) -> None:
    """Write `text` to `path` so that a reader, or a crash, finds either the old file or the whole new one."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.unfinished")
    try:
        with unfinished.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def find_json_file(path: Path, file_name: str, what: str) -> Path:
    """The file of that name in the folder `path`, or `path` itself if it is a file; `what` is what it would hold."""
    file = path / file_name if path.is_dir() else path
    if file.is_file():
        return file
    reason = f"that folder has no {file_name}" if path.is_dir() else "there is no such file or folder"
    accepted = f"the path of a folder with a {file_name}, or of a JSON file, or 'org/name' on the hub"
    raise FileNotFoundError(f"no {what} at {os.fspath(path)!r}: {reason}; accepted: {accepted}")


def read_json_object(path: Path) -> dict[str, Any]:
    """The fields in a JSON file."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)!r} does not hold JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{os.fspath(path)!r} holds a JSON {type(values).__name__}, not an object of fields")
    return values
