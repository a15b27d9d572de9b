"""Names of Transformers 5 in `load_state_dict`."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from typing import Any

from .key_mapping import TRUNK_PREFIX, to_hub_names

_LAYER = re.compile(r"(beit\.)?layers\.\d+\.")


def take_transformers_names(module: Any, state_dict: dict[str, Any], prefix: str, *unused: Any) -> None:
    """Rename parameters of a Transformers 5 model as on the hub.

    `transformers.BeitModel(...).state_dict()` has other names since 5.8. Its files keep the names of the hub. Other
    state dicts do not change. A hook for `register_load_state_dict_pre_hook` of a model.
    """
    inner = TRUNK_PREFIX if module.base_model is module else ""
    rename_entries(
        state_dict, prefix, lambda names: any(map(_LAYER.match, names)), lambda name: name.removeprefix(inner)
    )


def rename_entries(
    state_dict: dict[str, Any],
    prefix: str,
    is_foreign: Callable[[Collection[str]], bool],
    name_of: Callable[[str], str],
) -> None:
    """Rename in place the entries that have names of another format.

    Args:
        state_dict: Changed if the format is known; else `load_state_dict` lists the missing names.
        prefix: The prefix of the model.
        is_foreign: Whether names without the prefix are those of another format.
        name_of: Convert a name of the hub to that of the model.
    """
    given = {key.removeprefix(prefix): tensor for key, tensor in state_dict.items() if key.startswith(prefix)}
    if not is_foreign(given):
        return
    try:
        renamed, _ = to_hub_names(given)
    except ValueError:
        return
    for key in given:
        del state_dict[prefix + key]
    state_dict.update({prefix + name_of(key): tensor for key, tensor in renamed.items()})
