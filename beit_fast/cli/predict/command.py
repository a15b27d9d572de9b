"""What `beit-fast predict` does: every image of a data set through a model, in batches that are read ahead."""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..._version import __version__
from ..commands import DONE, SOME_FAILED, TASKS, processor_of, refusing, top_classes
from .dataset import Dataset, find_images
from .journal import Outcome, Part, Record, Run
from .ranks import Ranks
from .results import check_names, format_of, writer

INTERRUPTED = 130
_AHEAD = 2  # batches


@refusing
def predict(options: argparse.Namespace) -> int:
    """Predict the images that nobody has done yet, and write the results when none is left.

    The exit code is 1 if some images could not be read; among several processes the one that writes the results has it,
    since torchrun ends the others when one fails.
    """
    ranks = Ranks.from_environment()
    kind = format_of(options.out, options.format)
    if options.out.is_dir():
        raise IsADirectoryError(f"{str(options.out)!r} is a folder; OUT is the file to write")
    dataset = find_images(options.dataset)
    check_names(kind, dataset.paths)
    if dataset.remark and ranks.rank == 0:
        print(f"{options.dataset}: {dataset.remark}", file=sys.stderr)
    predictor = load_predictor(options, ranks.device(options.device))
    run = Run(options.out, _what_counts(options, kind, dataset, predictor), dataset.batches(options.batch_size))
    if not ranks.is_restarted():  # else this has been done
        if options.overwrite:
            ranks.once_before_all(run.forget)
        elif options.retry_failed:
            ranks.once_before_all(run.forget_failures)
    part = run.join(ranks.rank, ranks.world)
    if isinstance(part, Outcome):
        _report(options, ranks, predictor, Progress(), part, f"{options.out} is complete already")
        return DONE
    if options.optimize:
        predictor.optimize(options.batch_size)
    progress = Progress()
    try:
        _work(options, ranks, dataset, predictor, part, progress)
    except KeyboardInterrupt:
        print(f"beit-fast predict: stopped; the same command goes on from here ({ranks})", file=sys.stderr)
        return INTERRUPTED
    finally:
        part.close()
    outcome = run.finish(writer(kind, predictor.output))
    if outcome is None and ranks.world == 1:
        raise RuntimeError(f"somebody has changed {run.folder} meanwhile, not all batches are there: run this again")
    _report(options, ranks, predictor, progress, outcome, f"results: {options.out}")
    return SOME_FAILED if outcome is not None and outcome.failures else DONE


@dataclass
class Progress:
    """What this process has done: images, those that failed, those that it found done, seconds."""

    images: int = 0
    failures: list[Record] = field(default_factory=list)
    found_done: int = 0
    seconds: float = 0.0


class Predictor:
    """A model and its image processor: files to pixels, and pixels to what is recorded of an image.

    Args:
        output: `"classes"`, `"logits"` or `"features"`.
        top: how many classes are recorded.
    """

    def __init__(self, model: Any, processor: Any, output: str, top: int) -> None:
        self.model = model
        self.processor = processor
        self.output = output
        self.top = top

    def optimize(self, batch_size: int) -> None:
        """Make the model one that only infers, laid out for batches of this size."""
        from ...inference.optimized_model import optimize_for_inference

        config = self.model.config
        example = torch.zeros(batch_size, config.num_channels, *config.image_height_width, dtype=self.model.dtype)
        self.model = optimize_for_inference(self.model, example=example, keep_original=False)

    def read(self, file: Path) -> Tensor | str:
        """The pixels `[1, C, H, W]` of an image, or why there are none."""
        try:
            return self.processor(file, do_convert_rgb=True, return_tensors="pt")["pixel_values"]
        except MemoryError:
            raise
        except Exception as error:  # Pillow raises nearly anything for a damaged file
            return _reason(error, file)

    @torch.inference_mode()
    def records(self, paths: Sequence[str], images: Sequence[Tensor | str]) -> list[Record]:
        """A record for each image, in order; those of one size go through the model together."""
        rows: dict[int, Tensor] = {}
        for members in _by_shape(images).values():
            pixels = torch.cat([image for image in (images[index] for index in members) if isinstance(image, Tensor)])
            outputs = self.model(pixels.to(self.model.device, self.model.dtype))
            values = outputs.pooler_output if self.output == "features" else outputs.logits
            rows |= zip(members, values.float().cpu(), strict=True)
        return [
            self._record(path, rows.get(index, image))
            for index, (path, image) in enumerate(zip(paths, images, strict=True))
        ]

    def _record(self, path: str, found: Tensor | str) -> Record:
        if isinstance(found, str):
            return {"path": path, self.output: None, "error": found}
        if not found.isfinite().all():
            return {"path": path, self.output: None, "error": f"the model gave {self.output} that are not finite"}
        if self.output == "classes":
            value: Any = top_classes(found, self.model.config.id2label, self.top)
        else:
            value = found.tolist()
        return {"path": path, self.output: value, "error": None}

    def digest(self) -> str:
        """A number that changes with the weights, the configuration and the image processor, in hexadecimals."""
        total = hashlib.sha256(self.model.config.to_json_string().encode())
        total.update(self.processor.to_json_string().encode())
        for name, tensor in self.model.state_dict().items():
            total.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            total.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return total.hexdigest()


