"""What the logits of a classifier mean: probabilities, or the values of a regression."""

from __future__ import annotations

from typing import Any

from torch import Tensor


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
