"""The commands `beit-fast pretrain` and `finetune`."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from ..training.recipes.finetune import finetune as run_finetuning
from ..training.recipes.finetune_options import FinetuneOptions
from ..training.recipes.pretrain import PretrainOptions
from ..training.recipes.pretrain import pretrain as run_pretraining
from .collect_env import environment
from .finetune_parser import DEFAULT_EMA_DECAY, NO_POLICY
from .options import ExitCode
from .unilm_flags import Command
from .unilm_parser import take_flags

_IMAGENET = {"image_mean": (0.485, 0.456, 0.406), "image_std": (0.229, 0.224, 0.225)}


def pretrain(fields: Mapping[str, Any]) -> int:
    """Pre-train, print where the model is, and return the exit code."""
    options = PretrainOptions(**option_fields(fields, "pretrain"))
    report(options, run_pretraining(options, environment()))
    return ExitCode.DONE


def finetune(fields: Mapping[str, Any]) -> int:
    """Fine-tune, print where the model is, and return the exit code."""
    options = FinetuneOptions(**finetuning_fields(fields))
    report(options, run_finetuning(options, environment()))
    return ExitCode.DONE


def finetuning_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of `FinetuneOptions` from those of the parser.

    Raises:
        ValueError: If flags of unilm are refused or contradict options.
    """
    values = option_fields(fields, "finetune")
    if values.pop("model_ema", False):
        values.setdefault("model_ema_decay", DEFAULT_EMA_DECAY)
    if str(values.get("aa", "")).lower() in NO_POLICY:
        values["aa"] = None
    return values


def option_fields(fields: Mapping[str, Any], command: Command) -> dict[str, Any]:
    """Return the fields of an options class from those of the parser; flags without effect are named on stderr.

    Raises:
        ValueError: If flags of unilm are refused or contradict options.
    """
    values = dict(fields)
    for note in take_flags(values, command):
        print(f"beit-fast {command}: {note}", file=sys.stderr)
    if values.pop("imagenet_default_mean_and_std", False):
        values |= _IMAGENET
    values["output"] = values.pop("out")
    return {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in values.items()
        if not (name == "model" and value is None)
    }


def report(options: Any, rows: list[dict[str, Any]]) -> None:
    """Print the last row of a log and the model folder.

    Only the main process has rows, so the others print nothing.
    """
    if rows:
        last = ", ".join(f"{name} {value:.4g}" for name, value in rows[-1].items() if isinstance(value, (int, float)))
        print(f"{options.output / 'model'}: {last}")
