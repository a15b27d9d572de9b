"""What the logits of a classifier mean: probabilities, or the values of a regression."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class ClassScore(NamedTuple):
    """A class of an image and its score.

    Attributes:
        label: The name of the class in `config.id2label`.
        id: The index of the class in the logits.
        score: A probability, or the value of a regression.
    """

    label: str
    id: int
    score: float


def problem_type_of(config: Any) -> str:
    """Return `config.problem_type`, or for None what the number of labels says.

    One label is a regression, as in the loss; more labels exclude each other.
    """
    if config.problem_type is not None:
        return config.problem_type
    return "regression" if config.num_labels == 1 else "single_label_classification"


def class_scores(logits: Tensor, problem_type: str) -> Tensor:
    """Convert logits `[..., num_labels]` of any floating-point dtype to float32 scores.

    Args:
        logits: The outputs of a classifier.
        problem_type: `"single_label_classification"` (softmax), `"multi_label_classification"` (sigmoid) or
            `"regression"` (the values are returned as they are).

    Returns:
        Probabilities or values, float32 `[..., num_labels]`.
    """
    logits = logits.float()
    if problem_type == "regression":
        return logits
    return logits.sigmoid() if problem_type == "multi_label_classification" else logits.softmax(-1)


def top_classes(logits: Tensor, config: Any, count: int) -> list[ClassScore]:
    """List the `count` most probable classes of an image, most probable first.

    Args:
        logits: The outputs of a classifier for one image, floating point `[num_labels]`.
        config: The configuration of the classifier. `problem_type_of(config)` decides the scores.
        count: The number of classes. A regression returns all of its values, in the order of the labels.
    """
    problem_type = problem_type_of(config)
    scores = class_scores(logits, problem_type)
    ids = torch.arange(scores.numel()) if problem_type == "regression" else scores.topk(min(count, len(scores))).indices
    return [ClassScore(config.id2label.get(index, str(index)), index, scores[index].item()) for index in ids.tolist()]
