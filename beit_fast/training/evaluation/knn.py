"""Weighted k-nearest-neighbor classification by cosine similarity."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ...configuration.fields import is_integer, is_number
from ...utils.messages import FieldError, describe, raise_errors
from .features import FeatureTable
from .labels import check_class_ids

_SIMILARITIES = 2**26  # in one block: 256 MiB in float32


def knn_scores(
    train: FeatureTable, features: Tensor, num_classes: int, k: int = 20, temperature: float = 0.07
) -> Tensor:
    """Score the classes of features by their nearest neighbors.

    Each of the `k` neighbors with the largest cosine similarity votes for its class with the weight
    `exp(similarity / temperature)`, as in the evaluation of DINO (arXiv 2104.14294).

    Args:
        train: Features with known classes. If there are fewer than `k`, all of them vote.
        features: `[B, E]`.
        num_classes: The number of classes, C.
        k: The number of neighbors.
        temperature: The temperature of the weights.

    Returns:
        Log of the summed weights, float32 `[B, C]`; -inf for a class without a vote.

    Raises:
        TypeError, ValueError: If arguments do not fit; the error lists all of them.
    """
    errors = []
    if not (is_integer(k) and k >= 1):
        errors.append(FieldError(f"{describe('k', k)} (expected a positive int)", not is_integer(k)))
    if not (is_number(temperature) and 0 < temperature < math.inf):
        is_type = is_number(temperature)
        errors.append(FieldError(f"{describe('temperature', temperature)} (expected a positive number)", not is_type))
    if len(train.features) == 0:
        errors.append(FieldError("there are no training features (expected at least one)"))
    raise_errors("knn_scores", errors)
    check_class_ids("training labels", train.labels, num_classes)
    known = F.normalize(train.features.float(), dim=1)  # [n, E]
    rows = max(1, _SIMILARITIES // len(known))
    blocks = F.normalize(features.float(), dim=1).split(rows)
    scores = [_votes(block @ known.t(), train.labels.long(), num_classes, k, temperature) for block in blocks]
    return torch.cat([torch.zeros(0, num_classes), *scores])


def _votes(similarity: Tensor, labels: Tensor, num_classes: int, k: int, temperature: float) -> Tensor:
    """Sum the weights of the nearest neighbors: `[b, n]` to `[b, C]`."""
    nearest, index = similarity.topk(min(k, similarity.shape[1]), dim=1)
    exponents = nearest / temperature
    largest = exponents[:, :1]  # the weights of small temperatures would overflow
    weights = torch.zeros(len(similarity), num_classes)
    weights.scatter_add_(1, labels[index], (exponents - largest).exp())
    return weights.log() + largest
