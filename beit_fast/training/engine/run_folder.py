"""The folder of a run: its settings, its log, its checkpoints and its model."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from ...utils.files import atomic_write_text, json_text, read_json_object, try_lock, writing
from ...utils.messages import join_some

SETTINGS_NAME, LOG_NAME, LOCK_NAME = "run.json", "log.jsonl", ".lock"
MODEL_FOLDER, AVERAGE_FOLDER, CHECKPOINTS_FOLDER = "model", "model_ema", "checkpoints"
_TENSORBOARD_FOLDER, _TOKENIZER_FOLDER = "tensorboard", "tokenizer"
_OWN_FOLDERS = (MODEL_FOLDER, AVERAGE_FOLDER, CHECKPOINTS_FOLDER, _TENSORBOARD_FOLDER, _TOKENIZER_FOLDER)


class RunFolder:
    """A folder with one training run.

    Args:
        path: The folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: IO[bytes] | None = None

    @property
    def model(self) -> Path:
        """The folder of the trained model."""
        return self.path / MODEL_FOLDER

    @property
    def average(self) -> Path:
        """The folder of the averaged model."""
        return self.path / AVERAGE_FOLDER

    @property
    def tokenizer(self) -> Path:
        """The folder of the visual tokenizer of pre-training."""
        return self.path / _TOKENIZER_FOLDER

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return self.path / CHECKPOINTS_FOLDER

    @property
    def log(self) -> Path:
        """The log, one JSON object a line."""
        return self.path / LOG_NAME

    @property
    def tensorboard(self) -> Path:
        """The folder of TensorBoard's files."""
        return self.path / _TENSORBOARD_FOLDER

    def check(self, settings: Mapping[str, Any], overwrite: bool) -> None:
        """Check that a run with these settings may begin or resume here; nothing is written.

        Raises:
            ValueError: If the folder has other files than a run's, or its run has other settings.
        """
        if overwrite or not self.path.exists():
            return
        if not self.path.is_dir():
            raise ValueError(f"the output {os.fspath(self.path)!r} is a file (expected a folder, or a new path)")
        file = self.path / SETTINGS_NAME
        if not file.exists():
            names = sorted(entry.name for entry in self.path.iterdir() if entry.name != LOCK_NAME)
            if names:
                raise ValueError(
                    f"the folder {os.fspath(self.path)!r} is not empty and has no {SETTINGS_NAME} of a run: it "
                    f"contains {join_some(names, 5)} (expected a new folder, or that of the run to resume)"
                )
            return
        before = read_json_object(file).get("settings")
        if not isinstance(before, dict):
            raise ValueError(f"{os.fspath(file)!r} is damaged; choose another output, or pass --overwrite")
        present = json.loads(json.dumps(dict(settings)))
        names = [name for name in sorted(before.keys() | present.keys()) if before.get(name) != present.get(name)]
        if names:
            changes = "; ".join(f"{name}: {before.get(name)!r} before, {present.get(name)!r} now" for name in names)
            raise ValueError(
                f"the run in {os.fspath(self.path)!r} was started with other settings ({changes}); pass the same ones, "
                "choose another output, or pass --overwrite to start from the beginning"
            )

    def begin(self, settings: Mapping[str, Any], conditions: Mapping[str, Any], overwrite: bool) -> None:
        """Lock the folder and write the settings of a new run; with `overwrite`, delete the old run first.

        Raises:
            BlockingIOError: If another process trains here.
            OSError: If the folder cannot be written.
        """
        with writing("the run", self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            self._take_lock()
            if overwrite:
                for name in _OWN_FOLDERS:
                    shutil.rmtree(self.path / name, ignore_errors=True)
                for name in (SETTINGS_NAME, LOG_NAME):
                    (self.path / name).unlink(missing_ok=True)
            file = self.path / SETTINGS_NAME
            if not file.exists():
                text = json_text({"settings": dict(settings), "conditions": dict(conditions)}, owner="the run")
                atomic_write_text(file, text)

    def close(self) -> None:
        """Release the lock."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _take_lock(self) -> None:
        stream = (self.path / LOCK_NAME).open("ab")
        if not try_lock(stream):
            stream.close()
            raise BlockingIOError(
                f"another process trains in {os.fspath(self.path)!r}; wait until it has ended, or choose another output"
            )
        self._lock = stream
