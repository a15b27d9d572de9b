"""Files that are replaced as a whole, and JSON files."""

from __future__ import annotations

import json
import os
import platform
import shutil
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch

from .messages import describe

CONFIG_NAME = "config.json"


@contextmanager
def writing(what: str, path: str | os.PathLike[str]) -> Iterator[None]:
    """Name what could not be written if the block fails.

    Raises:
        OSError: The error of the block, with its class and number, and a message that names `what` and `path`.
    """
    try:
        yield
    except OSError as error:
        if error.strerror is None:  # not the system's: it has a message of its own
            raise
        named = type(error)(f"{what} cannot be written to {os.fspath(path)!r}: {error.strerror}")
        named.errno = error.errno
        raise named from error


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; its file replaces `path` when the block ends.

    A crash leaves either the old file or the whole new one. An exception in the block keeps the old file. Errors of
    the system name `path`.
    """
    unfinished = path.with_name(f".{os.getpid()}-{threading.get_ident()}.unfinished.{path.name}")
    try:
        yield unfinished
        replace_files([(unfinished, path)])
    except OSError as error:
        if error.filename is None or os.fspath(error.filename) != os.fspath(unfinished):
            raise
        raise type(error)(error.errno, error.strerror, os.fspath(path)) from error
    finally:
        unfinished.unlink(missing_ok=True)


def atomic_write_text(path: Path, text: str) -> None:
    """Write `text` to `path` atomically, in UTF-8."""
    with atomic_write(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def replace_files(moves: Sequence[tuple[Path, Path]]) -> None:
    """Move complete files to their final paths, in this order.

    All of them are on disk before the first is moved.
    """
    for source, _ in moves:
        flush_to_disk(source)
    for source, target in moves:
        os.replace(source, target)
    for folder in {target.parent for _, target in moves}:
        flush_to_disk(folder)


def flush_to_disk(path: Path) -> None:
    """Wait until a file or folder is on disk.

    For a folder, only the list of names is flushed.
    """
    is_folder = path.is_dir()
    if is_folder and os.name != "posix":
        return  # Windows cannot open a folder.
    handle = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def try_lock(stream: IO[bytes]) -> bool:
    """Lock a file opened for appending, until it is closed; return whether no other process has it."""
    import fcntl  # Windows has none

    # A lock by record: DataLoader's workers do not inherit it, so it ends with this process.
    try:
        fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # both mean that another process has it
        return False
    return True


@contextmanager
def unfinished_folder(folder: Path) -> Iterator[Path]:
    """Yield a new folder inside `folder`.

    It is removed with its contents when the block ends. Folders that killed processes of this machine left behind are
    also removed.
    """
    prefix = f".unfinished-{platform.node()}-"
    for left in folder.glob(f"{prefix}*"):
        if not _is_running(left.name.removeprefix(prefix).partition("-")[0]):
            shutil.rmtree(left, ignore_errors=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f"{prefix}{os.getpid()}-", dir=folder))
    try:
        yield unfinished
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _is_running(process: str) -> bool:
    """Whether a process with that id runs; True if that is unknown."""
    if os.name != "posix" or not process.isdecimal():
        return True
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def plain(value: Any) -> Any:
    """Copy `value` with JSON's types: lists for tuples, names such as "float16" for dtypes."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value


def json_text(values: Mapping[str, Any], owner: str) -> str:
    """Format `values` as indented JSON with sorted keys.

    Raises:
        TypeError: If JSON cannot represent some values; the error lists all of them.
    """
    rejected = [describe(name, value) for name, value in values.items() if not _fits_json(value)]
    if rejected:
        raise TypeError(f"{owner} cannot be written: JSON cannot represent {', '.join(rejected)}")
    return json.dumps(values, indent=2, sort_keys=True) + "\n"


def _fits_json(value: Any) -> bool:
    try:
        json.dumps(value, sort_keys=True)
    except (TypeError, ValueError):
        return False
    return True


def find_json_file(path: Path, file_name: str, what: str) -> Path:
    """Find `file_name` in the folder `path`.

    If `path` is a file, return it.

    Raises:
        FileNotFoundError: If there is no such file. `what` names its contents in the message.
    """
    file = path / file_name if path.is_dir() else path
    if file.is_file():
        return file
    reason = f"the folder does not contain {file_name}" if path.is_dir() else "there is no such file or folder"
    expected = f"a folder with {file_name}, a JSON file, or 'org/name' on the hub"
    raise FileNotFoundError(f"no {what} at {os.fspath(path)!r}: {reason} (expected {expected})")


def read_json_object(path: Path) -> dict[str, Any]:
    """Read the object in a JSON file.

    Raises:
        ValueError: If the file is not JSON, or not an object.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)!r} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{os.fspath(path)!r} is a JSON {type(values).__name__} (expected an object of fields)")
    return values
