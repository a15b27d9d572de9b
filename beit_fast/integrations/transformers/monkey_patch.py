"""Undoable changes to mappings and classes of another library."""

from __future__ import annotations

from collections.abc import MutableMapping
from contextlib import ExitStack
from typing import Any

_MISSING = object()


def set_item(undo: ExitStack, mapping: MutableMapping[Any, Any], key: Any, value: Any) -> None:
    """Set `mapping[key] = value` until `undo` is closed."""
    before = mapping.get(key, _MISSING)
    mapping[key] = value
    undo.callback(mapping.pop, key, None) if before is _MISSING else undo.callback(mapping.__setitem__, key, before)


def replace_attribute(undo: ExitStack, owner: type, name: str, value: Any) -> None:
    """Set `owner.name = value` until `undo` is closed; an inherited name is then inherited again."""
    before = vars(owner).get(name, _MISSING)
    setattr(owner, name, value)
    undo.callback(delattr, owner, name) if before is _MISSING else undo.callback(setattr, owner, name, before)
