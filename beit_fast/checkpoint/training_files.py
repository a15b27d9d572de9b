"""Find the state dict in the file of a training script."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from ..utils.messages import join_choices, join_some
from .wrappers import AVERAGED, REMEDY, is_name_of_beit

WEIGHT_KEYS = (
    "model",
    "module",
    "state_dict",
    "model_state_dict",
    "model_state",
    "net",
    "network",
    "net_state_dict",
    "weights",
    "params",
    "state",
)
"""Keys of a state dict in the dictionary that a training script saves."""

_AVERAGE_EXAMPLES = ("model_ema", "ema_state_dict")
_CALLBACKS = "callbacks"  # of Lightning, by name
_AVERAGING_CALLBACK = re.compile("EMA|SWA|Averag")
# Keys of the other weights if the averages are in `"state_dict"`, by the framework that swaps them.
_SWAPPED = "state_dict"
_SWAPPED_BY_MMENGINE, _SWAPPED_BY_LIGHTNING = "ema_state_dict", "current_model_state"
_STEPS = "steps"  # a buffer of mmengine's averaged models
_MOST_LEVELS = 5

_Keys = tuple[str, ...]


class FoundWeights(NamedTuple):
    """The state dict in a file.

    Attributes:
        tensors: The tensors by name.
        entry: The keys that lead to it, joined by dots, or None if the file is the state dict.
        is_averaged: Whether the entry is that of averaged weights.
        left_aside: The other entries of the file, in the same form.
    """

    tensors: dict[str, Tensor]
    entry: str | None
    is_averaged: bool
    left_aside: tuple[str, ...]


def find_state_dict(content: Any, file: str, use_ema: bool | None) -> FoundWeights:
    """Find the state dict in the dictionary that a training script saved.

    Args:
        content: What the file contains.
        file: The name of the file, for errors.
        use_ema: Whether to read averaged weights; None reads them if there are any.

    Raises:
        ValueError: If there is no state dict, or several of them.
    """
    path: _Keys = ()
    is_averaged = False
    left_aside: list[str] = []
    while isinstance(content, Mapping):
        keys, is_average = _choose(content, file, use_ema, is_averaged)
        if not keys:
            tensors = {name: value for name, value in content.items() if isinstance(value, Tensor)}
            if not tensors:
                break
            left_aside += [_joined((*path, name)) for name in content if name not in tensors]
            return FoundWeights(tensors, _joined(path) or None, is_averaged, tuple(left_aside))
        for key in keys:
            left_aside += [_joined((*path, name)) for name in content if name != key]
            path, content = (*path, key), content[key]
        is_averaged = is_averaged or is_average
    expected = join_choices((*WEIGHT_KEYS, *_AVERAGE_EXAMPLES))
    entries = join_some(map(repr, content)) if isinstance(content, Mapping) else ""
    where = f" under {_joined(path)!r}" if path else ""
    found = f"; its entries{where} are {entries}: {REMEDY}" if entries else ""
    raise ValueError(f"{file!r} does not contain a state dict, nor does its {expected}{found}")


def script_options(content: Any) -> Mapping[str, Any]:
    """Return the options of a training script.

    timm and unilm save them under `"args"`. The dict is empty if there are none.
    """
    options = content.get("args") if isinstance(content, Mapping) else None
    if isinstance(options, argparse.Namespace):
        return vars(options)
    return options if isinstance(options, Mapping) else {}


def _choose(content: Mapping[Any, Any], file: str, use_ema: bool | None, is_averaged: bool) -> tuple[_Keys, bool]:
    """Return the keys of the weights, and whether they are averaged.

    There are no keys if `content` is itself the state dict. `is_averaged` says that it is inside averaged weights.
    """
    raw, averages = _entries(content)
    if is_averaged:
        raw, averages, use_ema = averages or raw or _inner_entries(content), [], None
    entries = averages if averages and use_ema is not False else raw
    if len(entries) > 1:
        raise ValueError(f"{file!r} contains several state dicts, under {join_some(map(_quoted, entries))}: {REMEDY}")
    if averages and not entries:
        raise ValueError(f"{file!r} contains only averaged weights, under {_quoted(averages[0])}, and use_ema=False")
    return (entries[0], entries is averages) if entries else ((), False)


def _entries(content: Mapping[Any, Any]) -> tuple[list[_Keys], list[_Keys]]:
    """Return the entries of weights, and those of averaged weights."""
    if _is_of_mmengine(content):
        return [(_SWAPPED_BY_MMENGINE,)], [(_SWAPPED,)]
    if _is_of_lightning(content):
        return [(_SWAPPED_BY_LIGHTNING,)], [(_SWAPPED,)] if _has_averaged(content) else []
    raw: list[_Keys] = [(key,) for key in WEIGHT_KEYS if _holds_tensors(content.get(key))]
    if len(raw) > 1:
        raw = [keys for keys in raw if _holds_beit(content[keys[0]])] or raw
    return raw, _averages(content)


def _averages(content: Mapping[Any, Any]) -> list[_Keys]:
    """Return the entries of averaged weights, also those of Lightning's callbacks."""
    found: list[_Keys] = [
        (key,) for key, value in content.items() if isinstance(key, str) and AVERAGED.search(key) and _holds_beit(value)
    ]
    callbacks = content.get(_CALLBACKS)
    for name, state in callbacks.items() if isinstance(callbacks, Mapping) else ():
        if not isinstance(name, str) or not _holds_beit(state):
            continue
        inner = _averages(state) or ([()] if _AVERAGING_CALLBACK.search(name) else [])
        found += [(_CALLBACKS, name, *keys) for keys in inner]
    return found


