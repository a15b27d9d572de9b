"""Evaluation during fine-tuning: accuracies, or intersection over union."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ...image_processing.processor import BeitImageProcessor
from ..data.dataset import EvaluationDataset, build_loader, collate_evaluation
from ..data.sampler import EvaluationSampler
from ..data.source import Example, ImageSource
from ..engine.processes import Processes
from .finetune_model import FinetunedModel
from .finetune_options import FinetuneOptions

_TOP = 5


class Evaluator:
    """Evaluate a model on every image once, shared among the processes.

    Args:
        options: The options of fine-tuning.
        source: The images.
        processor: Preprocesses them.
        labels_of: Segmentation: reads the class ids of an annotation. None: class ids of images.
        processes: The processes of the run.
    """

    def __init__(
        self,
        options: FinetuneOptions,
        source: ImageSource,
        processor: BeitImageProcessor,
        labels_of: Callable[[Example], Tensor] | None,
        processes: Processes,
    ) -> None:
        self.options, self.processes, self.is_segmentation = options, processes, labels_of is not None
        count, size = processes.count, options.batch_size
        dataset = EvaluationDataset(source, Preprocess(processor, labels_of))
        sampler = EvaluationSampler(len(source), size, num_processes=count, process_index=processes.rank)
        self.batches = math.ceil(math.ceil(len(source) / count) / size)  # of the largest share
        self.loader = build_loader(dataset, sampler, collate_evaluation, options.num_workers)

    @torch.no_grad()
    def __call__(self, model: FinetunedModel) -> dict[str, float]:
        """Return `top1` and `top5`, or `mean_iou`, `mean_accuracy` and `pixel_accuracy`, as fractions.

        `unreadable_images` counts images that were left out, if there are any.
        """
        self._share_buffers(model)
        classes = model.config.num_labels
        shape = (classes, classes) if self.is_segmentation else (2,)
        sums = torch.zeros(shape, dtype=torch.float64)
        totals = torch.zeros(2, dtype=torch.float64)  # images, unreadable ones
        for batch in self._equal_batches():
            totals += torch.tensor([len(batch["index"]), len(batch["unreadable"])])
            logits = self._logits(model, batch)
            if batch["index"]:
                sums += self._confusions(logits, batch) if self.is_segmentation else _hits(logits, batch["labels"])
        sums, totals = self._total(sums), self._total(totals)
        found = _segmentation_scores(sums) if self.is_segmentation else _accuracies(sums, totals[0])
        return found | ({"unreadable_images": totals[1].item()} if totals[1] else {})

    def _share_buffers(self, model: FinetunedModel) -> None:
        """Copy statistics of batch norms from the process that saves."""
        if self.processes.count > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, src=0)

    def _equal_batches(self) -> Iterator[dict[str, Any]]:
        """Yield batches; the last ones may be empty, so that all processes call a sharded model equally often."""
        batches = iter(self.loader)
        for _ in range(self.batches):
            yield next(batches, {"index": [], "unreadable": []})

    def _logits(self, model: FinetunedModel, batch: dict[str, Any]) -> Tensor:
        device = self.processes.device
        pixels = batch.get("pixel_values")
        if pixels is None:
            pixels = torch.zeros(1, 3, *model.config.image_height_width)
        with torch.autocast(device.type, torch.bfloat16, self.options.precision == "bfloat16"):
            return model(pixels.to(device, non_blocking=True)).logits.float()

    def _confusions(self, logits: Tensor, batch: dict[str, Any]) -> Tensor:
        """Count pixels by class and prediction, `[classes, classes]`.

        Logits are resized to each annotation.
        """
        classes = logits.shape[1]
        confusion = torch.zeros(classes * classes, dtype=torch.int64)
        for scores, labels in zip(logits, batch["labels"], strict=True):
            scores = F.interpolate(scores[None], size=labels.shape, mode="bilinear", align_corners=False)
            predicted = scores[0].argmax(0).cpu()
            counted = labels != self.options.ignore_index
            pairs = labels[counted] * classes + predicted[counted]
            confusion += torch.bincount(pairs, minlength=classes * classes)
        return confusion.view(classes, classes).double()

    def _total(self, values: Tensor) -> Tensor:
        return (self.processes.mean(values) * self.processes.count).round()


class Preprocess:
    """Preprocess an example as the saved image processor does.

    Args:
        processor: The image processor.
        labels_of: Segmentation: reads the class ids of an annotation.
    """

    def __init__(self, processor: BeitImageProcessor, labels_of: Callable[[Example], Tensor] | None) -> None:
        self.processor, self.labels_of = processor, labels_of

    def __call__(self, example: Example) -> dict[str, Any]:
        pixels = self.processor(example.image, return_tensors="pt").pixel_values[0]
        labels = torch.tensor(example.label) if self.labels_of is None else self.labels_of(example)
        return {"pixel_values": pixels, "labels": labels}


def _hits(logits: Tensor, labels: Tensor) -> Tensor:
    """Count hits of the first class and of the first five."""
    first = logits.topk(min(_TOP, logits.shape[1])).indices.cpu()  # [B, 5]
    is_hit = first == labels[:, None]
    return torch.stack([is_hit[:, 0].sum(), is_hit.any(1).sum()]).double()


def _accuracies(hits: Tensor, images: Tensor) -> dict[str, float]:
    top1, top5 = (hits / images).tolist()
    return {"top1": top1, "top5": top5}


def _segmentation_scores(confusion: Tensor) -> dict[str, float]:
    """Return means over the classes, and the accuracy of all pixels.

    Classes that do not occur are left out.
    """
    hits, labeled, predicted = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
    union = labeled + predicted - hits
    return {
        "mean_iou": (hits / union)[union > 0].mean().item(),
        "mean_accuracy": (hits / labeled)[labeled > 0].mean().item(),
        "pixel_accuracy": (hits.sum() / confusion.sum()).item(),
    }
