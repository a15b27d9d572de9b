"""Random numbers of a transform: all of them come from one torch generator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias, TypeVar

import numpy as np
import torch

Draw: TypeAlias = Callable[[float, float], float]
"""A function that draws a number from `low` to `high`, without `high`."""

_Item = TypeVar("_Item")


def uniform(generator: torch.Generator | None) -> Draw:
    """Return a function that draws uniform numbers; None is torch's default generator."""

    def draw(low: float, high: float) -> float:
        return low + (high - low) * torch.rand((), dtype=torch.float64, generator=generator).item()

    return draw


def one_of(items: Sequence[_Item], draw: Draw) -> _Item:
    """Draw one of `items`, each with the same probability."""
    return items[min(int(draw(0, len(items))), len(items) - 1)]


def numpy_generator(generator: torch.Generator) -> np.random.Generator:
    """Return a NumPy generator whose seed is drawn from `generator`.

    NumPy has distributions that torch draws from its default generator only, such as the beta distribution.
    """
    seed = torch.randint(2**63 - 1, (), generator=generator).item()
    return np.random.default_rng(int(seed))