def _inner_entries(content: Mapping[Any, Any]) -> list[_Keys]:
    """Return the entries with BEiT's weights, or none for a state dict."""
    if any(isinstance(value, Tensor) and is_name_of_beit(name) for name, value in content.items()):
        return []
    return [(key,) for key, value in content.items() if isinstance(key, str) and _holds_beit(value)]


def _is_of_mmengine(content: Mapping[Any, Any]) -> bool:
    """Whether mmengine wrote the dictionary, which swaps averaged weights into `"state_dict"`."""
    keys = (_SWAPPED, _SWAPPED_BY_MMENGINE)
    return all(_holds_tensors(content.get(key)) for key in keys) and _STEPS in content[_SWAPPED_BY_MMENGINE]


def _is_of_lightning(content: Mapping[Any, Any]) -> bool:
    """Whether Lightning's `WeightAveraging` swapped averaged weights into `"state_dict"`."""
    return all(_holds_beit(content.get(key)) for key in (_SWAPPED, _SWAPPED_BY_LIGHTNING))


def _has_averaged(content: Mapping[Any, Any]) -> bool:
    """Whether averaging has started; before, Lightning's averages are the initial weights."""
    state = content.get("averaging_state")
    count = state.get("n_averaged", 1) if isinstance(state, Mapping) else 1
    return bool(count != 0)


def _holds_tensors(value: Any) -> bool:
    """Whether a dictionary contains a tensor under a string, at any depth."""
    return any(True for _ in _names(value))


def _holds_beit(value: Any) -> bool:
    return any(map(is_name_of_beit, _names(value)))


def _names(value: Any, levels: int = _MOST_LEVELS) -> Iterator[str]:
    """The names of all tensors in nested dictionaries; a dictionary may contain itself."""
    if isinstance(value, Mapping) and levels > 0:
        for name, item in value.items():
            if isinstance(name, str) and isinstance(item, Tensor):
                yield name
            elif isinstance(name, str):
                yield from _names(item, levels - 1)


def _joined(keys: tuple[Any, ...]) -> str:
    return ".".join(map(str, keys))


def _quoted(keys: _Keys) -> str:
    return repr(_joined(keys))
