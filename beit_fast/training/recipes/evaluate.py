"""Evaluation of a checkpoint: `beit-fast eval`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ...checkpoint.files import find_checkpoint
from ...checkpoint.loading import missing_parameters_error
from ...configuration.beit_config import BeitConfig
from ...image_processing.inputs import read_label_maps
from ...image_processing.of_checkpoint import find_processor, unknown_preprocessing
from ...image_processing.processor import BeitImageProcessor
from ...models.beit import BeitForImageClassification, BeitModel
from ...models.segmentation import BeitForSemanticSegmentation
from ...utils.hub import HubOptions
from ...utils.messages import join_some
from ..data.dataset import EvaluationDataset, build_loader, collate_evaluation
from ..data.opening import open_source
from ..data.sampler import EvaluationSampler
from ..data.source import Example, ImageSource
from ..engine.processes import Processes, processes_of_run
from ..evaluation import (
    ClassificationAccuracy,
    FeatureTable,
    LinearProbe,
    SegmentationAccuracy,
    knn_scores,
    pooled_features,
)
from ..evaluation.features import check_pooling
from .evaluate_options import EvaluateOptions, EvaluationTask
from .finetune_evaluation import Preprocess

_MODELS: dict[EvaluationTask, Any] = {
    "classification": BeitForImageClassification,
    "segmentation": BeitForSemanticSegmentation,
    "features": BeitModel,
}


def evaluate(options: EvaluateOptions) -> dict[str, Any]:
    """Evaluate a checkpoint on every readable image once.

    Under torchrun all processes call it and share the images.

    Args:
        options: What to evaluate, on what, and how.

    Returns:
        `task` and `images`, the number of readable ones. Classification: `top1` and `top5`. Segmentation: see
        `SegmentationAccuracy.compute`. With `knn` and `linear_probe` dicts of their `top1` and `top5`, the latter also
        with the chosen `strength`. `unreadable` has "name: reason" of each image that was left out. Every process
        returns the same.

    Raises:
        FileNotFoundError: If there is no data or checkpoint at a path.
        ValueError: If the checkpoint has no head of the task, or classes do not fit.
    """
    with processes_of_run(options.device) as processes, torch.no_grad():
        return _Evaluation(options, processes).run()


class _Evaluation:
    """One evaluation: the model, the image processor and the images."""

    def __init__(self, options: EvaluateOptions, processes: Processes) -> None:
        self.options, self.processes = options, processes
        self.task = options.task or _task_of(options)
        is_segmentation = self.task == "segmentation"
        self.source = open_source(options.data, "segmentation" if is_segmentation else "classes")
        paths = dict.fromkeys(path for path in (options.knn, options.linear_probe) if path is not None)
        self.training = {path: open_source(path, "classes") for path in paths}
        if is_segmentation and paths:
            raise ValueError(f"{options.model!r} is a segmentation model, which k-NN and linear probe do not take")
        for source in self.training.values():
            if source.classes != self.source.classes:
                raise ValueError(_difference(source.name, source.classes, self.source))
        self.model = _load(options, self.task).to(processes.device).eval()
        self.processor = _processor_of(options, self.model.config)
        check_pooling(options.pooling, options.layer, self.model.config.num_hidden_layers)
        self.ids = _class_ids(options, self.source, self.model.config) if self.task == "classification" else None
        self.unreadable: list[str] = []

    def run(self) -> dict[str, Any]:
        """Return the results; see `evaluate`."""
        found: dict[str, Any] = {"task": self.task}
        if self.task == "classification":
            found |= self._classify()
        elif self.task == "segmentation":
            found |= self._segment()
        if self.training:
            found |= self._probe()
        return found | {"unreadable": self.unreadable}

    def _classify(self) -> dict[str, Any]:
        accuracy = ClassificationAccuracy(self.model.config.num_labels)
        for logits, batch in self._outputs(self.source, None, lambda pixels: self.model(pixels).logits.float()):
            labels = batch["labels"]
            accuracy.update(logits, labels if self.ids is None else self.ids[labels])
        return accuracy.compute()

    def _segment(self) -> dict[str, Any]:
        options, config = self.options, self.model.config
        ignored = config.semantic_loss_ignore_index if options.ignore_index is None else options.ignore_index
        reduced = (
            self.processor.to_dict()["do_reduce_labels"] if options.reduce_labels is None else options.reduce_labels
        )
        metric = SegmentationAccuracy(config.num_labels, ignored, bool(reduced))
        for logits, batch in self._outputs(
            self.source, annotation_of, lambda pixels: self.model(pixels).logits.float()
        ):
            sizes = [tuple(labels.shape) for labels in batch["labels"]]
            metric.update(self.processor.post_process_semantic_segmentation({"logits": logits}, sizes), batch["labels"])
        return metric.compute()

    def _probe(self) -> dict[str, Any]:
        """Classify features by k-NN and a linear probe."""
        options = self.options
        tables = {path: self._features(source) for path, source in self.training.items()}
        table = self._features(self.source)
        labels = torch.cat([table.labels, *(each.labels for each in tables.values())])
        classes = len(self.source.classes) if self.source.classes else int(labels.max()) + 1
        found: dict[str, Any] = {"images": len(table.features)}
        if options.knn is not None:
            scores = knn_scores(tables[options.knn], table.features, classes, options.k, options.temperature)
            found["knn"] = _accuracy(scores, table.labels)
        if options.linear_probe is not None:
            probe = LinearProbe.fit(tables[options.linear_probe], classes, seed=options.seed)
            accuracy = _accuracy(probe.logits(table.features), table.labels)
            found["linear_probe"] = {**accuracy, "strength": probe.strength}
        return found

    def _features(self, source: ImageSource) -> FeatureTable:
        """Compute the features of all images, in all processes."""
        options = self.options
        trunk = self.model if self.task == "features" else self.model.beit
        rows, labels, indices = [], [], []
        is_known = source is self.source and self.task != "features"  # its unreadable images are already counted
        for features, batch in self._outputs(
            source, None, lambda pixels: pooled_features(trunk, pixels, options.pooling, options.layer), is_known
        ):
            rows.append(features)
            labels += batch["labels"].tolist()
            indices += batch["index"]
        return FeatureTable.gather(rows, labels, indices, self.model.config.hidden_size)

    def _outputs(
        self,
        source: ImageSource,
        labels_of: Callable[[Example], Tensor] | None,
        forward: Callable[[Tensor], Tensor],
        is_known: bool = False,
    ) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        """Yield outputs `[B, ...]` and batches of the share of this process.

        Args:
            source: The images.
            labels_of: Reads an annotation; None for class ids.
            forward: Computes the outputs of pixels `[B, C, H, W]`.
            is_known: Whether unreadable images are already counted.
        """
        options, processes = self.options, self.processes
        sampler = EvaluationSampler(
            len(source), options.batch_size, num_processes=processes.count, process_index=processes.rank
        )
        dataset = EvaluationDataset(source, Preprocess(self.processor, labels_of))
        unreadable: list[str] = []
        total = len(sampler.share)
        with tqdm(total=total, unit="image", disable=None if processes.is_main and total > 1 else True) as bar:
            for batch in build_loader(dataset, sampler, collate_evaluation, options.num_workers):
                unreadable += batch["unreadable"]
                if batch["index"]:
                    pixels = batch["pixel_values"]
                    groups = [pixels] if isinstance(pixels, Tensor) else [image[None] for image in pixels]
                    parts = [forward(group.to(processes.device, self.model.dtype)) for group in groups]
                    yield torch.cat(parts), batch
                bar.update(len(batch["index"]) + len(batch["unreadable"]))
        if not is_known:
            self.unreadable += processes.gather(unreadable)


def annotation_of(example: Example) -> Tensor:
    """Return the ids of an annotation as stored, `[H, W]`."""
    return read_label_maps(example.label)[0]


def _accuracy(scores: Tensor, labels: Tensor) -> dict[str, float]:
    """Return top-1 and top-5 of images that every process has."""
    accuracy = ClassificationAccuracy(scores.shape[1])
    accuracy.update(scores, labels)
    found = accuracy.compute()
    return {name: found[name] for name in ("top1", "top5")}


def _task_of(options: EvaluateOptions) -> EvaluationTask:
    """Return the task that the checkpoint's `architectures` names."""
    config = find_checkpoint(options.model, HubOptions(local_files_only=options.local_files_only)).config
    names = [] if config is None else BeitConfig.from_json_file(config).architectures or []
    for task, kind in _MODELS.items():
        if kind.__name__ in names and task != "features":
            return task
    if options.knn is None and options.linear_probe is None:
        raise ValueError(
            f"the task of {options.model!r} is not known: its configuration names {join_some(names) or 'no model'} "
            "(expected --task, --knn or --linear-probe)"
        )
    return "features"


