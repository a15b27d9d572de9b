"""Check class ids against the number of classes."""

from __future__ import annotations

from torch import Tensor

from ...utils.messages import join_some


def check_class_ids(what: str, ids: Tensor, num_classes: int) -> None:
    """Check that all ids are classes.

    Args:
        what: The ids, for the error.
        ids: Integers of any shape.
        num_classes: The number of classes.

    Raises:
        TypeError: If the ids are not integers.
        ValueError: If an id is not from 0 to `num_classes - 1`; the error lists the ids.
    """
    if ids.is_floating_point() or ids.is_complex():
        raise TypeError(f"{what} have the dtype {ids.dtype} (expected integers)")
    outside = ids[(ids < 0) | (ids >= num_classes)]
    if len(outside):
        raise ValueError(f"{what} include {join_some(outside.unique().tolist())} (expected 0 to {num_classes - 1})")
