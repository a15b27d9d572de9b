"""What `selftest` and `tune` share: rows, tables, checks, interrupts."""

from __future__ import annotations

import datetime
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..utils import variables
from ..utils.files import writing
from .options import ExitCode


class RowLog:
    """A file of JSON lines: the conditions, then each row.

    Each line is written as soon as its row is known.

    Args:
        path: The file, or None to write nothing.
        conditions: What the rows are measured on.
    """

    def __init__(self, path: Path | None, conditions: Mapping[str, Any]) -> None:
        self._path = path
        if path is not None:
            with writing("the rows", path):
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text("")
        self._append({"conditions": conditions, "date": datetime.date.today().isoformat()})

    def add(self, row: Mapping[str, Any]) -> None:
        self._append({"row": row})

    def _append(self, entry: Mapping[str, Any]) -> None:
        if self._path is not None:
            with self._path.open("a") as file:
                file.write(json.dumps(entry) + "\n")


def check_variables() -> None:
    """Check the variables of the Triton launchers.

    A device without these kernels does not read them.

    Raises:
        ValueError: If `BEIT_FAST_TUNED` has a value that is not accepted.
    """
    variables.choice(variables.TUNED, ("0", "1"))


def interrupted(command: str, done: str) -> ExitCode:
    """Print what ran before Ctrl-C, and return the exit code.

    Args:
        command: The name of the command.
        done: What ran, as in "2 of 3 cases".
    """
    print(f"beit-fast {command}: interrupted after {done}", file=sys.stderr)
    return ExitCode.INTERRUPTED


def table_lines(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Align rows under a header; a rule separates them."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        return "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()

    return [line(header), "  ".join("-" * width for width in widths), *map(line, rows)]


def milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.3f}"
