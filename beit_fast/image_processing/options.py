"""Options of the image processors: defaults, rules and older names."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal, get_args

from ..configuration.fields import Rule, is_integer, to_integer
from ..utils.messages import FieldError, join_choices, raise_errors

Resampling = Literal["nearest", "lanczos", "bilinear", "bicubic", "box", "hamming"]
RESAMPLING_NAMES: tuple[Resampling, ...] = get_args(Resampling)
"""Names of filters; the index is Pillow's number."""

DataFormat = Literal["channels_first", "channels_last"]
CHANNELS_FIRST, CHANNELS_LAST = DATA_FORMATS = get_args(DataFormat)

TensorType = Literal["pt", "np"]
TENSOR_TYPES: tuple[TensorType, ...] = get_args(TensorType)

_SIZE_KEYS = (
    {"height", "width"},
    {"shortest_edge"},
    {"shortest_edge", "longest_edge"},
    {"max_height", "max_width"},
)


def _enum_value(value: Any) -> Any:
    """Convert a member of a string enumeration to its string.

    Transformers and torchvision have such enumerations.
    """
    inner = getattr(value, "value", value)
    return inner if isinstance(inner, str) else value


def _to_resample(value: Any) -> Any:
    name = _enum_value(value)
    if isinstance(name, str):
        name = name.lower().removesuffix("-exact")
        return RESAMPLING_NAMES.index(name) if name in RESAMPLING_NAMES else value
    return to_integer(value)


def _to_size(value: Any) -> Any:
    """Convert a size to a dict.

    The size is an int, a (height, width) pair or a `SizeDict` of Transformers 5.
    """
    if isinstance(value, (list, tuple)):
        return dict(zip(("height", "width"), map(to_integer, value), strict=True)) if len(value) == 2 else value
    if isinstance(value, Mapping) or hasattr(value, "keys"):
        return {key: to_integer(edge) for key, edge in dict(value).items() if edge is not None}
    edge = to_integer(value)
    return {"height": edge, "width": edge} if is_integer(edge) else value


def _is_size(value: Any) -> bool:
    has_keys = isinstance(value, dict) and set(value) in _SIZE_KEYS
    if not has_keys or not all(is_integer(edge) and edge > 0 for edge in value.values()):
        return False
    return value.get("longest_edge", math.inf) >= value.get("shortest_edge", 0)


def _is_crop_size(value: Any) -> bool:
    return _is_size(value) and set(value) == {"height", "width"}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _to_numbers(value: Any) -> Any:
    if hasattr(value, "tolist"):  # numpy and torch
        value = value.tolist()
    return list(value) if isinstance(value, Iterable) and not isinstance(value, (str, Mapping)) else value


def _are_numbers(value: Any) -> bool:
    return _is_number(value) or (isinstance(value, list) and len(value) > 0 and all(map(_is_number, value)))


def _are_positive(value: Any) -> bool:
    return min(value if isinstance(value, list) else [value]) > 0


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


_FLAG = Rule("True or False", _is_flag)
_OPTIONAL_FLAG = Rule("True, False or None", lambda value: value is None or _is_flag(value))
_DATA_FORMAT = Rule(
    join_choices((*DATA_FORMATS, None)),
    lambda value: value is None or isinstance(value, str),
    lambda value: value in (None, *DATA_FORMATS),
    _enum_value,
)

