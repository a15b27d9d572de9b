"""Checks of the inputs of a model: pixels and masks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..layers.embeddings import check_pixel_shape
from ..utils.tensors import layout_reason

_PROCESS_IMAGES = "convert images with a BeitImageProcessor, as in model(**processor(images, return_tensors='pt'))"


def check_inputs(
    pixel_values: Any, channels: int, bool_masked_pos: Any = None, attention_mask: Any = None, labels: Any = None
) -> None:
    """Check the types of a forward's arguments.

    The shape of the pixels is checked too.

    Raises:
        TypeError: If some are not tensors; the error lists all of them.
        ValueError: If some are not dense, or the pixels are not `[B, channels, H, W]`.
    """
    optional = {"bool_masked_pos": bool_masked_pos, "attention_mask": attention_mask, "labels": labels}
    given = {"pixel_values": pixel_values} | {name: value for name, value in optional.items() if value is not None}
    errors = [
        f"{name} is of type {type(value).__name__}" for name, value in given.items() if not isinstance(value, Tensor)
    ]
    if errors:
        hint = "" if isinstance(pixel_values, Tensor) else f"; {_hint(pixel_values)}"
        raise TypeError(f"{', '.join(errors)} (expected a torch.Tensor){hint}")
    layouts = {name: layout_reason(value) for name, value in given.items()}
    if any(layouts.values()):
        raise ValueError("; ".join(f"{name} {reason}" for name, reason in layouts.items() if reason))
    check_pixel_shape(pixel_values, channels)


def _hint(pixel_values: Any) -> str:
    if isinstance(pixel_values, Mapping) and "pixel_values" in pixel_values:
        return "pass the output of an image processor as keyword arguments, model(**inputs)"
    return _PROCESS_IMAGES


def key_mask_of(attention_mask: Tensor | None, tokens: Tensor) -> Tensor | None:
    """Convert an `attention_mask` `[B, N]` (non-zero: attend) to bool.

    Raises:
        ValueError: If the shape differs.
    """
    if attention_mask is None:
        return None
    if attention_mask.shape != tokens.shape[:2]:
        raise ValueError(
            f"attention_mask must be [batch, tokens] = {list(tokens.shape[:2])} with CLS first and non-zero where a "
            f"token may be attended to, not {list(attention_mask.shape)}"
        )
    return attention_mask.bool()
