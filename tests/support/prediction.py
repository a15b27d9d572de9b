"""Small data sets and checkpoints for `beit-fast predict`, and functions that run it."""

from __future__ import annotations

import json
import multiprocessing
import multiprocessing.process
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import beit_fast
from beit_fast.cli import main

from .transformers_reference import TINY, randomize

LABELS = {index: f"class {index}" for index in range(5)}
COUNT, BATCH_SIZE = 20, 3
SIZES = ((40, 30), (33, 50), (32, 32))


def save_checkpoint(folder: Path, name: str = "BeitForImageClassification", seed: int = 0, **options: Any) -> Any:
    """Save a random model and its image processor to `folder`; its bias tables are N(0, 1)."""
    values = TINY | {"use_relative_position_bias": True, "num_labels": 5, "id2label": LABELS} | options
    model = getattr(beit_fast, name)(beit_fast.BeitConfig(**values)).eval()
    randomize(model, seed)
    model.save_pretrained(folder)
    beit_fast.BeitImageProcessor(size=model.config.image_height_width).save_pretrained(folder)
    return model


def save_image(path: Path, seed: int, size: tuple[int, int] = (32, 32)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def save_images(folder: Path, count: int) -> list[str]:
    """Save images of several sizes, some in a subfolder, and return their names."""
    names = [f"{'part' if index % 3 == 0 else '.'}/{index:03}.png" for index in range(count)]
    for index, name in enumerate(names):
        save_image(folder / name, index, SIZES[index % len(SIZES)])
    return sorted(Path(name).as_posix() for name in names)


def main_predict(*arguments: Any) -> int:
    """Run the command in this process and return its exit code."""
    return main.main(["predict", *map(str, arguments)])


def predict(capsys: Any, *arguments: Any) -> tuple[int, str, str]:
    """Run the command in this process and return its exit code, stdout and stderr."""
    code = main_predict(*arguments)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def fork(
    function: Callable[[], Any], output: Path | None = None, **environment: Any
) -> multiprocessing.process.BaseProcess:
    """Start `function` in a fork of this process, which has already imported torch.

    The process exits with the value of `function`. It writes stdout and stderr to `output` with the suffixes .out and
    .err.
    """

    def run() -> None:
        os.environ.update({name: str(value) for name, value in environment.items()})
        torch.set_num_threads(1)  # OpenMP threads do not survive a fork
        base = Path(os.devnull) if output is None else output
        sys.stdout = base.open("w") if output is None else base.with_suffix(".out").open("w")
        sys.stderr = base.open("w") if output is None else base.with_suffix(".err").open("w")
        sys.exit(function())

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    return process


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]


def done_in(run_folder: Path) -> list[int]:
    """List the numbers of the completed batches of a run."""
    return sorted(int(file.stem) for file in (run_folder / "batches").glob("[0-9]*.json"))


def names_in(number: int, images: Path) -> list[str]:
    """List the image names of a batch."""
    names = sorted(path.relative_to(images).as_posix() for path in images.rglob("*.png"))
    return [name.rpartition("/")[2] for name in names[number * BATCH_SIZE : (number + 1) * BATCH_SIZE]]
