"""Check paths that were passed as arguments."""

from __future__ import annotations

import os
from pathlib import Path


def as_path(what: str, value: str | os.PathLike[str]) -> Path:
    """Return the path that was passed for `what`.

    Raises:
        TypeError: If it is neither a string nor a path object.
        ValueError: If it is empty: `Path("")` is the current folder.
    """
    if not isinstance(value, (str, os.PathLike)):
        raise TypeError(f"the path of {what} is {value!r} (expected a string or a path object)")
    if not os.fspath(value):
        raise ValueError(f"the path of {what} is empty (for the current folder, pass '.')")
    return Path(value)
