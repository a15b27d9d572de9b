"""Names of Transformers 5 in `load_state_dict`."""

from __future__ import annotations

import re
from typing import Any

from .key_mapping import TRUNK_PREFIX, to_hub_names

_LAYER = re.compile(r"(beit\.)?layers\.\d+\.")


def take_transformers_names(module: Any, state_dict: dict[str, Any], prefix: str, *unused: Any) -> None:
    """Rename parameters of a Transformers 5 model as on the hub.

    `transformers.BeitModel(...).state_dict()` has other names since 5.8. Its files keep the names of the hub. Other
    state dicts do not change. A hook for `register_load_state_dict_pre_hook` of a model.
    """
    given = {key.removeprefix(prefix): tensor for key, tensor in state_dict.items() if key.startswith(prefix)}
    if not any(_LAYER.match(key) for key in given):
        return
    try:
        renamed, _ = to_hub_names(given)
    except ValueError:  # not a known format: load_state_dict lists the missing names
        return
    for key in given:
        del state_dict[prefix + key]
    inner = TRUNK_PREFIX if module.base_model is module else ""
    state_dict.update({prefix + key.removeprefix(inner): tensor for key, tensor in renamed.items()})
