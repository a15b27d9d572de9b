"""Top-1 and top-5 accuracy."""

from __future__ import annotations

import torch
from torch import Tensor

from .labels import check_class_ids
from .processes import sum_over_processes

MOST_RANKED = 5


class ClassificationAccuracy:
    """Top-1 and top-5 accuracy of images.

    An image counts if its class is among the 1 or 5 highest scores. Of equal scores the lowest class id ranks first,
    as in `argmax`. With fewer than 5 classes, top-5 counts all images. An image is wrong if a score is NaN, or the
    score of its class is infinite.

    Args:
        num_classes: The number of classes, C.
    """

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self._counts = torch.zeros(3, dtype=torch.int64)  # images, top-1, top-5

    def update(self, scores: Tensor, labels: Tensor) -> None:
        """Count a batch.

        Args:
            scores: Logits or any other scores `[B, C]`, higher is better.
            labels: Class ids `[B]`.

        Raises:
            TypeError, ValueError: If shapes or class ids do not fit.
        """
        labels = labels.to(scores.device)
        if scores.shape != (len(labels), self.num_classes) or labels.ndim != 1:
            raise ValueError(
                f"scores have the shape {list(scores.shape)} and labels {list(labels.shape)} (expected "
                f"[B, {self.num_classes}] and [B])"
            )
        check_class_ids("labels", labels, self.num_classes)
        ids = labels.long()[:, None]
        own = scores.gather(1, ids)  # [B, 1]
        is_before = (scores > own) | ((scores == own) & (torch.arange(self.num_classes, device=ids.device) < ids))
        rank = is_before.sum(1)  # [B]
        is_valid = own[:, 0].isfinite() & ~scores.isnan().any(1)
        counts = [torch.tensor(len(ids)), *((is_valid & (rank < k)).sum().cpu() for k in (1, MOST_RANKED))]
        self._counts += torch.stack(counts)

    def compute(self) -> dict[str, float]:
        """Return the accuracies of all processes.

        Every process has to call it.

        Returns:
            `top1` and `top5` in 0..1, and the number of `images`.

        Raises:
            ValueError: If no image was counted.
        """
        images, top1, top5 = sum_over_processes(self._counts).tolist()
        if images == 0:
            raise ValueError("the accuracy of no images is not defined (expected at least one readable image)")
        return {"top1": top1 / images, "top5": top5 / images, "images": images}
