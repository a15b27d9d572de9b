"""Evaluation during fine-tuning: accuracies, or intersection over union."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ...image_processing.processor import BeitImageProcessor
from ..data.dataset import EvaluationDataset, build_loader, collate_evaluation
from ..data.sampler import EvaluationSampler
from ..data.source import Example, ImageSource
from ..engine.processes import Processes
from ..evaluation import ClassificationAccuracy, SegmentationAccuracy
from ..evaluation.processes import sum_over_processes
from .finetune_model import FinetunedModel
from .finetune_options import FinetuneOptions

_CLASSIFICATION = ("top1", "top5")
_SEGMENTATION = ("mean_iou", "mean_accuracy", "pixel_accuracy")


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
        self.options, self.processor, self.processes = options, processor, processes
        self.is_segmentation = labels_of is not None
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
        images, pixels = ClassificationAccuracy(classes), SegmentationAccuracy(classes, self.options.ignore_index)
        unreadable = torch.zeros((), dtype=torch.int64)
        for batch in self._equal_batches():
            unreadable += len(batch["unreadable"])
            outputs = self._outputs(model, batch)
            if batch["index"] and self.is_segmentation:
                pixels.update(self._predictions(outputs, batch["labels"]), batch["labels"])
            elif batch["index"]:
                images.update(outputs["logits"], batch["labels"])
        found = (pixels if self.is_segmentation else images).compute()
        count = int(sum_over_processes(unreadable))
        scores = {name: found[name] for name in (_SEGMENTATION if self.is_segmentation else _CLASSIFICATION)}
        return scores | ({"unreadable_images": count} if count else {})

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

    def _outputs(self, model: FinetunedModel, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Return `logits` in float32; a batch without images has those of one black image."""
        device = self.processes.device
        pixels = batch.get("pixel_values")
        if pixels is None:
            pixels = torch.zeros(1, 3, *model.config.image_height_width)
        with torch.autocast(device.type, torch.bfloat16, self.options.precision == "bfloat16"):
            return {"logits": model(pixels.to(device, non_blocking=True)).logits.float()}

    def _predictions(self, outputs: dict[str, Tensor], labels: Sequence[Tensor]) -> list[Tensor]:
        """Return the predicted class ids at the size of each annotation."""
        sizes = [tuple(annotation.shape) for annotation in labels]
        return self.processor.post_process_semantic_segmentation(outputs, sizes)


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
