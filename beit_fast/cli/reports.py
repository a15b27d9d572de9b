"""What `classify` prints: text and CSV as results come, or one JSON object at the end."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self, TextIO

from .forward import score_name
from .options import ClassifyOptions


class ClassificationReport:
    """Print the classes of each image; a context manager that completes the output.

    An error or interrupt inside the context keeps the results before it.

    Args:
        options: The form to print.
        model: The model that classifies.
        bar: A progress bar of tqdm, which the lines do not interrupt.

    Attributes:
        failures: The images without a result, and the reasons.
    """

    def __init__(self, options: ClassifyOptions, model: Any, bar: Any) -> None:
        self.failures: list[dict[str, str]] = []
        self._options = options
        self._model = model
        self._bar = bar
        self._score = score_name(model.config)
        self._results: list[dict[str, Any]] = []

    def add(self, image: str, result: Sequence[dict[str, Any]] | str) -> None:
        """Print the classes of an image, or why there are none."""
        if isinstance(result, str):
            self.failures.append({"image": image, "reason": result})
            self._print([f"failed: {image}: {result}"], sys.stderr)
        elif self._options.json:
            self._results.append({"image": image, "classes": result})
        else:
            self._print(self._rows(image, result) if self._options.csv else self._lines(image, result), sys.stdout)

    def __enter__(self) -> Self:
        if self._options.csv:
            self._print([_csv_row("image", "rank", "index", "label", self._score)], sys.stdout)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, BrokenPipeError):
            return
        if self._options.json:
            facts = {"model": self._options.model, "kernel": kernel_of(self._model)}
            text = json.dumps({**facts, "results": self._results, "failures": self.failures}, indent=1)
            self._print([text], sys.stdout)
        elif error is None:
            report_kernel(self._model)

    def _print(self, lines: Sequence[str], stream: TextIO | None) -> None:
        if stream is None:  # closed before the start
            return
        self._bar.write("\n".join(lines), file=stream)
        stream.flush()  # a reader of the pipe sees each batch

    def _lines(self, image: str, classes: Sequence[dict[str, Any]]) -> list[str]:
        return [image, *(f"{self._shown(entry)}  {entry['index']:5d}  {entry['label']}" for entry in classes)]

    def _shown(self, entry: dict[str, Any]) -> str:
        score = entry[self._score]
        return f"{score:9.4g}" if self._score == "value" else f"{100 * score:7.2f} %"

    def _rows(self, image: str, classes: Sequence[dict[str, Any]]) -> list[str]:
        return [
            _csv_row(image, rank, entry["index"], entry["label"], entry[self._score])
            for rank, entry in enumerate(classes, start=1)
        ]


def _csv_row(*cells: object) -> str:
    stream = io.StringIO()
    csv.writer(stream, lineterminator="").writerow(cells)
    return stream.getvalue()


def kernel_of(model: Any) -> str | None:
    """Return the attention kernel that ran in a model, or None."""
    report = model.attention_report()
    return report.kernel if report.has_run else None


def report_kernel(model: Any) -> None:
    """Print the attention kernel on stderr, so that stdout has results only."""
    kernel = kernel_of(model)
    if kernel is not None:
        print(f"attention: {kernel}", file=sys.stderr)
