"""Mean intersection over union and accuracies of segmentation."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ...image_processing.processor import IGNORED_LABEL, reduce_labels
from .labels import check_class_ids
from .processes import sum_over_processes


class SegmentationAccuracy:
    """Count classes of pixels in a confusion matrix `[C, C]`.

    Args:
        num_classes: The number of classes, C.
        ignore_index: The annotated id that is not counted.
        do_reduce_labels: Whether 1 is subtracted from annotated ids; 0 and 255 are then not counted.
    """

    def __init__(self, num_classes: int, ignore_index: int = 255, do_reduce_labels: bool = False) -> None:
        self.num_classes, self.ignore_index, self.do_reduce_labels = num_classes, ignore_index, do_reduce_labels
        self._confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64)  # [annotated, predicted]
        self._images = torch.zeros((), dtype=torch.int64)

    def update(self, predictions: Iterable[Tensor], annotations: Iterable[Tensor]) -> None:
        """Count images.

        Args:
            predictions: The predicted class ids `[h, w]` of each image, from `post_process_semantic_segmentation` with
                the sizes of the annotations.
            annotations: The annotated ids `[h, w]` of each image, as stored.

        Raises:
            TypeError, ValueError: If sizes differ, or ids are not classes. Nothing is counted then.
        """
        confusion = torch.zeros_like(self._confusion)
        images = 0
        for predicted, annotated in zip(predictions, annotations, strict=True):
            confusion += self._confusion_of(predicted.cpu(), annotated.cpu())
            images += 1
        self._confusion += confusion
        self._images += images

    def _confusion_of(self, predicted: Tensor, annotated: Tensor) -> Tensor:
        if predicted.shape != annotated.shape:
            raise ValueError(
                f"predictions have the shape {list(predicted.shape)}, but annotations {list(annotated.shape)}; "
                "resize the logits to the annotations"
            )
        if not annotated.is_floating_point():
            annotated = annotated.long()  # 255 - 1 of uint8 stays in range
        is_counted = annotated != self.ignore_index
        if self.do_reduce_labels:
            annotated = reduce_labels(annotated)
            is_counted = (annotated != self.ignore_index) & (annotated != IGNORED_LABEL)
        annotated, predicted = annotated[is_counted], predicted[is_counted]
        check_class_ids("annotations", annotated, self.num_classes)
        check_class_ids("predictions", predicted, self.num_classes)
        pairs = annotated * self.num_classes + predicted.long()
        return torch.bincount(pairs, minlength=self.num_classes**2).view(self.num_classes, self.num_classes)

    def compute(self) -> dict[str, Any]:
        """Return the metrics of all processes.

        Every process has to call it.

        Returns:
            `mean_iou`, the mean over classes that are annotated or predicted anywhere. `mean_accuracy`, the mean over
            annotated classes. `pixel_accuracy`, of all counted pixels. `iou` and `accuracy`, lists with a number for
            each class, or None if it has none. `images` and `pixels`, the counts.

        Raises:
            ValueError: If no pixel was counted.
        """
        confusion = sum_over_processes(self._confusion).double()
        images = int(sum_over_processes(self._images))
        hits, annotated, predicted = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
        pixels = int(annotated.sum())
        if pixels == 0:
            raise ValueError("no pixel of an annotation is counted: all have an ignored id, or no image is readable")
        iou = hits / (annotated + predicted - hits)  # NaN: 0 / 0
        accuracy = hits / annotated
        return {
            "mean_iou": iou.nanmean().item(),
            "mean_accuracy": accuracy.nanmean().item(),
            "pixel_accuracy": hits.sum().item() / pixels,
            "iou": _without_nan(iou),
            "accuracy": _without_nan(accuracy),
            "images": images,
            "pixels": pixels,
        }


def _without_nan(values: Tensor) -> list[float | None]:
    return [None if value != value else value for value in values.tolist()]
