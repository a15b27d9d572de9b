"""Data sets and loaders: read, transform and collate examples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from ...image_processing.image_files import error_without_path
from ...utils.messages import count_of
from ...utils.workers import ignore_interrupt
from ..seeding import VIEWS, derived_generator
from .sampler import Key
from .source import Example, ImageSource

MOST_UNREADABLE = 100
"""Unreadable images in a row after which training stops."""

_SHOWN = 3

Item = dict[str, Any]
Transform = Callable[[Example, torch.Generator], dict[str, Tensor]]


class ExampleError(ValueError):
    """An example that can be read but does not fit; the message names the image.

    A DataLoader passes on the whole traceback of a worker as the message; only its last line is kept.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.rpartition(f"{ExampleError.__name__}: ")[2].strip())


class TrainingDataset(Dataset[Item]):
    """Transformed examples by keys of epoch and index.

    An item is a function of the seed and the key, so it does not depend on the process and worker that reads it.

    Args:
        source: The images.
        transform: A function of an `Example` and a generator on the CPU, from which it takes all random numbers.
        seed: Seed of the generators.
    """

    def __init__(self, source: ImageSource, transform: Transform, seed: int) -> None:
        self.source, self.transform, self.seed = source, transform, seed

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: Key) -> Item:
        """Read and transform one example.

        An unreadable image is replaced by the next readable one, so that batches keep their size.

        Args:
            key: The epoch and the index.

        Returns:
            The fields of the transform, `key` as a list of two ints, and `unreadable`: "name: reason" of each image
            that was replaced.

        Raises:
            OSError: If `MOST_UNREADABLE` images in a row are unreadable.
        """
        epoch, index = key
        unreadable: list[str] = []
        for at in range(index, index + min(len(self.source), MOST_UNREADABLE)):
            example = read_example(self.source, at % len(self.source))
            if not isinstance(example, str):
                name = self.source.name_of(at % len(self.source))
                generator = derived_generator(self.seed, VIEWS, epoch, index)
                fields = _transformed(lambda: self.transform(example, generator), name)  # noqa: B023
                return {**fields, "key": [epoch, index], "unreadable": unreadable}
            unreadable.append(example)
        shown = "\n".join(f"- {line}" for line in unreadable[:_SHOWN])
        raise OSError(f"{self.source.name!r} has {count_of(len(unreadable), 'unreadable image')} in a row:\n{shown}")


class EvaluationDataset(Dataset[Item]):
    """Preprocessed examples by index; unreadable images are left out.

    Args:
        source: The images.
        preprocess: A function of an `Example`, without random numbers.
    """

    def __init__(self, source: ImageSource, preprocess: Callable[[Example], dict[str, Any]]) -> None:
        self.source, self.preprocess = source, preprocess

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Item:
        """Read and preprocess one example.

        Returns:
            The fields of `preprocess`, `index`, and `unreadable`, an empty list. If the image cannot be read:
            `unreadable` alone, a list of its "name: reason".
        """
        example = read_example(self.source, index)
        if isinstance(example, str):
            return {"unreadable": [example]}
        fields = _transformed(lambda: self.preprocess(example), self.source.name_of(index))
        return {**fields, "index": index, "unreadable": []}


def collate_items(items: Sequence[Item], extra: Callable[[dict[str, Any]], Mapping[str, Any]] | None = None) -> Item:
    """Collate the items of a `TrainingDataset`.

    Args:
        items: The items of one batch.
        extra: A function of the batch; its fields are added, or replace those of the batch.

    Returns:
        The fields of the transform: tensors stacked, other values in a list. `key` of the first item, for random
        numbers of a whole batch. `unreadable` of all items.

    Raises:
        RuntimeError: If tensors of a field differ in shape.
    """
    batch = _collated(items, torch.stack)
    batch["key"] = items[0]["key"]
    batch["unreadable"] = [line for item in items for line in item["unreadable"]]
    return {**batch, **extra(batch)} if extra is not None else batch


def collate_evaluation(items: Sequence[Item]) -> Item:
    """Collate the items of an `EvaluationDataset`.

    Returns:
        The fields of the readable images: tensors of one shape stacked, other values in a list. `index` is a list of
        ints, and `unreadable` the reasons of all items. A batch without a readable image has these two only.
    """
    readable = [item for item in items if not item["unreadable"]]
    batch = _collated(readable, _stack_equal) if readable else {}
    batch["index"] = [item["index"] for item in readable]
    batch["unreadable"] = [line for item in items for line in item["unreadable"]]
    return batch


def build_loader(
    dataset: Dataset[Item], sampler: Sampler[Any], collate: Callable[[list[Item]], Item], num_workers: int
) -> DataLoader[Item]:
    """Build a loader of batches.

    Its workers stay between epochs. They leave Ctrl-C to the main process.

    Args:
        dataset: A `TrainingDataset` or `EvaluationDataset`.
        sampler: Batches of its keys: an `EpochSampler` or `EvaluationSampler`.
        collate: Makes a batch of items.
        num_workers: Worker processes; 0 reads in this process.

    Returns:
        The loader. If there is a CUDA device, its batches are in pinned memory.
    """
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=collate,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        prefetch_factor=2 if num_workers else None,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=ignore_interrupt,
    )


def read_example(source: ImageSource, index: int) -> Example | str:
    """Read an example, or return "name: reason"."""
    try:
        return source.read(index)
    except MemoryError:
        raise
    except Exception as error:  # Pillow raises nearly any exception for a damaged file
        name = source.name_of(index)
        return f"{name}: {error_without_path(error, name)}"


def _transformed(transform: Callable[[], dict[str, Any]], name: str) -> dict[str, Any]:
    """Call a transform; its errors are not those of a file, and name the image."""
    try:
        return transform()
    except ValueError as error:
        raise ExampleError(f"image {name!r}: {error}") from error
    except Exception as error:
        error.add_note(f"in the transform of image {name!r}")
        raise


def _collated(items: Sequence[Item], stack: Callable[[list[Tensor]], Any]) -> Item:
    """Collect the values of each field in a list; `stack` is called on tensors."""
    batch: Item = {}
    for name in items[0]:
        values = [item[name] for item in items]
        batch[name] = stack(values) if all(isinstance(value, Tensor) for value in values) else values
    return batch


def _stack_equal(tensors: list[Tensor]) -> Tensor | list[Tensor]:
    """Stack tensors of one shape; return others unchanged."""
    return torch.stack(tensors) if len({tensor.shape for tensor in tensors}) == 1 else tensors
