"""The command `beit-fast predict`: all images of a data set through a model, in batches that are read ahead."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ...utils.messages import count_of, join_some
from ...utils.version import __version__
from ..forward import CLASSIFIER, class_entries, load_complete, run_batch, score_name
from ..options import TASKS, ExitCode, Format, Output, PredictOptions
from ..outputs import check_file, check_keeps
from ..process import report_to_torchrun
from ..processors import processor_of
from .dataset import Dataset, ImageBatch, ImageBatches, find_images
from .journal import Outcome, Record, Run, Share, check_resumable
from .ranks import Ranks
from .results import check_names, format_of, writer

_LOG_SECONDS = 60.0
"""The time between lines about progress if stderr is not a terminal."""


def predict(options: PredictOptions) -> int:
    """Predict the remaining images; when all are done, write the results.

    Returns:
        The exit code: `SOME_FAILED` if some images have no result, also when nothing remains to be done. Of several
        processes only the one that writes the results returns it (rank 0 if they are written), because torchrun
        stops the others when one fails.
    """
    ranks = Ranks.from_environment()
    file_format = format_of(options.out, options.format)
    check_file("the results", options.out)
    dataset = find_images(options.dataset)
    check_keeps([options.out], [dataset.source, *dataset.files_named(options.out.name)])
    if options.start != "overwrite":
        check_resumable(options.out)
    check_names(file_format, dataset.paths)
    if dataset.note and ranks.rank == 0:
        print(f"{options.dataset}: {dataset.note}", file=sys.stderr)
    predictor = load_predictor(options, ranks.device(options.device))
    run = Run(
        options.out,
        _run_options(options, file_format, dataset, predictor),
        dataset.num_batches(options.batch_size),
    )
    if not ranks.is_restarted():  # a restart by torchrun resumes
        if options.start == "overwrite":
            ranks.once_before_all(run.restart)
        elif options.start == "retry-failed":
            ranks.once_before_all(run.drop_failures)
    share = run.join(ranks.rank, ranks.world)
    if ranks.rank == 0:
        _note_modified(dataset, options.batch_size, run.times(share))
    if isinstance(share, Outcome):
        _report(options, ranks, predictor, Progress(), share, f"{options.out} is already complete")
        return _exit_code(options, share if ranks.rank == 0 else None)
    if options.optimize:
        predictor.optimize(options.batch_size)
    progress = Progress()
    try:
        with share:
            _predict_share(options, ranks, dataset, predictor, share, progress)
    except KeyboardInterrupt:
        without = " without --overwrite" if options.start == "overwrite" else ""
        own = f" ({ranks})" if ranks.world > 1 else ""
        print(f"beit-fast predict: stopped; rerun the same command{without} to resume{own}", file=sys.stderr)
        return ExitCode.INTERRUPTED
    outcome = run.finish(writer(file_format, predictor.output, score_name(predictor.model.config)))
    if outcome is None and ranks.world == 1:
        raise RuntimeError(f"{run.folder} was modified while running and lacks batches; rerun the same command")
    _report(options, ranks, predictor, progress, outcome, f"results: {options.out}")
    return _exit_code(options, outcome)


@dataclass
class Progress:
    """Progress of this process.

    Attributes:
        images: Images that it predicted.
        failures: The records of those that failed.
        already_done: Images of its share that were done before.
        seconds: The time since the first batch was requested.
    """

    images: int = 0
    failures: list[Record] = field(default_factory=list)
    already_done: int = 0
    seconds: float = 0.0

    @property
    def rate(self) -> float:
        """Images per second."""
        return self.images / self.seconds if self.seconds else 0.0

    def line(self, ranks: Ranks, total: int) -> str:
        """Return a line for a log; `total` counts the images of this process."""
        own = f"{ranks}: " if ranks.world > 1 else ""
        done = self.already_done + self.images
        return f"{own}{done} of {count_of(total, 'image')}, {self.rate:.1f} images/s, {len(self.failures)} failed"


class Predictor:
    """A model, its image processor and the outputs to record.

    Args:
        model: A model on its device.
        processor: The image processor of its checkpoint.
        output: What to record.
        top: The number of classes to record.
    """

    def __init__(self, model: Any, processor: Any, output: Output, top: int) -> None:
        self.model = model
        self.processor = processor
        self.output = output
        self.top = top

    def optimize(self, batch_size: int) -> None:
        """Replace the model by its `optimize_for_inference`, laid out for this batch size."""
        from ...inference.optimized_model import optimize_for_inference

        config = self.model.config
        example = torch.zeros(batch_size, config.num_channels, *config.image_height_width, dtype=self.model.dtype)
        self.model = optimize_for_inference(self.model, example=example, keep_original=False)

    def records(self, paths: Sequence[str], batch: ImageBatch) -> list[Record]:
        """Predict one batch and return a record of each image."""
        found = run_batch(self.model, batch.images, self.output)
        return [self._record(path, found[index]) for index, path in enumerate(paths)]

    def _record(self, path: str, found: Tensor | str) -> Record:
        if isinstance(found, str):
            return {"path": path, self.output: None, "error": found}
        is_ranked = self.output == "classes"
        value: Any = class_entries(found, self.model.config, self.top) if is_ranked else found.tolist()
        return {"path": path, self.output: value, "error": None}

    def digest(self) -> str:
        """Return a hexadecimal hash of weights, configuration and image processor."""
        total = hashlib.sha256(self.model.config.to_json_string().encode())
        total.update(self.processor.to_json_string().encode())
        for name, tensor in self.model.state_dict().items():
            total.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            total.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return total.hexdigest()


def load_predictor(options: PredictOptions, device: torch.device) -> Predictor:
    """Load the checkpoint's model on `device`.

    The model has the head that the options need.

    Raises:
        ValueError: If the checkpoint does not contain this head.
    """
    has_features = options.output == "features"
    expected = "expected a checkpoint of the trunk of BEiT" if has_features else f"{CLASSIFIER}, or --features"
    model = load_complete(
        TASKS["model" if has_features else "image-classification"],
        options.model,
        expected,
        ["pooler."] if has_features else [],  # a LayerNorm, which starts with ones and zeros
        attn_implementation=options.attn,
        dtype=options.dtype,
        device=device,
        local_files_only=options.local_files_only,
    )
    processor = processor_of(options, model.config)
    return Predictor(model, processor, options.output, options.top)


def _run_options(
    options: PredictOptions, file_format: Format, dataset: Dataset, predictor: Predictor
) -> dict[str, str | int | None]:
    """All that the results depend on, for the manifest of the run."""
    model = predictor.model
    return {
        "beit_fast": __version__,
        "dataset": os.fspath(dataset.source),
        "images": len(dataset.paths),
        "image names": dataset.digest(),
        "model": predictor.digest(),
        "format": file_format,
        "output": predictor.output,
        "top": options.top if predictor.output == "classes" else None,
        "batch size": options.batch_size,
        "attention": options.attn,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
        "optimize": options.optimize,
    }


def _predict_share(
    options: PredictOptions, ranks: Ranks, dataset: Dataset, predictor: Predictor, share: Share, progress: Progress
) -> None:
    """Predict the remaining batches of this rank, which has every `world`-th one."""
    size = options.batch_size
    own = range(ranks.rank, dataset.num_batches(size), ranks.world)
    remaining = [number for number in own if number not in share.done]
    total = sum(len(dataset.batch(number, size)) for number in own)
    progress.already_done = total - sum(len(dataset.batch(number, size)) for number in remaining)
    workers = _default_workers(ranks.local_world) if options.workers is None else options.workers
    start = logged = time.perf_counter()
    with tqdm(
        total=total,
        initial=progress.already_done,
        unit="image",
        desc=str(ranks) if ranks.world > 1 else None,
        position=ranks.local_rank,
        disable=None,  # if stderr is not a terminal
    ) as bar:
        for batch in ImageBatches(dataset, size, predictor.processor).read_ahead(remaining, workers):
            records = predictor.records(dataset.batch(batch.number, size), batch)
            share.write(batch.number, records)
            failures = [record for record in records if record["error"] is not None]
            for record in failures:
                bar.write(f"failed: {record['path']}: {record['error']}", file=sys.stderr)
            progress.images += len(records)
            progress.failures += failures
            now = time.perf_counter()
            progress.seconds = now - start
            bar.update(len(records))
            if bar.disable and now - logged >= _LOG_SECONDS:
                logged = now
                print(progress.line(ranks, total), file=sys.stderr, flush=True)


def _note_modified(dataset: Dataset, size: int, times: Mapping[int, float]) -> None:
    """Print how many images were modified after their batch was predicted.

    Args:
        dataset: The images.
        size: Images in a batch.
        times: When each batch was written.
    """
    modified = [
        path
        for number, written in times.items()
        for path in dataset.batch(number, size)
        if dataset.time(path) > written
    ]
    if modified:
        were = (
            "was modified after it was predicted" if len(modified) == 1 else "were modified after they were predicted"
        )
        print(
            f"{count_of(len(modified), 'image')} {were}: {join_some(modified, 3)}; --overwrite predicts all images "
            "again, and --retry-failed those that failed",
            file=sys.stderr,
        )


def _exit_code(options: PredictOptions, outcome: Outcome | None) -> ExitCode:
    """Return the exit code of the process that has this outcome; None is that of the others."""
    if outcome is None or not outcome.failures:
        return ExitCode.DONE
    report_to_torchrun(
        f"{outcome.failures} of {count_of(outcome.images, 'image')} failed, see the errors in {options.out}"
    )
    return ExitCode.SOME_FAILED


def _default_workers(processes: int) -> int:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(8, usable // processes))


def _report(
    options: PredictOptions,
    ranks: Ranks,
    predictor: Predictor,
    progress: Progress,
    outcome: Outcome | None,
    last: str,
) -> None:
    """Print what this process did, and the state of the run."""
    report = predictor.model.attention_report()
    kernel = report.kernel if report.has_run else None
    if options.json:
        facts = {
            "model": options.model,
            "dataset": options.dataset,
            "out": str(options.out),
            "kernel": kernel,
            "rank": ranks.rank,
            "world_size": ranks.world,
            "images": progress.images,
            "already_done": progress.already_done,
            "seconds": progress.seconds,
            "images_per_second": progress.rate,
            "failures": [{"image": record["path"], "reason": record["error"]} for record in progress.failures],
            "complete": None if outcome is None else outcome._asdict(),
        }
        print(json.dumps(facts, indent=1))
        return
    own = f"{ranks}: " if ranks.world > 1 else ""
    lines = []
    if progress.images or progress.already_done:
        before = f", {progress.already_done} already done" if progress.already_done else ""
        lines.append(
            f"{own}{count_of(progress.images, 'image')} in {progress.seconds:.1f} s, {progress.rate:.1f} images/s, "
            f"{len(progress.failures)} failed{before}"
        )
    if progress.images and kernel is not None:
        lines.append(f"{own}attention: {kernel}")
    if outcome is None:
        lines.append(f"{own}other ranks are still running; if they were killed, rerun the same command")
    else:
        lines.append(f"{last}: {count_of(outcome.images, 'image')}, {outcome.failures} failed")
    print("\n".join(lines))
