"""Generated images and options for pre-training, and its command in one or more processes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from beit_fast.training import PretrainOptions

TINY: dict[str, Any] = {
    "model_type": "beit",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "patch_size": 8,
    "image_size": 32,
    "use_shared_relative_position_bias": True,
    "layer_scale_init_value": 0.1,
    "drop_path_rate": 0.3,
}
SMALL: dict[str, Any] = {
    "input_size": 32,
    "vocab_size": 8,
    "epochs": 2,
    "batch_size": 4,
    "num_workers": 0,
    "log_every": 1,
    "warmup_epochs": 1,
    "lr": 1e-3,
}


def write_inputs(folder: Path, images: int = 12) -> Path:
    """Write pictures of one color each, with noise, to `images`, and a configuration to `tiny.json`."""
    draw = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    for index in range(images):
        colors = (draw.integers(20, 235, 3) + draw.integers(-20, 20, (4, 4, 3))).astype(np.uint8)
        Image.fromarray(colors).resize((44, 40), Image.Resampling.NEAREST).save(folder / "images" / f"{index:02}.png")
    (folder / "tiny.json").write_text(json.dumps(TINY))
    return folder


def options_of(folder: Path, output: Path, **changes: Any) -> PretrainOptions:
    """Return options of a small run on `write_inputs`."""
    values = {"data": folder / "images", "model": str(folder / "tiny.json"), "output": output}
    return PretrainOptions(**(values | SMALL | changes))


def command_of(folder: Path, output: Path, processes: int = 1, **changes: Any) -> list[str]:
    """Return the command of the same run, under torchrun for several processes."""
    command = ["beit_fast", "pretrain", str(folder / "images"), str(output), "--model", str(folder / "tiny.json")]
    for name, value in (SMALL | changes).items():
        command += ["--" + name.replace("_", "-"), *([] if value is True else [str(value)])]
    if processes == 1:
        return [sys.executable, "-m", *command]
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"]
    return [sys.executable, "-m", *torchrun, *command]


def rows_of(output: Path) -> list[dict[str, Any]]:
    """Read the rows of a log without the speed, which differs from run to run."""
    rows = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "images_per_second"} for row in rows]
