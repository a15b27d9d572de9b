"""An exponential moving average of weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class WeightAverage:
    """Average the parameters of a model after each step: `average = decay * average + (1 - decay) * weights`.

    Args:
        model: The model; its parameters may be DTensors of FSDP2. Buffers are not averaged:
            the statistics of batch norms stay the present ones.
        decay: Share of the old average that is kept.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._parameters = dict(model.named_parameters())
        self.weights: dict[str, Tensor] = {
            name: parameter.detach().clone() for name, parameter in self._parameters.items()
        }
        self._update = get_ema_multi_avg_fn(decay)

    @torch.no_grad()
    def update(self) -> None:
        """Add the present weights."""
        current = [parameter.detach() for parameter in self._parameters.values()]
        self._update(list(self.weights.values()), current, None)

    @contextmanager
    @torch.no_grad()
    def applied(self) -> Iterator[None]:
        """Exchange the model's weights for the averages while the block runs."""
        kept = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}
        self._set(self.weights)
        try:
            yield
        finally:
            self._set(kept)

    def _set(self, weights: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(weights[name])
