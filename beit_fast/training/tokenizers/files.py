"""Files of a visual tokenizer: its sizes in JSON, its numbers in safetensors."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from ...checkpoint.read_tensors import read_tensors
from ...utils.files import json_text, read_json_object, replace_files, unfinished_folder, writing
from ...utils.hub import HubOptions, Repository, find_options
from ...utils.messages import join_some, raise_value_error
from ...utils.paths import as_path

JSON_NAME = "visual_tokenizer.json"
TENSORS_NAME = "visual_tokenizer.safetensors"
"""Names that differ from those of models and text tokenizers, so one folder may hold all of them."""

TYPE_KEY = "visual_tokenizer_type"


class TokenizerFiles(NamedTuple):
    """The sizes of a tokenizer and the file of its numbers."""

    fields: dict[str, Any]
    tensors: Path


def find_files(name_or_path: str | os.PathLike[str], hub: HubOptions) -> TokenizerFiles:
    """Find both files of a tokenizer, local or on the hub.

    Raises:
        FileNotFoundError: If one is missing.
        TypeError, ValueError: If the path or the JSON file is not valid.
    """
    file = find_options(name_or_path, JSON_NAME, "visual tokenizer", hub)
    if not os.path.exists(os.fspath(name_or_path)):
        return TokenizerFiles(read_json_object(file), Repository(os.fspath(name_or_path), hub).fetch(TENSORS_NAME))
    if file.suffix != ".json":
        raise ValueError(
            f"{os.fspath(file)!r} is not a folder of save_pretrained (for the files of other projects, see "
            "DalleTokenizer.from_dalle_file and VQKDTokenizer.from_unilm_file)"
        )
    tensors = file.with_name(TENSORS_NAME)
    if not tensors.is_file():
        raise FileNotFoundError(f"the folder {os.fspath(file.parent)!r} does not contain {TENSORS_NAME}")
    return TokenizerFiles(read_json_object(file), tensors)


def read_numbers(file: Path) -> dict[str, Tensor]:
    """Read all tensors of a safetensors file or a pickle; see `read_tensors`."""
    return read_tensors([file]).tensors


def write_files(folder: str | os.PathLike[str], fields: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write both files; they replace older ones when both are complete.

    Raises:
        OSError: If the folder cannot be written.
        TypeError, ValueError: If the path is not valid.
    """
    from safetensors.torch import save_file

    target = as_path("the visual tokenizer", folder)
    text = json_text(fields, "the visual tokenizer")
    with writing("the visual tokenizer", folder):
        target.mkdir(parents=True, exist_ok=True)
        with unfinished_folder(target) as unfinished:
            (unfinished / JSON_NAME).write_text(text, encoding="utf-8")
            contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
            save_file(contiguous, unfinished / TENSORS_NAME, metadata={"format": "pt"})
            # safetensors creates files that only their owner can read.
            shutil.copymode(unfinished / JSON_NAME, unfinished / TENSORS_NAME)
            replace_files([(unfinished / name, target / name) for name in (TENSORS_NAME, JSON_NAME)])


def check_tensors(owner: str, given: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Check names, shapes and dtypes.

    Args:
        owner: The file, for the error.
        given: The tensors of the file.
        expected: Tensors of the expected names and shapes, of any device.

    Raises:
        ValueError: If some differ; the error lists all of them.
    """
    missing = [name for name in expected if name not in given]
    unexpected = [name for name in given if name not in expected]
    both = [name for name in expected if name in given]
    shapes = [
        f"{name} {list(given[name].shape)} (expected {list(expected[name].shape)})"
        for name in both
        if given[name].shape != expected[name].shape
    ]
    dtypes = [f"{name} {given[name].dtype}" for name in both if not given[name].is_floating_point()]
    errors = {
        "it lacks": missing,
        "it has names that the tokenizer does not have": unexpected,
        "shapes differ": shapes,
        "dtypes are not floating point": dtypes,
    }
    heading = f"{owner} does not fit the visual tokenizer"
    raise_value_error(heading, [f"{error}: {join_some(names)}" for error, names in errors.items() if names])
