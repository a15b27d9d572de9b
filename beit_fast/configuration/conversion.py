"""Convert configurations of other classes to `BeitConfig`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..utils.messages import describe
from .beit_config import BeitConfig


def as_beit_config(config: Any, model_type: str | None = None, owner: str = "BeitModel") -> BeitConfig:
    """Return a `BeitConfig` as it is, and convert a configuration of Transformers.

    A converted one keeps its attention implementation, except `"sdpa"`: Transformers writes that into the
    configuration of a model if none was requested. Pass `attn_implementation="sdpa"` to request it.

    Args:
        config: A `BeitConfig`, or a configuration with `to_dict()`.
        model_type: Taken instead of that of a configuration of Transformers.
        owner: The class of the model that is built, for the error.

    Raises:
        TypeError: If `config` is of another type.
        ValueError: If a field or the implementation is not supported.
    """
    if isinstance(config, BeitConfig):
        return config
    if isinstance(config, type) or not hasattr(config, "to_dict"):
        expected = f"a BeitConfig, or Transformers' configuration of BEiT; {_right_call(config, owner)}"
        raise TypeError(f"{describe('config', config)} is of type {type(config).__name__} (expected {expected})")
    values = config.to_dict() | ({} if model_type is None else {"model_type": model_type})
    requested = getattr(config, "_attn_implementation", None)
    return BeitConfig.from_dict(values, attn_implementation=None if requested == "sdpa" else requested)


def _right_call(config: Any, owner: str) -> str:
    """Say how to build a model of `owner` from what was passed."""
    if isinstance(config, Mapping):
        return f"for a dict of fields, call {owner}(BeitConfig.from_dict(fields))"
    if isinstance(config, type):
        return f"for the defaults, call {owner}(BeitConfig())"
    name = repr(config) if isinstance(config, str) else "name"
    return f"to load a checkpoint, call {owner}.from_pretrained({name})"
