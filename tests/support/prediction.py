"""Small data sets and checkpoints for `beit-fast predict`, and the command itself."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import beit_fast
from beit_fast.cli import main

from .transformers_reference import TINY, randomize

LABELS = {index: f"class {index}" for index in range(5)}
SIZES = ((40, 30), (33, 50), (32, 32))


def save_checkpoint(folder: Path, name: str = "BeitForImageClassification", seed: int = 0, **options: Any) -> Any:
    """A random model of that class, bias tables N(0, 1), written to `folder`."""
    values = TINY | {"use_relative_position_bias": True, "num_labels": 5, "id2label": LABELS} | options
    model = getattr(beit_fast, name)(beit_fast.BeitConfig(**values)).eval()
    randomize(model, seed)
    model.save_pretrained(folder)
    return model


def save_image(path: Path, seed: int, size: tuple[int, int] = (32, 32)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def save_images(folder: Path, count: int) -> list[str]:
    """Images of several sizes, in one folder below; their names."""
    names = [f"{'part' if index % 3 == 0 else '.'}/{index:03}.png" for index in range(count)]
    for index, name in enumerate(names):
        save_image(folder / name, index, SIZES[index % len(SIZES)])
    return sorted(Path(name).as_posix() for name in names)


def predict(capsys: Any, *arguments: Any) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the command on the CPU."""
    code = main.main(["predict", *(os.fspath(part) if isinstance(part, Path) else str(part) for part in arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]
