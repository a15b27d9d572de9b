"""What `classify` and `segment` print: lines as results come, or one JSON object at the end."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self, TextIO

from .forward import score_name
from .images import unreadable_images
from .options import ClassifyOptions, ExitCode, ModelOptions, SegmentOptions
from .pictures import Target


class Report:
    """Print the result of each image; a context manager that completes the output.

    An error or interrupt inside the context keeps the results before it.

    Args:
        options: The form to print.
        model: The model that ran, or None if no image could be opened.
        bar: A progress bar of tqdm, which the lines do not interrupt, or None.

    Attributes:
        failures: The images without a result, and the reasons.
    """

    def __init__(self, options: ModelOptions, model: Any, bar: Any) -> None:
        self.failures: list[dict[str, str]] = []
        self._results: list[dict[str, Any]] = []
        self._options = options
        self._model = model
        self._bar = bar

    def fail(self, image: str, reason: str, is_printed: bool = False) -> None:
        """Record why an image has no result; print it unless `is_printed`."""
        self.failures.append({"image": image, "reason": reason})
        if not is_printed:
            self._print([_failure_line(image, reason)], sys.stderr)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, BrokenPipeError):
            return
        if self._options.json:
            facts = {"model": self._options.model, "kernel": kernel_of(self._model)}
            self._print([json.dumps({**facts, **self._facts(), "failures": self.failures}, indent=1)], sys.stdout)
        elif error is None:
            report_kernel(self._model)

    def _facts(self) -> Mapping[str, Any]:
        """The results in the JSON object."""
        return {"results": self._results}

    def _print(self, lines: Sequence[str], stream: TextIO | None) -> None:
        if stream is None:  # closed before the start
            return
        if self._bar is None:
            print("\n".join(lines), file=stream)
        else:
            self._bar.write("\n".join(lines), file=stream)
        stream.flush()  # a reader of the pipe sees each batch


class ClassificationReport(Report):
    """The report of `classify`.

    Args:
        options: The form to print.
        model: The model that classifies.
        bar: A progress bar of tqdm.
    """

    _options: ClassifyOptions

    def __init__(self, options: ClassifyOptions, model: Any, bar: Any) -> None:
        super().__init__(options, model, bar)
        self._score = score_name(model.config)

    def add(self, image: str, classes: Sequence[dict[str, Any]]) -> None:
        """Print the classes of an image."""
        if self._options.json:
            self._results.append({"image": image, "classes": classes})
        else:
            self._print(self._rows(image, classes) if self._options.csv else self._lines(image, classes), sys.stdout)

    def __enter__(self) -> Self:
        if self._options.csv:
            self._print([_csv_row("image", "rank", "index", "label", self._score)], sys.stdout)
        return self

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


class SegmentationReport(Report):
    """The report of `segment`.

    Args:
        options: The form to print.
        model: The model that segments.
        bar: A progress bar of tqdm.
        is_folder: Whether `--out` is a folder, so that the results name their images.
    """

    _options: SegmentOptions

    def __init__(self, options: SegmentOptions, model: Any, bar: Any, is_folder: bool) -> None:
        super().__init__(options, model, bar)
        self._is_folder = is_folder

    def add(self, target: Target, shares: Sequence[dict[str, Any]]) -> None:
        """Print the share and color of each class, and the picture."""
        files = dict(zip(("out", "labels"), (str(path) for path, _ in target.files), strict=False))
        if self._options.json:
            self._results.append({"image": target.image, **files, "classes": shares})
            return
        lines = [target.image] if self._is_folder else []
        lines += [
            f"{100 * share['share']:6.2f} %  {share['index']:4d}  {share['color']}  {share['label']}"
            for share in shares
        ]
        self._print([*lines, f"picture: {files['out']}"], sys.stdout)

    def _facts(self) -> Mapping[str, Any]:
        if self._is_folder:
            return super()._facts()
        result = self._results[0] if self._results else {"classes": []}
        return {"out": str(self._options.out), "classes": result["classes"]}


def report_unreadable(images: Sequence[str]) -> dict[str, str]:
    """Return why images cannot be opened; print it at once."""
    errors = unreadable_images(images)
    for image, reason in errors.items():
        print(_failure_line(image, reason), file=sys.stderr)
    return errors


def report_failures(options: ModelOptions, errors: Mapping[str, str]) -> ExitCode:
    """Complete the output of a command that could open no image."""
    with Report(options, None, None) as report:
        for image, reason in errors.items():
            report.fail(image, reason, is_printed=True)
    return ExitCode.SOME_FAILED


def _failure_line(image: str, reason: str) -> str:
    return f"failed: {image}: {reason}"


def _csv_row(*cells: object) -> str:
    stream = io.StringIO()
    csv.writer(stream, lineterminator="\n").writerow(cells)  # quotes cells that contain it
    return stream.getvalue()[:-1]


def kernel_of(model: Any) -> str | None:
    """Return the attention kernel that ran in a model, or None.

    The model is None if none was loaded.
    """
    if model is None:
        return None
    report = model.attention_report()
    return report.kernel if report.has_run else None


def report_kernel(model: Any) -> None:
    """Print the attention kernel on stderr, so that stdout has results only."""
    kernel = kernel_of(model)
    if kernel is not None:
        print(f"attention: {kernel}", file=sys.stderr)
