"""Learning rate and weight decay of each step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch.optim import Optimizer

from .settings import EngineSettings


class Plan(NamedTuple):
    """How many steps a run has.

    Attributes:
        steps_per_epoch: Optimizer steps of one epoch.
        epochs: The epochs of the schedule.
        last_step: The step after which the run ends.
    """

    steps_per_epoch: int
    epochs: int
    last_step: int

    @property
    def scheduled_steps(self) -> int:
        """The steps of all epochs, which the schedule is made for."""
        return self.steps_per_epoch * self.epochs


class Schedule:
    """Linear warmup, then half a cosine, as in unilm's recipes.

    The rate of a parameter group is its `lr` at construction times `factor(step)`. Groups without weight decay keep
    none.

    Args:
        settings: Peak, first and last learning rate, warmup and weight decay.
        plan: The steps of the run.
        groups: The parameter groups of the optimizer.
    """

    def __init__(self, settings: EngineSettings, plan: Plan, groups: Sequence[dict[str, Any]]) -> None:
        if settings.lr is None or settings.min_lr is None:
            raise ValueError("the learning rates are None (expected the result of EngineSettings.resolved)")
        self.peak, self.least, self.first = settings.lr, settings.min_lr, min(settings.warmup_lr, settings.lr)
        self.settings, self.steps = settings, plan.scheduled_steps
        warmup = settings.warmup_steps
        if warmup is None:
            warmup = round(settings.warmup_epochs * plan.steps_per_epoch)
        self.warmup = min(warmup, self.steps)
        self.rates = [group["lr"] for group in groups]
        self.is_decayed = [group["weight_decay"] > 0 for group in groups]

    def factor(self, step: int) -> float:
        """Return the learning rate of a step as a fraction of `lr`."""
        if step < self.warmup:
            return (self.first + (self.peak - self.first) * step / max(self.warmup - 1, 1)) / self.peak
        return _cosine(self.peak, self.least, (step - self.warmup) / max(self.steps - self.warmup, 1)) / self.peak

    def weight_decay(self, step: int) -> float:
        """Return the weight decay of matrices at a step."""
        start, end = self.settings.weight_decay, self.settings.weight_decay_end
        return start if end is None else _cosine(start, end, step / self.steps)

    def apply(self, optimizer: Optimizer, step: int) -> None:
        """Set the numbers of a step in the groups of an optimizer."""
        factor, decay = self.factor(step), self.weight_decay(step)
        for group, rate, is_decayed in zip(optimizer.param_groups, self.rates, self.is_decayed, strict=True):
            group["lr"] = rate * factor
            group["weight_decay"] = decay if is_decayed else 0.0


def _cosine(start: float, end: float, progress: float) -> float:
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * progress))
