"""The log of a run: JSON lines, TensorBoard and a progress bar."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ...utils.files import atomic_write_text, writing

_SHOWN = ("loss", "accuracy", "top1", "miou", "lr")


class RunLog:
    """Write rows of a run to a JSON-lines file and to TensorBoard.

    The last row is shown beside a progress bar.

    Args:
        file: The file of JSON lines. Rows after `step` are removed: the resumed run writes them again.
        tensorboard: The folder of TensorBoard's files, or None.
        step: The step that the run starts from.
        total: The step that it ends at.

    Raises:
        ImportError: If TensorBoard is asked for and not installed.
    """

    def __init__(self, file: Path, tensorboard: Path | None, step: int, total: int) -> None:
        self.file = file
        self._writer = None if tensorboard is None else _summary_writer(tensorboard, step)
        self.rows = [row for row in read_rows(file) if row["step"] <= step]
        if file.exists():  # its last line may be incomplete
            atomic_write_text(file, "".join(json.dumps(row) + "\n" for row in self.rows))
        self._bar = tqdm(total=total, initial=step, unit="step", disable=None)

    def add(self, row: Mapping[str, Any]) -> None:
        """Write one row; it has a `step`."""
        self.rows.append(dict(row))
        with writing("the log", self.file), self.file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row) + "\n")
        if self._writer is not None:
            for name, value in row.items():
                if isinstance(value, (int, float)) and name != "step":
                    self._writer.add_scalar(name, value, row["step"])
            self._writer.flush()
        self._bar.set_postfix({name: f"{row[name]:.4g}" for name in _SHOWN if name in row}, refresh=False)

    def advance(self) -> None:
        """Move the progress bar by one step."""
        self._bar.update()

    def note(self, text: str) -> None:
        """Print a line above the progress bar, to stderr."""
        tqdm.write(text, file=sys.stderr)

    def close(self) -> None:
        """Close the files and the bar."""
        self._bar.close()
        if self._writer is not None:
            self._writer.close()


def read_rows(file: Path) -> list[dict[str, Any]]:
    """Read the rows of a log; a last line that a killed process left incomplete is left out."""
    rows = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def _summary_writer(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError(
            f'TensorBoard\'s files need the package tensorboard: pip install "beit-fast[train]" ({error})'
        ) from error
    return SummaryWriter(str(folder), purge_step=step + 1)
