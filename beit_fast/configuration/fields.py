"""Rules for each field of a `BeitConfig`: types, values and conversions."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any, Literal, NamedTuple, get_args

import torch

from ..utils.dtypes import find_dtype
from ..utils.messages import FieldError, describe, join_choices
from ..utils.names import ATTENTION_IMPLEMENTATIONS, PATCH_EMBED_IMPLEMENTATIONS

ActivationName = Literal[
    "gelu",
    "gelu_python",
    "gelu_accurate",
    "gelu_fast",
    "gelu_new",
    "gelu_python_tanh",
    "gelu_pytorch_tanh",
    "gelu_10",
    "quick_gelu",
    "hardswish",
    "laplace",
    "leaky_relu",
    "linear",
    "mish",
    "relu",
    "relu2",
    "relu6",
    "sigmoid",
    "silu",
    "sqrtsoftplus",
    "swish",
    "tanh",
]
"""Names in Transformers of the activations without parameters."""

ACTIVATION_NAMES: tuple[ActivationName, ...] = get_args(ActivationName)
PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")


def _anything(value: Any) -> bool:
    return True


def _unchanged(value: Any) -> Any:
    return value


class Rule(NamedTuple):
    """Rule for one field.

    Args:
        expected: What the field accepts, for errors.
        right_type: Whether a value has an accepted type.
        right_value: Whether a value of an accepted type is valid.
        coerce: Convert a value to its stored form. It returns a value that it cannot convert, and never raises.
    """

    expected: str
    right_type: Callable[[Any], bool]
    right_value: Callable[[Any], bool] = _anything
    coerce: Callable[[Any], Any] = _unchanged

    def error(self, name: str, value: Any) -> FieldError | None:
        """Return the error of `value` for the field `name`, if any."""
        if not self.right_type(value):
            text = f"{describe(name, value)} is of type {type(value).__name__} (expected {self.expected})"
            return FieldError(text, wrong_type=True)
        if not self.right_value(value):
            return FieldError(f"{describe(name, value)} is not supported (expected {self.expected})")
        return None


def is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def to_integer(value: Any) -> Any:
    return int(value) if isinstance(value, Integral) and not isinstance(value, bool) else value


def _to_float(value: Any) -> Any:
    return float(value) if isinstance(value, Real) and not isinstance(value, bool) else value


def _to_integers(value: Any) -> Any:
    return tuple(map(to_integer, value)) if isinstance(value, (list, tuple)) else to_integer(value)


def _to_patch_size(value: Any) -> Any:
    sizes = _to_integers(value)
    return sizes[0] if isinstance(sizes, tuple) and len(sizes) == 2 and sizes[0] == sizes[1] else sizes


def _to_dtype(value: Any) -> Any:
    found = find_dtype(value) if isinstance(value, str) else None
    return value if found is None else found


def _to_floats(value: Any) -> Any:
    """Convert a list, tuple, array or tensor to a tuple of floats."""
    value = value.tolist() if hasattr(value, "tolist") else value
    return tuple(map(_to_float, value)) if isinstance(value, (list, tuple)) else value


def to_list(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _to_path_string(value: Any) -> Any:
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _are_integers(value: Any) -> bool:
    return isinstance(value, tuple) and all(map(is_integer, value))


def _are_numbers(value: Any) -> bool:
    return value is None or (isinstance(value, tuple) and all(map(is_number, value)))


def _is_optional(kind: type) -> Callable[[Any], bool]:
    return lambda value: value is None or isinstance(value, kind)


def _is_floating_dtype(value: Any) -> bool:
    return value is None or (isinstance(value, torch.dtype) and value.is_floating_point)


def _are_strings(value: Any) -> bool:
    return value is None or (isinstance(value, list) and all(isinstance(item, str) for item in value))


_POSITIVE = Rule("a positive int", is_integer, lambda value: value > 0, to_integer)
COUNT = Rule("an int of at least 0", is_integer, lambda value: value >= 0, to_integer)
_PROBABILITY = Rule("a number in [0, 1)", is_number, lambda value: 0 <= value < 1, _to_float)
_AMOUNT = Rule("a finite number of at least 0", is_number, lambda value: value >= 0 and math.isfinite(value), _to_float)
_FLAG = Rule("True or False", lambda value: isinstance(value, bool))
_OPTIONAL_FLAG = Rule("True, False or None", _is_optional(bool))
_OPTIONAL_STRING = Rule("a string or None", _is_optional(str))

RULES: dict[str, Rule] = {
    "vocab_size": _POSITIVE,
    "hidden_size": _POSITIVE,
    "num_hidden_layers": _POSITIVE,
    "num_attention_heads": _POSITIVE,
    "intermediate_size": _POSITIVE,
    "hidden_act": Rule(
        f"one of {', '.join(ACTIVATION_NAMES)}",
        lambda value: isinstance(value, str),
        lambda value: value in ACTIVATION_NAMES,
    ),
    "hidden_dropout_prob": _PROBABILITY,
    "attention_probs_dropout_prob": _PROBABILITY,
    "initializer_range": _AMOUNT,
    "layer_norm_eps": _AMOUNT,
    "image_size": Rule(
        "a positive int or a (height, width) pair of positive ints",
        lambda value: is_integer(value) or _are_integers(value),
        lambda value: value > 0 if is_integer(value) else len(value) == 2 and min(value) > 0,
        _to_integers,
    ),
    "patch_size": Rule(
        "a positive int or a pair of equal positive ints",
        lambda value: is_integer(value) or _are_integers(value),
        lambda value: is_integer(value) and value > 0,
        _to_patch_size,
    ),
    "num_channels": _POSITIVE,
    "use_mask_token": _FLAG,
    "use_absolute_position_embeddings": _FLAG,
    "use_relative_position_bias": _FLAG,
    "use_shared_relative_position_bias": _FLAG,
    "layer_scale_init_value": _AMOUNT,
    "drop_path_rate": _PROBABILITY,
    "use_mean_pooling": _FLAG,
    "pool_scales": Rule(
        "one or more positive ints",
        _are_integers,
        lambda value: len(value) > 0 and min(value) > 0,
        _to_integers,
    ),
    "use_auxiliary_head": _FLAG,
    "auxiliary_loss_weight": _AMOUNT,
    "auxiliary_channels": _POSITIVE,
    "auxiliary_num_convs": COUNT,
    "auxiliary_concat_input": _FLAG,
    "semantic_loss_ignore_index": Rule("an int", is_integer, coerce=to_integer),
    "add_fpn": _FLAG,
    "reshape_hidden_states": _FLAG,
    "head_dim": Rule(
        "None or a positive int",
        lambda value: value is None or is_integer(value),
        lambda value: value is None or value > 0,
        to_integer,
    ),
    "pixel_mean": Rule(
        "None or a finite number for each channel",
        _are_numbers,
        lambda value: value is None or all(map(math.isfinite, value)),
        _to_floats,
    ),
    "pixel_std": Rule(
        "None or a positive, finite number for each channel",
        _are_numbers,
        lambda value: value is None or all(0 < number < math.inf for number in value),
        _to_floats,
    ),
    "pixel_resize": Rule("None or a dict of entries of timm's pretrained_cfg", _is_optional(dict)),
    "visual_tokenizer": Rule(
        "None, or the path or the hub repository of a visual tokenizer",
        _is_optional(str),
        lambda value: value is None or value.strip() != "",
        _to_path_string,
    ),
    "problem_type": Rule(
        join_choices((*PROBLEM_TYPES, None)),
        _is_optional(str),
        lambda value: value is None or value in PROBLEM_TYPES,
    ),
    "output_attentions": _OPTIONAL_FLAG,
    "output_hidden_states": _OPTIONAL_FLAG,
    "return_dict": _OPTIONAL_FLAG,
    "dtype": Rule(
        "None, a floating-point torch.dtype or its name such as 'float16' or 'fp16'",
        lambda value: value is None or isinstance(value, (str, torch.dtype)),
        _is_floating_dtype,
        _to_dtype,
    ),
    "architectures": Rule("None or a list of strings", _are_strings, coerce=to_list),
    "transformers_version": _OPTIONAL_STRING,
    "_name_or_path": Rule("a string", lambda value: isinstance(value, str), coerce=_to_path_string),
    "chunk_size_feed_forward": COUNT,
    "is_encoder_decoder": _FLAG,
    "gradient_checkpointing": _FLAG,
    "attn_implementation": Rule(
        join_choices((*ATTENTION_IMPLEMENTATIONS, None)),
        _is_optional(str),
        lambda value: value is None or value in ATTENTION_IMPLEMENTATIONS,
    ),
    "patch_embed_implementation": Rule(
        join_choices((*PATCH_EMBED_IMPLEMENTATIONS, None)),
        _is_optional(str),
        lambda value: value is None or value in PATCH_EMBED_IMPLEMENTATIONS,
    ),
}
"""Rules of all fields of `BeitConfig` except labels and stages."""
