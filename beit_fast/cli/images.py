"""Reasons why an image of a command cannot be read."""

from __future__ import annotations

import os
from pathlib import Path


def unreadable_reason(error: Exception, file: Path) -> str:
    """Return the error of reading one file, without index and folder.

    The results of `predict` then do not depend on the location of the data set.
    """
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    name = os.fspath(file)
    text = str(error).removeprefix(f"image 0 ({name!r}) ").replace(name, file.name)
    return text or type(error).__name__
