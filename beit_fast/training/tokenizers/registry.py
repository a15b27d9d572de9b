"""Load a visual tokenizer of any type."""

from __future__ import annotations

import os
from typing import Any

from ...utils.hub import HubOptions
from ...utils.messages import describe, join_choices, raise_errors, unexpected_arguments
from .dalle import DalleTokenizer
from .files import TYPE_KEY, find_files
from .patch_colors import PatchColorTokenizer
from .pretrained import PretrainedTokenizer
from .vqkd import VQKDTokenizer

_CLASSES: dict[str, type[PretrainedTokenizer]] = {
    each.tokenizer_type: each for each in (DalleTokenizer, VQKDTokenizer, PatchColorTokenizer)
}


def load_visual_tokenizer(name_or_path: str | os.PathLike[str], /, **options: Any) -> PretrainedTokenizer:
    """Read the tokenizer of a folder or hub repository; its JSON file names the class.

    Args:
        name_or_path: A folder that `save_pretrained` wrote, or the name of a hub repository such as "org/name".
        options: As in `PretrainedTokenizer.from_pretrained`.

    Raises:
        FileNotFoundError: If a file is missing.
        TypeError: If an argument is unexpected.
        ValueError: If the type is unknown, or names, shapes or values do not fit.
    """
    raise_errors("load_visual_tokenizer", unexpected_arguments(options, HubOptions._fields))
    kind = find_files(name_or_path, HubOptions(**options)).fields.get(TYPE_KEY)
    if not isinstance(kind, str) or kind not in _CLASSES:
        name = os.fspath(name_or_path)
        raise ValueError(
            f"the visual tokenizer {name!r} has {describe(TYPE_KEY, kind)} (expected {join_choices(_CLASSES)})"
        )
    return _CLASSES[kind].from_pretrained(name_or_path, **options)
