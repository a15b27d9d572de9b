"""Files of results: one for each compiler and compute capability, one line for each case."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ....utils.files import atomic_write_text
from .cases import Case
from .check import SAME_BITS, SCHEDULES
from .plans import plan_hash
from .sources import MODULES, source_hash

FOLDER = Path(__file__).resolve().parent / "results"

Row = dict[str, Any]
KEYS = {"case", "plan", "kernels", "launches", "budgets", "errors", "hazards", "wrong"}
"""What every row has; see check.py."""


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
        self._read()

    def _read(self) -> None:
        self.rows |= {row["case"]: row for row in read(self.file) if row["case"] in self.rows}

    def add(self, row: Row) -> None:
        """Store the row of a case."""
        # Another process may run other cases of the same file.
        self._read()
        self.rows[row["case"]] = row
        text = "".join(json.dumps(row) + "\n" for row in self.rows.values() if row is not None)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_text(self.file, text)

    def current(self, case: Case) -> Row | None:
        """Return the row of a case if it is current. A current row is of the kernels and tiles as they are now."""
        row = self.rows[str(case)]
        return row if row is not None and is_current(row, case, self.triton_version) else None


def result_file(triton_version: str, capability: int, folder: Path = FOLDER) -> Path:
    compiler = triton_version if triton_version.startswith("nvcc-") else f"triton-{triton_version}"
    return folder / compiler / f"sm_{capability}.jsonl"


def read(file: Path) -> list[Row]:
    """Return the rows of a file, none if it does not exist.

    Raises:
        ValueError: If a line is not a row; it names file and line.
    """
    lines = file.read_text().splitlines() if file.exists() else []
    return [_parse(line, f"{file}, line {number}") for number, line in enumerate(lines, 1)]


def _parse(line: str, place: str) -> Row:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{place} is not JSON ({error}); restore the file, or delete the line and rerun") from None
    missing = KEYS - row.keys() if isinstance(row, dict) else KEYS
    if missing:
        raise ValueError(f"{place} is no row of results: {', '.join(sorted(missing))} missing")
    assert isinstance(row, dict)
    return row


def is_current(row: Row, case: Case, triton_version: str) -> bool:
    """Return whether a row is of the kernels as they are now.

    They are compiled from the same source and launched in the same way, and every order of warps was judged.
    """
    # A case that failed before its first launch names no kernel.
    if not row["kernels"] or not _is_judged(row) or row["plan"] != plan_hash(case, triton_version):
        return False
    return all(name in MODULES and text.split()[-1] == source_hash(name) for name, text in row["kernels"].items())


def _is_judged(row: Row) -> bool:
    """Return whether each order of warps has a verdict.

    Its errors are within the budgets, or it is said to be wrong.
    """
    budgets, orders = row["budgets"], set(map(str, SCHEDULES))
    wrong = {order for order in orders for text in row["wrong"] if text.startswith(f"{order}: ")}
    right = {
        order
        for order, errors in row["errors"].items()
        if errors == SAME_BITS or all(name in errors and errors[name] <= budgets[name] for name in budgets)
    }
    return bool(budgets) and orders <= right | wrong and (row["launches"] > 0 or wrong == orders)


def checked_sources(rows: Iterable[Row]) -> Iterator[tuple[str, str]]:
    """Yield kernel and source hash of everything that was launched."""
    for row in rows:
        for name, text in row["kernels"].items():
            yield name, text.split()[-1]
