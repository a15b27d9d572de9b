"""What a recipe gives to the training loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from torch import Tensor, nn
from torch.utils.data import Dataset

from ...image_processing.processor import BeitImageProcessor

Batch = dict[str, Any]


class Recipe(Protocol):
    """A model, its data and its loss.

    Attributes:
        model: The model on the CPU or on the device, with float32 weights.
        processor: The image processor that is saved beside the model.
        dataset: The images, by keys (epoch, index).
        dataset_groups: Rows of each block of the data that is read together, or None.
        collate: Makes a batch of items; it runs in the workers. The batch has `unreadable`, a list of strings.
        has_unused_parameters: Whether a forward leaves parameters unused, which DistributedDataParallel asks for.
        settings: The recipe's own settings that must not differ when a run is resumed, of JSON's types.
    """

    model: Any
    processor: BeitImageProcessor
    dataset_groups: tuple[int, ...] | None
    has_unused_parameters: bool

    @property
    def dataset(self) -> Dataset[Any]: ...

    @property
    def collate(self) -> Callable[[list[Any]], Batch]: ...

    @property
    def settings(self) -> Mapping[str, Any]: ...

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the optimizer's groups, each with its `lr` and `weight_decay`.

        It is called once `model` is wrapped, because FSDP2 replaces parameters.
        """
        ...

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of a batch and numbers for the log.

        Args:
            model: The model as it is wrapped for several processes.
            batch: The tensors of the collate function, on the device.
        """
        ...

    def evaluate(self) -> dict[str, float]:
        """Evaluate `model`, in all processes; an empty result if there is nothing to evaluate."""
        ...
