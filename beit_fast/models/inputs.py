"""Checks of what a user passes to a model: its configuration, pixels and masks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..configuration.beit_config import BeitConfig
from ..layers.embeddings import check_pixel_shape

_PROCESS_IMAGES = "convert images with a BeitImageProcessor, as in model(**processor(images, return_tensors='pt'))"


def check_config(config: Any, owner: str) -> None:
    """Raise TypeError if `config` is not a configuration.

    The error says how to build the model `owner`.
    """
    if isinstance(config, BeitConfig) or (callable(getattr(config, "to_dict", None)) and not isinstance(config, type)):
        return
    hint = f"such as {owner}(BeitConfig())"
    if isinstance(config, str):
        hint = f"to load a checkpoint, call {owner}.from_pretrained({config!r})"
    elif isinstance(config, Mapping):
        hint = f"for a dict of fields, call {owner}(BeitConfig.from_dict(fields))"
    given = f"the class {config.__name__}" if isinstance(config, type) else f"of type {type(config).__name__}"
    raise TypeError(f"config is {given} (expected a BeitConfig; {hint})")


def check_inputs(
    pixel_values: Any, channels: int, bool_masked_pos: Any = None, attention_mask: Any = None, labels: Any = None
) -> None:
    """Check the types of a forward's arguments.

    The shape of the pixels is checked too.

    Raises:
        TypeError: If some are not tensors; the error lists all of them.
        ValueError: If the pixels are not `[B, channels, H, W]`.
    """
    optional = {"bool_masked_pos": bool_masked_pos, "attention_mask": attention_mask, "labels": labels}
    given = {"pixel_values": pixel_values} | {name: value for name, value in optional.items() if value is not None}
    errors = [
        f"{name} is of type {type(value).__name__}" for name, value in given.items() if not isinstance(value, Tensor)
    ]
    if errors:
        hint = "" if isinstance(pixel_values, Tensor) else f"; {_hint(pixel_values)}"
        raise TypeError(f"{', '.join(errors)} (expected a torch.Tensor){hint}")
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
