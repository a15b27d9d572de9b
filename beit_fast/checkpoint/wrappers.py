"""Find a state dict in the files of training scripts: containers, averaged weights and prefixes of names."""

from __future__ import annotations

import argparse
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from torch import Tensor

from ..utils.messages import join_choices, join_some

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
)
"""Keys of a state dict in the dictionary that a training script saves."""

EMA_KEYS = (
    "state_dict_ema",
    "model_ema",
    "ema",
    "ema_state_dict",
    "model_state_dict_ema",
    "model_ema_state_dict",
    "ema_model",
    "ema_model_state_dict",
)
"""Keys of averaged weights (exponential moving average) in such a dictionary."""

_COUNTER = "n_averaged"  # a buffer of torch.optim.swa_utils.AveragedModel
_MMENGINE = ("state_dict", "ema_state_dict")
_STEPS = "steps"  # a buffer of mmengine's averaged models
_MOST_LEVELS = 5
_WRAPPED = re.compile(r"(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# Every name of an attention layer, in any format; the optional `beit.` belongs to the format.
_BEIT = re.compile(
    r"(?<![^.])(?:"
    r"backbone\.(?:layers|blocks)\.\d+\.attn\.|layers\.\d+\.attn\.qkv\.|blocks\.\d+\.attn\.|"
    r"(?:beit\.)?layers\.\d+\.attention\.q_proj\.|data2vec_vision\.|(?:beit\.)?encoder\.layer\.\d+\.attention\."
    r")"
)
_REMEDY = "pass the tensors of one model as state_dict=..., or rename them by key_mapping={r'^prefix\\.': ''}"


def find_state_dict(content: Any, file: str, use_ema: bool | None) -> tuple[dict[str, Tensor], str | None]:
    """Find the state dict in the dictionary that a training script saved.

    Args:
        content: What the file contains.
        file: The name of the file, for errors.
        use_ema: Whether to read averaged weights; None reads them if there are any.

    Returns:
        The tensors by name, and the key of the averaged weights if they were read.

    Raises:
        ValueError: If there is no state dict, or several of them.
    """
    ema_key = None
    while isinstance(content, Mapping):
        key, is_ema = _choose(content, file, use_ema)
        if key is None:
            tensors = {name: value for name, value in content.items() if isinstance(value, Tensor)}
            if tensors:
                return tensors, ema_key
            break
        ema_key = key if is_ema else ema_key
        content = {name: value for name, value in content[key].items() if key != _MMENGINE[1] or name != _STEPS}
    expected = join_choices((*WEIGHT_KEYS, *EMA_KEYS))
    found = f"; its entries are {join_some(map(repr, content))}" if isinstance(content, Mapping) and content else ""
    raise ValueError(f"{file!r} does not contain a state dict, nor does its {expected}{found}")


def script_options(content: Any) -> Mapping[str, Any]:
    """Return the options of a training script.

    timm and unilm save them under `"args"`. The dict is empty if there are none.
    """
    options = content.get("args") if isinstance(content, Mapping) else None
    if isinstance(options, argparse.Namespace):
        return vars(options)
    return options if isinstance(options, Mapping) else {}


def _choose(content: Mapping[Any, Any], file: str, use_ema: bool | None) -> tuple[str | None, bool]:
    """Return the key of the weights, and whether they are averaged.

    The key is None if `content` is itself the state dict.
    """
    raw = [key for key in WEIGHT_KEYS if _holds_tensors(content.get(key))]
    averaged = [key for key in EMA_KEYS if _holds_tensors(content.get(key)) and _holds_beit(content[key])]
    if len(raw) > 1:
        raw = [key for key in raw if _holds_beit(content[key])] or raw
    if _is_of_mmengine(content):
        averaged, raw = [_MMENGINE[0]], [_MMENGINE[1]]
    keys = averaged if averaged and use_ema is not False else raw
    if len(keys) > 1:
        raise ValueError(f"{file!r} contains several state dicts, under {join_some(map(repr, keys))}: {_REMEDY}")
    if averaged and not keys:
        raise ValueError(f"{file!r} contains only averaged weights, under {averaged[0]!r}, and use_ema=False")
    return (keys[0] if keys else None), bool(averaged) and keys == averaged


def _is_of_mmengine(content: Mapping[Any, Any]) -> bool:
    """Whether mmengine wrote the dictionary, which swaps averaged weights into `"state_dict"`."""
    return all(_holds_tensors(content.get(key)) for key in _MMENGINE) and _STEPS in content[_MMENGINE[1]]


def _holds_tensors(value: Any) -> bool:
    """Whether a dictionary contains a tensor under a string, at any depth."""
    return any(True for _ in _names(value))


def _holds_beit(value: Mapping[Any, Any]) -> bool:
    return any(_BEIT.search(name) for name in _names(value))


def _names(value: Any, levels: int = _MOST_LEVELS) -> Iterator[str]:
    """The names of all tensors in nested dictionaries; a dictionary may contain itself."""
    if isinstance(value, Mapping) and levels > 0:
        for name, item in value.items():
            if isinstance(name, str) and isinstance(item, Tensor):
                yield name
            elif isinstance(name, str):
                yield from _names(item, levels - 1)


def without_wrappers(name: str) -> str:
    """Remove the prefixes of `torch.compile`, FSDP and activation checkpointing."""
    return _WRAPPED.sub("", name)


def averaging_counter(names: Collection[str]) -> str | None:
    """The name of the counter that `torch.optim.swa_utils.AveragedModel` keeps beside averaged weights."""
    return next((name for name in names if name.rpartition(".")[2] == _COUNTER), None)


def strip_wrappers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Remove from all names what wrappers add: DDP, `torch.compile`, FSDP, Lightning, `AveragedModel`.

    A prefix is removed if every name has it. Names without BEiT's attention layers are returned unchanged.

    Raises:
        ValueError: If only some names have the prefix, several prefixes have a BEiT model, or two names become equal.
            The error lists the prefixes.
    """
    counter = averaging_counter(tensors)
    state: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        key = without_wrappers(name)
        if key in state:
            raise ValueError(f"the checkpoint contains {key!r} twice, once inside a wrapper ({name!r}): {_REMEDY}")
        if name != counter:
            state[key] = tensor
    prefixes = sorted({key[: found.start()] for key in state if (found := _BEIT.search(key))})
    if len(prefixes) > 1:
        found_prefixes = ", ".join(repr(prefix) if prefix else "no prefix" for prefix in prefixes)
        raise ValueError(f"the checkpoint contains several BEiT models, under {found_prefixes}: {_REMEDY}")
    prefix = prefixes[0] if prefixes else ""
    others = [key for key in state if not key.startswith(prefix)]
    if others:
        raise ValueError(
            f"the checkpoint contains a BEiT model under the prefix {prefix!r}, and other names without it: "
            f"{join_some(others, 5)}. It is not clear whether they belong to the model: {_REMEDY}"
        )
    return {key.removeprefix(prefix): tensor for key, tensor in state.items()}
