"""Checks of the files to write, before a model is loaded."""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Iterable
from pathlib import Path

from ..utils.files import writing


def check_file(what: str, path: Path) -> None:
    """Check that a file can be written, as far as known.

    Args:
        what: The contents, for the error.
        path: The file; its folder need not exist.

    Raises:
        OSError: If `path` is a folder or a device, or its folder cannot be created or written.
    """
    if path.is_dir():
        raise IsADirectoryError(f"{os.fspath(path)!r} is a folder (expected the file to write)")
    if path.exists() and not path.is_file():
        raise OSError(f"{os.fspath(path)!r} is not a regular file, so it cannot be replaced (expected another file)")
    _check_parent(what, path, path.absolute().parent)


def check_folder(what: str, path: Path) -> None:
    """Check that files can be written to a folder; see `check_file`.

    Raises:
        OSError: If `path` is not a folder, or it cannot be created or written.
    """
    _check_parent(what, path, path.absolute())


def _check_parent(what: str, path: Path, folder: Path) -> None:
    existing = next(parent for parent in (folder, *folder.parents) if os.path.lexists(parent))
    with writing(what, path):
        if not existing.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        if not os.access(existing, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def check_keeps(paths: Iterable[Path], inputs: Iterable[Path]) -> None:
    """Check that no path to write is an input of the command.

    Raises:
        FileExistsError: If a path is an input, under any name.
    """
    existing = [path for path in paths if path.exists()]
    if not existing:
        return
    identities = {_identity(file) for file in inputs if file.exists()}
    for path in existing:
        if _identity(path) in identities:
            raise FileExistsError(f"{os.fspath(path)!r} is an input of this command (expected another file to write)")


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino


def color_format(path: Path) -> str:
    """Return Pillow's format for a color picture by its suffix.

    Raises:
        ValueError: If Pillow cannot write this format in color.
    """
    from PIL import Image

    name = _format_of(path)
    if name is None or _encode(Image.new("RGB", (8, 8)), name) is None:
        raise ValueError(f"a color picture cannot be written to {os.fspath(path)!r} (expected a suffix such as .png)")
    return name


def class_format(path: Path) -> str:
    """Return Pillow's format for a 16-bit gray picture by its suffix.

    Raises:
        ValueError: If the format does not keep every one of the 16 bits.
    """
    import numpy as np
    from PIL import Image

    ids = np.arange(0, 2**16, 257, dtype=np.uint16).reshape(16, 16)
    name = _format_of(path)
    encoded = None if name is None else _encode(Image.fromarray(ids), name)
    if name is not None and encoded is not None:
        with Image.open(encoded) as picture:
            if np.array_equal(np.array(picture), ids):
                return name
    raise ValueError(f"classes cannot be written to {os.fspath(path)!r} (expected the suffix .png, .tif or .tiff)")


def is_picture_name(path: Path) -> bool:
    """Return whether the suffix is that of a format of Pillow."""
    return _format_of(path) is not None


def _format_of(path: Path) -> str | None:
    from PIL import Image

    return Image.registered_extensions().get(path.suffix.lower())


def _encode(picture: object, name: str) -> io.BytesIO | None:
    """Encode a picture in memory; None if the format cannot hold it."""
    stream = io.BytesIO()
    try:
        picture.save(stream, format=name)  # type: ignore[attr-defined]
    except (KeyError, OSError, ValueError):  # not written by Pillow, or not in this mode
        return None
    stream.seek(0)
    return stream
