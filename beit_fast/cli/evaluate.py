"""The command `beit-fast eval`."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from typing import Any

from ..training.recipes.evaluate import evaluate as run_evaluation
from ..training.recipes.evaluate_options import EvaluateOptions
from ..utils.messages import count_of
from .options import ExitCode
from .process import report_to_torchrun


def evaluate(fields: Mapping[str, Any]) -> int:
    """Evaluate a checkpoint, print the results, and return the exit code.

    The code is `SOME_FAILED` if images are unreadable.
    """
    values = dict(fields)
    is_json = values.pop("json")
    values |= {"attn_implementation": values.pop("attn"), "device": values["device"] or "auto"}
    options = EvaluateOptions(**values)
    found = run_evaluation(options)
    unreadable = found["unreadable"]
    if os.environ.get("RANK", "0") == "0":
        for line in unreadable:
            print(f"failed: {line}", file=sys.stderr)
        facts = {"model": options.model, "data": str(options.data), **found}
        print(json.dumps(facts, indent=1) if is_json else "\n".join(_lines(found)))
    if not unreadable:
        return ExitCode.DONE
    report_to_torchrun(f"{count_of(len(unreadable), 'image')} could not be read")
    return ExitCode.SOME_FAILED


def _lines(found: Mapping[str, Any]) -> list[str]:
    """Return one line for each number, in percent."""
    names = ("top1", "top5", "mean_iou", "mean_accuracy", "pixel_accuracy")
    lines = [_line(name, found[name]) for name in names if name in found]
    for probe in ("knn", "linear_probe"):
        lines += [_line(f"{probe} {name}", found[probe][name]) for name in names if name in found.get(probe, {})]
    return [*lines, f"{count_of(found['images'], 'image')}, {len(found['unreadable'])} unreadable"]


def _line(name: str, share: float) -> str:
    return f"{name:<18} {100 * share:6.2f} %"
