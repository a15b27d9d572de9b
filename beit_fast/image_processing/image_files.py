"""Open image files with Pillow; an error gives the reason if one cannot be read."""

from __future__ import annotations

import io
import os
import stat
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image as PillowImage

_PREFIX_SIZE = 16  # bytes that Pillow's formats look at


def open_image_file(path: str | os.PathLike[str] | io.BytesIO, name: str) -> PillowImage:
    """Open an image file, a pipe or encoded bytes; the pixels are decoded later.

    Args:
        path: The file, or its bytes. A pipe, such as that of `<(command)` in a shell, is read to its end.
        name: The image, for errors.

    Raises:
        FileNotFoundError: If there is no such file.
        IsADirectoryError: If it is a folder.
        OSError: If Pillow cannot read it.
    """
    from PIL import Image

    source: Path | io.BytesIO = _source(path, name)
    try:
        return Image.open(source)
    except Image.UnidentifiedImageError as error:
        raise OSError(f"{name} cannot be read: {_unidentified_reason(source)}") from error
    except Image.DecompressionBombError as error:
        raise OSError(f"{name} cannot be read: it exceeds PIL.Image.MAX_IMAGE_PIXELS: {error}") from error


def error_without_path(error: Exception, file: str | os.PathLike[str]) -> str:
    """Return the error of reading one image, without its index and folder.

    The text then does not depend on the location of the data set.
    """
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    name = os.fspath(file)
    text = str(error).removeprefix(f"image {name!r} ").replace(name, Path(name).name)
    return text or type(error).__name__


def _source(path: str | os.PathLike[str] | io.BytesIO, name: str) -> Path | io.BytesIO:
    if isinstance(path, io.BytesIO):
        return path
    file = Path(path)
    if not file.exists():
        is_address = isinstance(path, str) and path.startswith(("http://", "https://"))
        hint = "URLs are not supported, download the image first" if is_address else "there is no such file"
        raise FileNotFoundError(f"{name} cannot be read: {hint}")
    mode = file.stat().st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(f"{name} cannot be read: it is a folder (expected an image file)")
    if stat.S_ISFIFO(mode):
        return io.BytesIO(file.read_bytes())  # Pillow seeks
    if not stat.S_ISREG(mode):
        raise OSError(f"{name} cannot be read: it is neither a file nor a pipe")
    return file


def _unidentified_reason(source: Path | io.BytesIO) -> str:
    """Return why no format of Pillow opens a file."""
    with source.open("rb") if isinstance(source, Path) else source as stream:
        stream.seek(0)
        prefix = stream.read(_PREFIX_SIZE)
        if not prefix:
            return "Pillow does not recognize its format, since it is empty"
        found = _recognized(stream, prefix)
    if not found:
        return "Pillow does not recognize its format"
    return "; ".join(f"it begins like {format_name}, but Pillow cannot open it: {why}" for format_name, why in found)


def _recognized(stream: Any, prefix: bytes) -> list[tuple[str, str]]:
    """List the formats that begin like this, with Pillow's errors."""
    from PIL import Image

    found = []
    for format_name in Image.ID:
        factory, accept = Image.OPEN[format_name]
        try:
            accepted = accept(prefix) if accept is not None else False
        except (struct.error, IndexError):  # the prefix of a short file has fewer bytes than the plugin reads
            continue
        if isinstance(accepted, str):  # the reason why this Pillow lacks the format
            found.append((format_name, accepted))
        elif accepted:
            stream.seek(0)
            try:
                factory(stream, "")
            except Exception as error:  # plugins raise nearly any exception
                found.append((format_name, str(error) or type(error).__name__))
    return found
