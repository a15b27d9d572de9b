"""Checkpoints of a run, whole or sharded, by torch.distributed.checkpoint."""

from __future__ import annotations

import os
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.optim import Optimizer

from ...utils.files import flush_to_disk, writing
from .average import WeightAverage
from .processes import Processes

_NAME = re.compile(r"step-(\d{9})")
_UNFINISHED = ".unfinished"


class Checkpoints:
    """Save and restore weights, optimizer state, averages and the step.

    A checkpoint is written beside the others and renamed when it is complete, so a killed run leaves whole ones only.
    Random states are not saved: all draws are functions of the seed and the step.

    Args:
        folder: The folder of all checkpoints.
        keep: How many to keep.
        processes: The processes of the run.
    """

    def __init__(self, folder: Path, keep: int, processes: Processes) -> None:
        self.folder, self.keep, self.processes = folder, keep, processes

    def steps(self) -> list[int]:
        """List the steps of the complete checkpoints, in order."""
        names = os.listdir(self.folder) if self.folder.is_dir() else []
        return sorted(int(match[1]) for match in map(_NAME.fullmatch, names) if match)

    def save(self, step: int, model: nn.Module, optimizer: Optimizer, average: WeightAverage | None) -> None:
        """Write the checkpoint of a step; all processes call it.

        Raises:
            OSError: If it cannot be written. The checkpoints before it are kept.
        """
        target = self.folder / f"step-{step:09d}"
        unfinished = self.folder / f"{_UNFINISHED}-{target.name}"
        self.processes.on_main(lambda: _make_empty(unfinished))
        with writing("a checkpoint", self.folder), _without_single_process_warning():
            try:
                dcp.save(_state_of(model, optimizer, average, step), checkpoint_id=unfinished)
            except CheckpointException as error:  # not an Exception, so nobody else reports it
                raise OSError(
                    f"a checkpoint cannot be written to {os.fspath(self.folder)!r}: {_reason(error)}"
                ) from error
        self.processes.on_main(lambda: self._finish(unfinished, target))

    def restore(self, model: nn.Module, optimizer: Optimizer, average: WeightAverage | None) -> int:
        """Load the last checkpoint in place and return its step.

        All processes call it. The step is 0 if there is no checkpoint.

        Raises:
            ValueError: If the checkpoint cannot be read.
        """
        step = self.processes.on_main(lambda: max(self.steps(), default=0))
        if step == 0:
            return 0
        path = self.folder / f"step-{step:09d}"
        state = _state_of(model, optimizer, average, step)
        try:
            with _without_single_process_warning():
                dcp.load(state, checkpoint_id=path)
        except (Exception, CheckpointException) as error:  # torch's own class is not an Exception
            raise ValueError(
                f"the checkpoint {os.fspath(path)!r} cannot be read ({_reason(error)}); delete it to resume from the "
                "one before"
            ) from error
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        return step

    def _finish(self, unfinished: Path, target: Path) -> None:
        for file in unfinished.iterdir():
            flush_to_disk(file)
        shutil.rmtree(target, ignore_errors=True)  # of the same step, before a run resumed without it
        os.replace(unfinished, target)
        flush_to_disk(self.folder)
        for step in self.steps()[: -self.keep]:
            shutil.rmtree(self.folder / f"step-{step:09d}", ignore_errors=True)


def _state_of(model: nn.Module, optimizer: Optimizer, average: WeightAverage | None, step: int) -> dict[str, Any]:
    weights, optimizer_state = get_state_dict(model, optimizer)
    state: dict[str, Any] = {"model": weights, "optimizer": optimizer_state, "step": torch.tensor(step)}
    return state if average is None else state | {"average": average.weights}


def _reason(error: BaseException) -> str:
    """Return the cause of an error, without tracebacks in it."""
    causes = [cause for cause, _ in error.failures.values()] if isinstance(error, CheckpointException) else [error]
    return f"{type(causes[0]).__name__}: {causes[0]}".removesuffix(": ")


def _make_empty(folder: Path) -> None:
    for left in folder.parent.glob(f"{_UNFINISHED}-*"):
        shutil.rmtree(left, ignore_errors=True)
    with writing("a checkpoint", folder):
        folder.mkdir(parents=True)


@contextmanager
def _without_single_process_warning() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*single process.*", category=UserWarning)
        yield
