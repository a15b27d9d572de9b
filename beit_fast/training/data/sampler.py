"""The order of images in training: a function of the seed and the epoch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, islice
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils.data import Sampler

from ...configuration.fields import is_integer
from ...utils.messages import FieldError, describe, raise_errors
from ..seeding import ORDER, derived_generator, seed_errors

Key: TypeAlias = tuple[int, int]
"""Epoch and index of an image in training."""

WINDOW = 4
"""Groups whose images are mixed; a worker keeps this number of groups."""


class EpochSampler(Sampler[list[Key]]):
    """Batches of keys in an order of seed and epoch.

    The order depends on nothing else. The images of an epoch are cut into global batches of
    `batch_size * num_processes`. Each process has one contiguous part of every global batch. So one process with
    batches of 8 and two with batches of 4 see the same images in each step. The last global batch is dropped if it is
    incomplete.

    Pass it as `batch_sampler`, and do not let accelerate prepare the loader: the batches are those of the process
    already. An iteration yields one epoch. The next iteration repeats it unless `set_position` is called.

    Args:
        length: Number of images.
        batch_size: Images in a batch of one process.
        seed: Seed of the order.
        num_processes, process_index: The processes that share a global batch, and which one this is.
        groups: Sizes of blocks that are cheap to read together; they add up to `length`. Groups are shuffled, then
            the images of every `WINDOW` groups. None shuffles all images.
        shuffle: If False, the order is that of the indices.

    Raises:
        TypeError, ValueError: If arguments do not fit, or there are fewer images than a global batch has.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        *,
        seed: int,
        num_processes: int = 1,
        process_index: int = 0,
        groups: Sequence[int] | None = None,
        shuffle: bool = True,
    ) -> None:
        _check(length, batch_size, seed, num_processes, process_index, groups)
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.num_processes, self.process_index = num_processes, process_index
        self.groups = None if groups is None else tuple(groups)
        self.shuffle = shuffle
        self.epoch, self.batch = 0, 0

    @property
    def steps_per_epoch(self) -> int:
        """Number of global batches of one epoch."""
        return self.length // (self.batch_size * self.num_processes)

    def set_position(self, epoch: int, batch: int = 0) -> None:
        """Start the next iteration at a batch of an epoch.

        Args:
            epoch: The epoch, from 0.
            batch: The batch, from 0 to `steps_per_epoch`.

        Raises:
            TypeError, ValueError: If there is no such position.
        """
        errors = []
        if not is_integer(epoch) or epoch < 0:
            errors.append(FieldError(f"{describe('epoch', epoch)} (expected an int from 0)", not is_integer(epoch)))
        if not is_integer(batch) or not 0 <= batch <= self.steps_per_epoch:
            expected = f"an int from 0 to {self.steps_per_epoch}, the batches of an epoch"
            errors.append(FieldError(f"{describe('batch', batch)} (expected {expected})", not is_integer(batch)))
        raise_errors("the position", errors)
        self.epoch, self.batch = epoch, batch

    def __len__(self) -> int:
        """Count the batches of the next iteration."""
        return self.steps_per_epoch - self.batch

    def __iter__(self) -> Iterator[list[Key]]:
        epoch, size = self.epoch, self.batch_size * self.num_processes
        indices = self._order(epoch, start=self.batch * size)
        for _ in range(len(self)):
            part = list(islice(indices, size))[self.process_index * self.batch_size :][: self.batch_size]
            yield [(epoch, index) for index in part]

    def _order(self, epoch: int, start: int) -> Iterator[int]:
        """Yield the indices of an epoch from the position `start` on."""
        if not self.shuffle:
            yield from range(start, self.length)
        elif self.groups is None:
            yield from _ints(_permutation(self.length, self.seed, epoch)[start:])
        else:
            yield from self._order_of_groups(self.groups, epoch, start)

    def _order_of_groups(self, groups: Sequence[int], epoch: int, start: int) -> Iterator[int]:
        """Yield indices window by window; the images of a window are shuffled."""
        first_rows = [0, *accumulate(groups)]
        shuffled = _permutation(len(groups), self.seed, epoch).tolist()
        for number, at in enumerate(range(0, len(groups), WINDOW)):
            window = shuffled[at : at + WINDOW]
            rows = sum(groups[group] for group in window)
            if start < rows:
                indices = torch.cat([torch.arange(first_rows[group], first_rows[group + 1]) for group in window])
                yield from _ints(indices[_permutation(rows, self.seed, epoch, number)[start:]])
            start = max(start - rows, 0)


def _permutation(length: int, seed: int, *entropy: int) -> Tensor:
    """Draw a permutation int64 `[length]`."""
    return torch.randperm(length, generator=derived_generator(seed, ORDER, *entropy))


def _ints(indices: Tensor, block: int = 65536) -> Iterator[int]:
    """Yield the values of int64 `[n]`; only a block of them are Python objects."""
    for part in indices.split(block):
        yield from part.tolist()


class EvaluationSampler(Sampler[list[int]]):
    """Batches of indices in order: each image once, in one process.

    Each process has a contiguous share. Shares differ by at most one image, so a process may have one batch less.

    Args:
        length: Number of images.
        batch_size: Images in a batch; the last one may be smaller.
        num_processes, process_index: The processes that share the images, and which one this is.

    Raises:
        TypeError, ValueError: If arguments do not fit.
    """

    def __init__(self, length: int, batch_size: int, *, num_processes: int = 1, process_index: int = 0) -> None:
        raise_errors(type(self).__name__, _share_errors(length, batch_size, num_processes, process_index))
        bounds = [length * number // num_processes for number in (process_index, process_index + 1)]
        self.share, self.batch_size = range(*bounds), batch_size

    def __len__(self) -> int:
        """Count the batches of this process."""
        return -(-len(self.share) // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        for start in range(0, len(self.share), self.batch_size):
            yield list(self.share[start : start + self.batch_size])


def _check(
    length: Any, batch_size: Any, seed: Any, num_processes: Any, process_index: Any, groups: Sequence[int] | None
) -> None:
    """Raise one error if the arguments of an `EpochSampler` do not fit."""
    errors = _share_errors(length, batch_size, num_processes, process_index)
    errors += [FieldError("seed=None (expected an int from 0)", True)] if seed is None else seed_errors(seed)
    if not errors:
        if length < (size := batch_size * num_processes):
            batch = f"{batch_size} in each of {num_processes} processes" if num_processes > 1 else "the batch size"
            errors.append(FieldError(f"{length} images are fewer than a global batch of {size} images ({batch})"))
        if groups is not None and sum(groups) != length:
            errors.append(FieldError(f"groups have {sum(groups)} images (expected {length}, the length)"))
    raise_errors("EpochSampler", errors)


def _share_errors(length: Any, batch_size: Any, num_processes: Any, process_index: Any) -> list[FieldError]:
    least = {"length": (length, 0), "batch_size": (batch_size, 1), "num_processes": (num_processes, 1)}
    errors = [
        FieldError(f"{describe(name, value)} (expected an int from {low})", not is_integer(value))
        for name, (value, low) in least.items()
        if not is_integer(value) or value < low
    ]
    if errors:
        return errors
    if not is_integer(process_index) or not 0 <= process_index < num_processes:
        expected = f"an int from 0 to {num_processes - 1}"
        errors.append(
            FieldError(
                f"{describe('process_index', process_index)} (expected {expected})", not is_integer(process_index)
            )
        )
    return errors