def load_predictor(options: argparse.Namespace, device: torch.device) -> Predictor:
    """The checkpoint's model on `device`, with the head that the options ask for.

    Raises:
        ValueError: the checkpoint has no such head, or its outputs are no probabilities of classes.
    """
    import beit_fast

    output = "features" if options.features else "logits" if options.logits else "classes"
    name = TASKS["model" if output == "features" else "image-classification"]
    model, info = getattr(beit_fast, name).from_pretrained(
        options.model,
        attn_implementation=options.attn,
        dtype=options.dtype,
        device=device,
        local_files_only=options.local_files_only,
        output_loading_info=True,
    )
    random = [key for key in info["missing_keys"] if key.startswith("classifier.")]
    if random:
        raise ValueError(
            f"{options.model} has no classifier, {', '.join(random)} would be random; accepted: a checkpoint for image "
            "classification, or --features with any checkpoint"
        )
    problem = model.config.problem_type
    if output == "classes" and problem not in (None, "single_label_classification"):
        raise ValueError(f"{options.model} is for {problem}, it gives no probabilities of classes; give --logits")
    return Predictor(model, processor_of(options.model, model.config, options.local_files_only), output, options.top)


def _what_counts(
    options: argparse.Namespace, kind: str, dataset: Dataset, predictor: Predictor
) -> dict[str, str | int | None]:
    """All that the results depend on, for the manifest of the run."""
    model = predictor.model
    return {
        "beit_fast": __version__,
        "dataset": os.fspath(dataset.source),
        "images": len(dataset.paths),
        "names of images": dataset.digest(),
        "model": predictor.digest(),
        "format": kind,
        "output": predictor.output,
        "top": options.top if predictor.output == "classes" else None,
        "batch size": options.batch_size,
        "attention": options.attn,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
        "optimize": options.optimize,
    }


def _work(
    options: argparse.Namespace, ranks: Ranks, dataset: Dataset, predictor: Predictor, part: Part, progress: Progress
) -> None:
    """Every `world`-th batch is this rank's; do those that nobody has done."""
    size = options.batch_size
    share = range(ranks.rank, dataset.batches(size), ranks.world)
    to_do = [number for number in share if number not in part.done]
    total = sum(len(dataset.batch(number, size)) for number in share)
    progress.found_done = total - sum(len(dataset.batch(number, size)) for number in to_do)
    start = time.perf_counter()
    with tqdm(
        total=total,
        initial=progress.found_done,
        unit="image",
        desc=str(ranks) if ranks.world > 1 else None,
        position=ranks.local_rank,
        disable=None,  # where stderr is no terminal
    ) as bar:
        workers = options.workers or _default_workers(ranks.local_world)
        for number, images in read_ahead(predictor, dataset, to_do, size, workers):
            records = predictor.records(dataset.batch(number, size), images)
            part.append(number, records)
            failures = [record for record in records if record["error"] is not None]
            for record in failures:
                bar.write(f"failed: {record['path']}: {record['error']}", file=sys.stderr)
            progress.images += len(records)
            progress.failures += failures
            progress.seconds = time.perf_counter() - start
            bar.update(len(records))


def read_ahead(
    predictor: Predictor, dataset: Dataset, numbers: Iterable[int], size: int, workers: int
) -> Iterator[tuple[int, list[Tensor | str]]]:
    """Batches by number as `Predictor.read` gives their images, the next ones being read in threads."""
    waiting: deque[tuple[int, list[Future[Tensor | str]]]] = deque()
    most = 1 + max(_AHEAD, -(-2 * workers // size))
    pool, coming = ThreadPoolExecutor(workers), iter(numbers)
    try:
        while True:
            for number in itertools.islice(coming, most - len(waiting)):
                files = [dataset.root / path for path in dataset.batch(number, size)]
                waiting.append((number, [pool.submit(predictor.read, file) for file in files]))
            if not waiting:
                return
            number, images = waiting.popleft()
            yield number, [image.result() for image in images]
    finally:
        pool.shutdown(cancel_futures=True)


def _default_workers(processes: int) -> int:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(8, usable // processes))


def _by_shape(images: Sequence[Tensor | str]) -> dict[torch.Size, list[int]]:
    shapes: dict[torch.Size, list[int]] = {}
    for index, image in enumerate(images):
        if isinstance(image, Tensor):
            shapes.setdefault(image.shape, []).append(index)
    return shapes


def _reason(error: Exception, file: Path) -> str:
    """What is wrong with an image, without the place of the data set: it must not depend on where that lies."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    name = os.fspath(file)
    text = str(error).removeprefix(f"image 0 ({name!r}) ").replace(name, file.name)
    return text or type(error).__name__


def _report(
    options: argparse.Namespace,
    ranks: Ranks,
    predictor: Predictor,
    progress: Progress,
    outcome: Outcome | None,
    last: str,
) -> None:
    """Print what this process did, and what the run came to or still lacks."""
    kernel = predictor.model.attention_report().kernel
    rate = progress.images / progress.seconds if progress.seconds else 0.0
    if options.json:
        facts = {
            "model": options.model,
            "dataset": options.dataset,
            "out": str(options.out),
            "kernel": kernel,
            "rank": ranks.rank,
            "world_size": ranks.world,
            "images": progress.images,
            "found_done": progress.found_done,
            "seconds": progress.seconds,
            "images_per_second": rate,
            "failures": [{"image": record["path"], "reason": record["error"]} for record in progress.failures],
            "complete": None if outcome is None else outcome._asdict(),
        }
        print(json.dumps(facts, indent=1))
        return
    own = f"{ranks}: " if ranks.world > 1 else ""
    lines = []
    if progress.images or progress.found_done:
        before = f"; {progress.found_done} were done before" if progress.found_done else ""
        lines.append(
            f"{own}{progress.images} images in {progress.seconds:.1f} s, {rate:.1f} images/s, "
            f"{len(progress.failures)} failed{before}"
        )
    if progress.images:
        lines.append(f"{own}attention: {kernel}")
    if outcome is None:
        lines.append(f"{own}other ranks have not ended; if they were killed, run the same command again")
    else:
        lines.append(f"{last}: {outcome.images} images, {outcome.failures} failed")
    print("\n".join(lines))
