"""Random streams that differ between the workers of a DataLoader."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.utils.data import get_worker_info

from ..configuration.fields import is_integer
from ..utils.messages import FieldError, describe

MASKS, VIEWS, ORDER, DROPOUT, MIXUP, INITIALIZATION, SAMPLES = 1, 2, 3, 4, 5, 6, 7
"""Purposes: streams of one seed and two purposes are independent."""


def derived_seed(*entropy: int) -> int:
    """Return a 63-bit seed from non-negative ints.

    Other ints give an independent stream.
    """
    # NumPy pads entropy with zeros, so the count keeps (1, 2) and (1, 2, 0) apart.
    return int(np.random.SeedSequence((len(entropy), *entropy)).generate_state(1, np.uint64)[0] >> np.uint64(1))


def derived_generator(*entropy: int) -> torch.Generator:
    """Return a CPU generator whose stream is a function of non-negative ints.

    The training commands draw everything from such generators of (seed, purpose, epoch, index or step). A run then has
    no random state to save, and its numbers do not depend on the number of workers.
    """
    return torch.Generator().manual_seed(derived_seed(*entropy))


class RandomStream:
    """The random numbers of one object in one process.

    Without a seed these are those of torch's default generator, which a DataLoader seeds in each worker. With a seed,
    each worker has a stream of the seed and of its own `seed` in `get_worker_info()`, which changes in each epoch.
    """

    def __init__(self, seed: int | None, purpose: int) -> None:
        self.seed, self.purpose = seed, purpose
        self._worker_seed: int | None = None
        self._generator: torch.Generator | None = None

    def generator(self) -> torch.Generator | None:
        """Return the generator of this process; None is torch's default one."""
        if self.seed is None:
            return None
        worker = get_worker_info()
        worker_seed = None if worker is None else worker.seed
        if self._generator is None or worker_seed != self._worker_seed:
            entropy = [self.purpose, self.seed, *([] if worker_seed is None else [worker_seed])]
            state = np.random.SeedSequence(entropy).generate_state(1, np.uint64)
            self._generator = torch.Generator().manual_seed(int(state[0]))
            self._worker_seed = worker_seed
        return self._generator

    def __getstate__(self) -> dict[str, Any]:
        generator = self._generator
        return self.__dict__ | {"_generator": None if generator is None else generator.get_state()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if state["_generator"] is not None:
            self._generator = torch.Generator()
            self._generator.set_state(state["_generator"])


def seed_errors(seed: Any) -> list[FieldError]:
    """Return why a seed is neither None nor an int from 0."""
    if seed is None or (is_integer(seed) and seed >= 0):
        return []
    return [FieldError(f"{describe('seed', seed)} (expected an int from 0, or None)", not is_integer(seed))]
