"""Images decoded and augmented per second and core: this package against torchvision.

`python -m benchmarks.input_pipeline --results benchmarks/results`
"""

from __future__ import annotations

import argparse
import datetime
import io
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, features
from PIL import __version__ as pillow_version

from beit_fast.cli.collect_env import environment
from beit_fast.training import TwoViewTransform
from beit_fast.training.data import ImageFolder
from beit_fast.training.seeding import VIEWS, derived_generator
from beit_fast.training.transforms import ClassificationTransform
from benchmarks.baselines import torchvision_transforms
from benchmarks.harness.results import file_name, write_results

SIZE = (500, 375)
"""Width and height of the images, the most frequent size of ImageNet."""

TASKS = ("decode", "two-views", "two-views-jitter", "classification")
OURS, TORCHVISION = "beit_fast", "torchvision"

H200_BF16_FLOPS = 989e12
SHARE_OF_PEAK = 0.4
"""Assumed share of the peak that a training step reaches on a GPU; not measured."""

Pipeline = Callable[[int], Any]


def write_images(folder: Path, count: int) -> int:
    """Write JPEG images of quality 90 with structure at all scales, one in four upright.

    Returns:
        The bytes of all files.
    """
    random = np.random.default_rng(0)
    total = 0
    for number in range(count):
        size = SIZE if number % 4 else SIZE[::-1]
        pixels = np.zeros((size[1], size[0], 3), np.float32)
        for cells in (3, 8, 20, 60, 180):
            noise = Image.fromarray(random.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
            pixels += np.asarray(noise.resize(size, Image.Resampling.BICUBIC), np.float32) - 128
        stream = io.BytesIO()
        Image.fromarray(np.clip(pixels * 0.4 + 128, 0, 255).astype(np.uint8)).save(stream, "JPEG", quality=90)
        (folder / f"{number:04}.jpg").write_bytes(stream.getvalue())
        total += len(stream.getvalue())
    return total


def our_pipeline(source: ImageFolder, task: str, whole: bool = False) -> Pipeline:
    """Return a function from the index of an image to its tensors, as `TrainingDataset` computes them."""
    crop: dict[str, Any] = {"scale": (1.0, 1.0), "ratio": (4 / 3, 4 / 3), "flip_probability": 0.0} if whole else {}
    if task == "decode":
        return source.read
    if task == "classification":
        jitter = None if whole else 0.4
        classify = ClassificationTransform(aa=None, color_jitter=jitter, reprob=0.0, **crop)
        return lambda index: classify(source.read(index), derived_generator(0, VIEWS, 0, index))
    views = TwoViewTransform(color_jitter=0.4 if task == "two-views-jitter" else None, **crop)
    return lambda index: views(source.read(index).image, derived_generator(0, VIEWS, 0, index))


def torchvision_pipeline(files: Sequence[Path], task: str, whole: bool = False) -> Pipeline:
    """Return the same task by torchvision."""
    if task == "decode":
        return lambda index: torchvision_transforms.load(files[index])
    if task == "classification":
        transform = torchvision_transforms.classification(whole)
    else:
        transform = torchvision_transforms.two_views(0.4 if task == "two-views-jitter" else None, whole)
    return lambda index: transform(files[index])


def check(source: ImageFolder, files: Sequence[Path], index: int) -> None:
    """Check that both give the same pixels for the whole image without flip and jitter.

    Raises:
        AssertionError: If more than 2% of the values differ, or one by more than 2 of 255 levels.
    """
    for task in ("two-views", "classification"):
        ours = our_pipeline(source, task, whole=True)(index)
        theirs = torchvision_pipeline(files, task, whole=True)(index)
        for first, second in zip(ours.values(), theirs, strict=True):
            levels = (first - second).abs() * 255 * (0.5 if first.shape[-1] == 224 else 1.0)
            share = (levels > 0.01).double().mean().item()
            if levels.max() > 2.01 or share > 0.02:
                raise AssertionError(f"{task}: {share:.2%} of the values differ, by up to {levels.max():g} levels")


def measure(pipelines: dict[str, Pipeline], count: int, rounds: int) -> dict[str, list[float]]:
    """Return images per second of CPU time, for each pipeline and round.

    The pipelines take turns, in forward and in reverse order. The first round is not kept.
    """
    rates: dict[str, list[float]] = {name: [] for name in pipelines}
    for number in range(rounds + 1):
        for name in list(pipelines)[:: 1 if number % 2 else -1]:
            start = time.process_time()
            for index in range(count):
                pipelines[name](index)
            if number:
                rates[name].append(count / (time.process_time() - start))
    return rates


def training_flops_per_image(tokens: int = 197, width: int = 768, layers: int = 12, masked: int = 75) -> float:
    """Count the plain FLOPs of a pre-training step of BEiT-base, 3 times those of the forward pass."""
    block = 24 * tokens * width**2 + 4 * tokens**2 * width
    patches = 2 * (tokens - 1) * width * 768
    return 3 * (layers * block + patches + 2 * masked * width * 8192)


def cores_for_h200(rate: float) -> float:
    """Return the cores that read as many images as an H200 would train on, by estimate."""
    return H200_BF16_FLOPS * SHARE_OF_PEAK / training_flops_per_image() / rate


def run(images: int, rounds: int, requires_baselines: bool) -> dict[str, Any]:
    """Measure all tasks; return conditions and rows."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        size = write_images(Path(name), images)
        source = ImageFolder(name)
        files = [Path(name) / source.name_of(index) for index in range(len(source))]
        version = _torchvision_version(requires_baselines)
        if version is not None:
            check(source, files, index=1)
        rows = []
        for task in TASKS:
            pipelines = {OURS: our_pipeline(source, task)}
            if version is not None:
                pipelines[TORCHVISION] = torchvision_pipeline(files, task)
            rows += _rows(task, measure(pipelines, images, rounds))
    conditions = environment("cpu") | {
        "torchvision": version,
        "pillow": pillow_version,
        "libjpeg_turbo": features.version("libjpeg_turbo"),
        "images": images,
        "image_size": f"{SIZE[0]}x{SIZE[1]}",
        "bytes_per_image": round(size / images),
        "rounds": rounds,
        "clock": "CPU time of one process with one thread",
        "h200_estimate": f"{H200_BF16_FLOPS:g} FLOP/s, {SHARE_OF_PEAK:g} of it reached, plain FLOPs; not measured",
    }
    return {"conditions": conditions, "date": datetime.date.today().isoformat(), "rows": rows}


def _rows(task: str, rates: dict[str, list[float]]) -> list[dict[str, Any]]:
    rows = []
    for baseline, values in rates.items():
        rate = statistics.median(values)
        row = {
            "task": task,
            "baseline": baseline,
            "images_per_second_and_core": round(rate, 1),
            "range": [round(min(values), 1), round(max(values), 1)],
        }
        if baseline != OURS:
            ratios = [ours / theirs for ours, theirs in zip(rates[OURS], values, strict=True)]
            row["ours_is_faster_by"] = round(statistics.median(ratios), 3)
        elif task != "decode":
            row["cores_for_an_h200_estimated"] = round(cores_for_h200(rate), 1)
        rows.append(row)
    return rows


def _torchvision_version(required: bool) -> str | None:
    try:
        return str(torchvision_transforms.import_torchvision()[0].__version__)
    except ImportError:
        if required:
            raise
        return None


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark and print, or write, its results as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=64, help="images in a round (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=9, help="timed rounds (default: %(default)s)")
    parser.add_argument("--results", type=Path, help="write a JSON file in input-pipeline/ of this folder")
    parser.add_argument("--require-baselines", action="store_true", help="fail if torchvision is not installed")
    options = parser.parse_args(arguments)
    results = run(options.images, options.rounds, options.require_baselines)
    print(json.dumps(results, indent=1))
    if options.results is not None:
        name = file_name(results["conditions"], "input pipeline").removesuffix("-input-pipeline")
        write_results(results, options.results / "input-pipeline" / f"{name}.json")


if __name__ == "__main__":
    main()