def _load(options: EvaluateOptions, task: EvaluationTask) -> Any:
    """Load the model of the task, with all of its parameters.

    Raises:
        ValueError: If the checkpoint lacks parameters, which would be random.
    """
    kind = _MODELS[task]
    extra = {"add_pooling_layer": False} if task == "features" else {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="some parameters of .* were initialized", category=UserWarning)
        model, info = kind.from_pretrained(
            options.model,
            output_loading_info=True,
            attn_implementation=options.attn_implementation,
            dtype=options.dtype,
            local_files_only=options.local_files_only,
            **extra,
        )
    missing = sorted(info["missing_keys"])
    if missing:
        raise missing_parameters_error(options.model, kind.__name__, missing, "expected another task or checkpoint")
    return model


def _processor_of(options: EvaluateOptions, config: Any) -> BeitImageProcessor:
    if options.processor is not None:
        return BeitImageProcessor.from_pretrained(options.processor, local_files_only=options.local_files_only)
    found = find_processor(options.model, config, HubOptions(local_files_only=options.local_files_only))
    if found is None:
        raise unknown_preprocessing(options.model, "pass --processor")
    return found


def _class_ids(options: EvaluateOptions, source: ImageSource, config: Any) -> Tensor | None:
    """Return the checkpoint's id of each class of the images; None if they are the same.

    Raises:
        ValueError: If classes of the images are not classes of the checkpoint.
    """
    names = [config.id2label[index] for index in range(config.num_labels)]
    if source.classes is None:
        return None
    if options.classes_by_order:
        if len(source.classes) != len(names):
            raise ValueError(_difference(options.model, tuple(names), source))
        return None
    ids = {name: index for index, name in enumerate(names)}
    if not set(source.classes) <= set(ids):
        raise ValueError(
            f"{_difference(options.model, tuple(names), source)}; --classes-by-order matches sorted classes with ids"
        )
    return torch.tensor([ids[name] for name in source.classes])


def _difference(name: str | Path, classes: tuple[str, ...] | None, source: ImageSource) -> str:
    sides = [
        f"{str(side)!r} has {join_some(list(names or ['no names']), 10)}"
        for side, names in ((name, classes), (source.name, source.classes))
    ]
    return f"the classes do not fit: {sides[0]}; {sides[1]}"
