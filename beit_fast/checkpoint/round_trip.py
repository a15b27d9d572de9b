"""Check that `from_pretrained` reads what `save_pretrained` writes."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..configuration.beit_config import IMPLEMENTATION_FIELDS, BeitConfig
from ..utils.messages import count_of, full_name, join_some
from .key_mapping import full_name as full_key
from .key_mapping import head_of
from .protocol import PretrainedModel
from .wrappers import without_wrappers

_MODULE_LIMIT = 10
_MISSING = "missing in the model"
_POOLING = "add_pooling_layer"
_ADVICE = (
    (("parametrizations.",), "call torch.nn.utils.parametrize.remove_parametrizations(module, name) first"),
    (("_mask",), "call torch.nn.utils.prune.remove(module, name) first"),
    (("_g", "_v"), "call torch.nn.utils.remove_weight_norm(module) first"),
    (("base_layer.",), "save the result of merge_and_unload() of the PEFT model, or only the adapter, by PEFT"),
)
"""What to do about names that contain or end with a part."""


class Mismatch(NamedTuple):
    """Tensors of one module that differ from those that the class builds.

    Attributes:
        found: Tensors that the class does not build, or builds differently, by their names in the module.
        expected: Tensors that the class builds instead.
    """

    found: dict[str, Tensor]
    expected: dict[str, Tensor]


def build_expected(model: PretrainedModel, config: BeitConfig) -> PretrainedModel | None:
    """Build the model that `from_pretrained` builds from `config`, on the meta device.

    Returns:
        The model. None if only the user can build it: the constructor has arguments of its own, takes no
        configuration, or needs a device. A base class, or the user's own code, can still read such a checkpoint.
    """
    parameters = list(inspect.signature(type(model).__init__).parameters.values())[1:]
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    names = {parameter.name for parameter in parameters if parameter.kind not in variable}
    if "config" not in names or not names <= {"config", _POOLING, *IMPLEMENTATION_FIELDS}:
        return None
    options: dict[str, Any] = {_POOLING: getattr(model, "pooler", None) is not None} if _POOLING in names else {}
    saved = config.with_implementations(**dict.fromkeys(IMPLEMENTATION_FIELDS))
    try:
        with torch.device("meta"):
            return type(model)(saved, **options)
    except Exception:  # a user's constructor may raise anything
        return None


def without_absent_heads(
    expected: Mapping[str, Tensor], own: Collection[str], is_masked_modeling: bool
) -> dict[str, Tensor]:
    """Drop the tensors of heads of which the model has none: `from_pretrained` initializes these."""
    heads = {head_of(full_key(name, is_masked_modeling)) for name in own}
    return {key: x for key, x in expected.items() if head_of(full_key(key, is_masked_modeling)) in heads | {None}}


def has_same_kind(one: Tensor, other: Tensor) -> bool:
    """Whether `load_state_dict` can convert the dtype: both are floating-point, or equal."""
    return one.dtype == other.dtype or (one.is_floating_point() and other.is_floating_point())


def find_mismatches(
    state: Mapping[str, Tensor], expected: Mapping[str, Tensor], modules: Collection[str]
) -> dict[str, Mismatch]:
    """Group the tensors that differ by module.

    They differ in name, shape or kind of dtype.

    Args:
        state: The tensors to save.
        expected: The tensors that the class builds.
        modules: Paths of the modules that the class builds.
    """
    wrong = [
        key
        for key in dict.fromkeys([*expected, *state])
        if key not in state
        or key not in expected
        or state[key].shape != expected[key].shape
        or not has_same_kind(state[key], expected[key])
    ]
    found: dict[str, Mismatch] = {}
    for key in wrong:
        path = key
        while path and (path == key or path not in modules):
            path = path.rpartition(".")[0]
        mismatch = found.setdefault(path, Mismatch({}, {}))
        name = key.removeprefix(f"{path}.")
        if key in state:
            mismatch.found[name] = state[key]
        if key in expected:
            mismatch.expected[name] = expected[key]
    return found


def describe_mismatches(model: PretrainedModel, mismatches: Mapping[str, Mismatch]) -> str:
    """Write one error: the modules, what was found and expected, and what to do."""
    name = type(model).__name__
    types = {without_wrappers(f"{path}.")[:-1]: full_name(type(module)) for path, module in model.named_modules()}
    lines = [
        f"{f'{path} ({types.get(path, _MISSING)})' if path else 'the model'}: found "
        f"{_list(mismatch.found, mismatch)}, expected {_list(mismatch.expected, mismatch)}"
        for path, mismatch in mismatches.items()
    ]
    more = len(lines) - _MODULE_LIMIT
    shown = [*lines[:_MODULE_LIMIT], *([f"and {count_of(more, 'more module')}"] if more > 0 else [])]
    heading = (
        f"{name}.from_pretrained could not read this checkpoint: {name}(config) has other tensors in these modules"
    )
    return "\n".join([f"{heading}:", *(f"- {line}" for line in shown), f"To save it, {_advice(mismatches, types)}"])


def _list(tensors: Mapping[str, Tensor], mismatch: Mismatch) -> str:
    """List names and shapes, and dtypes where these are of different kinds."""
    texts = []
    for name, tensor in tensors.items():
        other = (mismatch.expected if tensors is mismatch.found else mismatch.found).get(name, tensor)
        kind = "" if has_same_kind(tensor, other) else f"{str(tensor.dtype).removeprefix('torch.')} "
        texts.append(f"{name} {kind}{list(tensor.shape)}")
    return join_some(texts, 6) or "nothing"


def _advice(mismatches: Mapping[str, Mismatch], modules: Collection[str]) -> str:
    names = [name for mismatch in mismatches.values() for name in mismatch.found]
    advice = [text for parts, text in _ADVICE if all(_has(part, names) for part in parts)]
    labels = {
        mismatch.found["weight"].shape[0]
        for path, mismatch in mismatches.items()
        if path.endswith("classifier") and {"weight", "bias"} == mismatch.found.keys()
    }
    advice += [f"set model.config.num_labels = {count}" for count in labels]
    if any(".layer." in path and path not in modules for path in mismatches):
        advice.append("set model.config.num_hidden_layers to the number of layers left, if some were removed")
    if any(
        name in each.expected and not has_same_kind(tensor, each.expected[name])
        for each in mismatches.values()
        for name, tensor in each.found.items()
    ):
        advice.append("save the model before it is quantized")
    general = "save a class whose constructor builds these modules from the configuration alone, or write the model's "
    return "; or ".join([*advice, f"{general}state_dict() with torch.save"])


def _has(part: str, names: Sequence[str]) -> bool:
    return any(part in name if part.endswith((".", "_")) else name.endswith(part) for name in names)
