"""Files of results: one for each compiler and compute capability, one line for each case."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from ....utils.files import atomic_write_text
from .cases import Case
from .rows import DamagedRowError, Row, is_current, parse

FOLDER = Path(__file__).resolve().parent / "results"


class Results:
    """The rows of one file, by case. Each change replaces the file as a whole.

    Args:
        triton_version: The release that compiles the kernels, or that of nvcc, such as nvcc-13.0.88.
        capability: The compute capability that they are compiled for.
        cases: The cases of the table, which give the order of the lines. Rows of other cases are dropped.
        folder: Of all files.
    """

    def __init__(self, triton_version: str, capability: int, cases: Iterable[Case], folder: Path = FOLDER) -> None:
        self.triton_version = triton_version
        self.file = result_file(triton_version, capability, folder)
        self.cases = list(cases)
        self.rows: dict[str, Row | None] = {str(case): None for case in self.cases}
        self.lines: dict[str, int] = {}
        self._read()

    def _read(self) -> None:
        rows = read(self.file)
        self.rows |= {row["case"]: row for row in rows if row["case"] in self.rows}
        self._number(rows)

    def _number(self, rows: Iterable[Row]) -> None:
        self.lines = {row["case"]: number for number, row in enumerate(rows, 1)}

    def add(self, row: Row) -> None:
        """Store the row of a case."""
        # Another process may run other cases of the same file.
        self._read()
        self.rows[row["case"]] = row
        rows = [row for row in self.rows.values() if row is not None]
        self.file.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_text(self.file, "".join(json.dumps(row) + "\n" for row in rows))
        self._number(rows)

    def current(self, case: Case) -> Row | None:
        """Return the row of a case if it is current. A current row is of the kernels and tiles as they are now.

        Raises:
            ValueError: If the row is damaged: see rows.is_current. It names file and line.
        """
        row = self.rows[str(case)]
        try:
            return row if row is not None and is_current(row, case, self.triton_version) else None
        except DamagedRowError as error:
            place = f"{self.file}, line {self.lines[str(case)]}"
            raise ValueError(
                f"{place} is damaged ({case}): {error}; restore the file, or delete the line and rerun"
            ) from None


def result_file(triton_version: str, capability: int, folder: Path = FOLDER) -> Path:
    compiler = triton_version if triton_version.startswith("nvcc-") else f"triton-{triton_version}"
    return folder / compiler / f"sm_{capability}.jsonl"


def read(file: Path) -> list[Row]:
    """Return the rows of a file, none if it does not exist.

    Raises:
        ValueError: If a line is not a row; it names file and line.
    """
    lines = file.read_text().splitlines() if file.exists() else []
    return [parse(line, f"{file}, line {number}") for number, line in enumerate(lines, 1)]
