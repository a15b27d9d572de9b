"""Features of images for k-NN and linear probe."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor

from ...configuration.fields import is_integer
from ...utils.messages import FieldError, describe, join_choices, raise_errors
from .processes import rows_of_processes

Pooling: TypeAlias = Literal["patches", "cls"]


def check_pooling(pooling: Any, layer: Any, num_layers: int) -> None:
    """Check the arguments of `pooled_features`.

    Raises:
        TypeError, ValueError: If they do not fit; the error lists all reasons.
    """
    errors = []
    if pooling not in get_args(Pooling):
        errors.append(FieldError(f"{describe('pooling', pooling)} (expected {join_choices(get_args(Pooling))})"))
    if layer is not None and not (is_integer(layer) and 0 <= layer <= num_layers):
        expected = f"None, or an int from 0, the embeddings, to {num_layers}, the last block"
        errors.append(FieldError(f"{describe('layer', layer)} (expected {expected})", not is_integer(layer)))
    raise_errors("the features", errors)


def pooled_features(trunk: Any, pixels: Tensor, pooling: Pooling = "patches", layer: int | None = None) -> Tensor:
    """Compute one feature vector for each image.

    Args:
        trunk: A `BeitModel`.
        pixels: `[B, C, H, W]`.
        pooling: "patches" is the mean of the patch tokens, "cls" the CLS token.
        layer: The block whose output is taken, from 1; 0 is the embeddings. None is `last_hidden_state`: the output of
            the last block, after the final LayerNorm of a trunk that has one.

    Returns:
        Float32 `[B, E]` on the CPU.

    Raises:
        TypeError, ValueError: If `pooling` or `layer` do not fit.
    """
    check_pooling(pooling, layer, trunk.config.num_hidden_layers)
    output = trunk(pixels, output_hidden_states=layer is not None, return_dict=True)
    tokens = output.last_hidden_state if layer is None else output.hidden_states[layer]  # [B, N, E]
    return (tokens[:, 0] if pooling == "cls" else tokens[:, 1:].mean(1)).float().cpu()


class FeatureTable(NamedTuple):
    """Features of a data set.

    Attributes:
        features: Float32 `[n, E]`.
        labels: Class ids `[n]`.
    """

    features: Tensor
    labels: Tensor

    @classmethod
    def gather(
        cls, features: Sequence[Tensor], labels: Sequence[int], indices: Sequence[int], size: int
    ) -> FeatureTable:
        """Join the features of all processes in the data set's order.

        Every process has to call it, also one without images.

        Args:
            features: Batches `[B, E]` of this process.
            labels, indices: The class id and the index in the data set of each image.
            size: E.
        """
        rows = rows_of_processes(torch.cat([torch.zeros(0, size), *features]))
        ids = rows_of_processes(torch.tensor(list(zip(indices, labels, strict=True)), dtype=torch.int64).view(-1, 2))
        order = ids[:, 0].argsort()
        return cls(rows[order], ids[order, 1])
