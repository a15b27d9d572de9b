"""Linear probe: multinomial logistic regression on frozen features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from ..seeding import SAMPLES, derived_generator
from .features import FeatureTable
from .labels import check_class_ids

STRENGTHS = tuple(10.0**power for power in range(0, -7, -1))
"""L2 strengths to choose from, from strong to weak."""

_FOLDS = 5  # one image of 5 in each class chooses the strength
_STEPS = 500


@dataclass(frozen=True)
class LinearProbe:
    """A linear classifier of standardized features.

    Attributes:
        mean, scale: Mean and standard deviation of the training features `[E]`; 1 for a constant feature.
        weight: Float64 `[E, C]`.
        bias: Float64 `[C]`.
        strength: The L2 strength that was chosen.
    """

    mean: Tensor
    scale: Tensor
    weight: Tensor
    bias: Tensor
    strength: float

    @classmethod
    def fit(cls, train: FeatureTable, num_classes: int, strengths: Sequence[float] = STRENGTHS, seed: int = 0) -> Self:
        """Fit a probe in float64.

        It minimizes the mean cross-entropy plus `strength / 2` times the squared weights, without the bias, by torch's
        LBFGS. If there are several strengths, a fifth of the images of each class is held out. The strength with the
        highest accuracy on them is chosen, and of equal ones that with the lowest cross-entropy. The probe is then
        fitted to all images.

        Args:
            train: Features with known classes.
            num_classes: The number of classes, C.
            strengths: L2 strengths to choose from.
            seed: Seed of the draw of held-out images.

        Raises:
            TypeError, ValueError: If labels are not classes, there are no features or strengths, or a strength has to
                be chosen and no class has two images.
        """
        if len(train.features) == 0 or len(strengths) == 0:
            raise ValueError(
                f"a linear probe of {len(train.features)} features and {len(strengths)} strengths cannot be fitted "
                "(expected at least one of each)"
            )
        check_class_ids("training labels", train.labels, num_classes)
        features, labels = train.features.double(), train.labels.long()
        mean, scale = features.mean(0), features.std(0, correction=0)
        scale = torch.where(scale > 0, scale, 1.0)
        standardized = (features - mean) / scale
        strength = strengths[0]
        if len(strengths) > 1:
            strength = _choose(standardized, labels, num_classes, strengths, seed)
        weight, bias = _minimize(standardized, labels, strength, _zeros(features.shape[1], num_classes))
        return cls(mean, scale, weight, bias, strength)

    def logits(self, features: Tensor) -> Tensor:
        """Compute the logits `[B, C]`, float64, of features `[B, E]`."""
        return (features.double() - self.mean) / self.scale @ self.weight + self.bias


def _zeros(size: int, num_classes: int) -> tuple[Tensor, Tensor]:
    return torch.zeros(size, num_classes, dtype=torch.float64), torch.zeros(num_classes, dtype=torch.float64)


def held_out(labels: Tensor, seed: int) -> Tensor:
    """Draw a fifth of the images of each class: a mask `[n]`.

    If no class has 5 images, the fraction is larger.

    Raises:
        ValueError: If no class has two images.
    """
    most = int(labels.bincount().max())
    if most < 2:
        raise ValueError("the L2 strength cannot be chosen: no class has two images (expected one with at least 2)")
    order = torch.randperm(len(labels), generator=derived_generator(seed, SAMPLES))
    order = order[labels[order].argsort(stable=True)]
    ordered = labels[order]
    position = torch.arange(len(labels)) - torch.searchsorted(ordered, ordered)  # within the class
    folds = min(_FOLDS, most)
    mask = torch.zeros(len(labels), dtype=torch.bool)
    mask[order] = position % folds == folds - 1
    return mask


def _choose(features: Tensor, labels: Tensor, num_classes: int, strengths: Sequence[float], seed: int) -> float:
    """Return the best strength on held-out images."""
    is_held_out = held_out(labels, seed)
    wanted = labels[is_held_out]
    parameters = _zeros(features.shape[1], num_classes)
    found = []
    for strength in sorted(strengths, reverse=True):  # each fit starts from the one before
        parameters = _minimize(features[~is_held_out], labels[~is_held_out], strength, parameters)
        logits = features[is_held_out] @ parameters[0] + parameters[1]
        hits = int((logits.argmax(1) == wanted).sum())
        found.append((hits, -F.cross_entropy(logits, wanted).item(), strength))
    return max(found)[2]


def _minimize(features: Tensor, labels: Tensor, strength: float, start: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the weight `[E, C]` and the bias `[C]` at the minimum."""
    with torch.enable_grad():
        weight, bias = (tensor.clone().requires_grad_() for tensor in start)
        optimizer = torch.optim.LBFGS(
            [weight, bias],
            max_iter=_STEPS,
            tolerance_grad=1e-8,
            tolerance_change=1e-13,
            line_search_fn="strong_wolfe",
        )

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(features @ weight + bias, labels) + 0.5 * strength * weight.square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
    return weight.detach(), bias.detach()