RULES: dict[str, Rule] = {
    "do_resize": _FLAG,
    "size": Rule(
        "a positive int, a (height, width) pair, or a dict of positive ints with the keys height and width; "
        "shortest_edge, optionally with a longest_edge at least as long; or max_height and max_width",
        lambda value: isinstance(value, (dict, list, tuple)) or is_integer(value),
        _is_size,
        _to_size,
    ),
    "default_to_square": _FLAG,
    "resample": Rule(
        f"a filter of Pillow: a number from 0 to 5 or {join_choices(RESAMPLING_NAMES)}",
        lambda value: is_integer(value) or isinstance(value, str),
        lambda value: is_integer(value) and 0 <= value < len(RESAMPLING_NAMES),
        _to_resample,
    ),
    "do_center_crop": _FLAG,
    "crop_size": Rule(
        "a positive int, a (height, width) pair, or a dict of positive ints with the keys height and width",
        lambda value: isinstance(value, (dict, list, tuple)) or is_integer(value),
        _is_crop_size,
        _to_size,
    ),
    "do_rescale": _FLAG,
    "rescale_factor": Rule("a finite number", _is_number),
    "do_normalize": _FLAG,
    "image_mean": Rule("a finite number, or one for each channel", _are_numbers, coerce=_to_numbers),
    "image_std": Rule(
        "a positive number, or one for each channel", _are_numbers, right_value=_are_positive, coerce=_to_numbers
    ),
    "do_reduce_labels": _FLAG,
    "do_convert_rgb": _OPTIONAL_FLAG,
    "return_tensors": Rule(
        join_choices((*TENSOR_TYPES, None)),
        lambda value: value is None or isinstance(value, str),
        lambda value: value in (None, *TENSOR_TYPES),
        _enum_value,
    ),
    "data_format": _DATA_FORMAT,
    "input_data_format": _DATA_FORMAT,
    "disable_grouping": _OPTIONAL_FLAG,
}
"""Rules of all options except `device`, which torch checks."""

DEFAULTS: dict[str, Any] = {
    "do_resize": True,
    "size": {"height": 224, "width": 224},
    "default_to_square": True,
    "resample": 3,
    "do_center_crop": False,
    "crop_size": {"height": 224, "width": 224},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "do_reduce_labels": False,
    "do_convert_rgb": None,
    "return_tensors": None,
    "data_format": None,
    "input_data_format": None,
    "disable_grouping": None,
    "device": None,
}
"""Defaults of all options, as in Transformers 5."""

OPTION_NAMES = frozenset({*DEFAULTS, "reduce_labels"})
"""Names of all options, with older ones."""


def checked(owner: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Convert options to their stored forms.

    `size` is converted to a dict, and filters are converted to numbers.

    Raises:
        TypeError, ValueError: If options are not valid; the error lists all of them.
    """
    forms = {name: RULES[name].coerce(value) if name in RULES else value for name, value in values.items()}
    if is_integer(values.get("size")) and values.get("default_to_square") is False:
        forms["size"] = {"shortest_edge": values["size"]}
    errors = [RULES[name].error(name, form) for name, form in forms.items() if name in RULES]
    raise_errors(owner, [error for error in errors if error is not None])
    return forms


def with_current_names(owner: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Rename `reduce_labels`, the name in Transformers before 4.29, to `do_reduce_labels`."""
    renamed = {name: value for name, value in values.items() if name != "reduce_labels"}
    old = values.get("reduce_labels")
    if old is None:
        return renamed
    new = renamed.get("do_reduce_labels")
    if new is not None and new != old:
        text = f"do_reduce_labels={new} and its old name reduce_labels={old} contradict each other; pass one of them"
        raise_errors(owner, [FieldError(text)])
    return {**renamed, "do_reduce_labels": old}


def with_steps_off(values: Mapping[str, Any]) -> dict[str, Any]:
    """Replace null by False for the flags of a file: in Transformers, null turns a step off."""
    return {name: False if value is None and RULES.get(name) is _FLAG else value for name, value in values.items()}


def without_contradiction(values: Mapping[str, Any]) -> dict[str, Any]:
    """Merge `reduce_labels` and `do_reduce_labels` of a file: labels are reduced if either is true.

    Transformers 5 ignores `reduce_labels` in files of Transformers 4, adds `do_reduce_labels: false` and writes both.
    """
    names = ("reduce_labels", "do_reduce_labels")
    if not all(isinstance(values.get(name), bool) for name in names):
        return dict(values)
    others = {name: value for name, value in values.items() if name not in names}
    return {**others, "do_reduce_labels": any(values[name] for name in names)}
