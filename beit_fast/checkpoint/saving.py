"""Write checkpoints in the hub's format, atomically."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from ..configuration.beit_config import BeitConfig
from ..utils.files import CONFIG_NAME, read_json_object, replace_files, unfinished_folder, writing
from ..utils.hub import INDEX_NAME, WEIGHTS_NAME, add_variant
from ..utils.messages import describe, full_name, join_some
from ..utils.paths import as_path
from .infer_config import copy_config
from .protocol import PretrainedModel
from .round_trip import build_expected, describe_mismatches, find_mismatches, without_absent_heads
from .wrappers import without_wrappers

_SHARDED = (
    "parameters are sharded over processes (call get_model_state_dict of torch.distributed.checkpoint.state_dict in "
    "every process with full_state_dict=True and cpu_offload=True, then pass its result as state_dict to "
    "save_pretrained in the first process)"
)


class FileNames(NamedTuple):
    """Names of the weights files of one variant; None is the checkpoint itself.

    Attributes:
        weights: The name of a single file.
        index_file: The name of the index of shards.
        shard_prefix: The start of the names of shards.
    """

    variant: str | None
    weights: str
    index_file: str
    shard_prefix: str

    @classmethod
    def of(cls, variant: str | None) -> Self:
        """Name the files as Transformers does.

        Raises:
            TypeError: If `variant` is not a string.
            ValueError: If it cannot be a part of a file name.
        """
        if variant is not None and not isinstance(variant, str):
            raise TypeError(f"{describe('variant', variant)} is not supported (expected a string or None)")
        variant = variant or None
        if variant is not None and not re.fullmatch(r"\w[\w.-]*", variant):
            expected = "letters, digits, '_', '-' and '.', as in 'fp16'"
            raise ValueError(f"{describe('variant', variant)} is not supported (expected {expected})")
        prefix = "model" if variant is None else f"model.{variant}"
        return cls(variant, add_variant(WEIGHTS_NAME, variant), add_variant(INDEX_NAME, variant), prefix)

    def on_hub(self) -> list[str]:
        """Patterns of the files in a repository that a new checkpoint replaces."""
        return [self.weights, self.index_file, f"{self.shard_prefix}-*.safetensors"]


def save_model(
    model: PretrainedModel,
    folder: str | os.PathLike[str],
    max_shard_size: int | str,
    safe_serialization: bool,
    state_dict: Mapping[str, Tensor] | None = None,
    variant: str | None = None,
) -> None:
    """Write `config.json` and safetensors files; see `BeitPreTrainedModel.save_pretrained`."""
    if not safe_serialization:
        raise ValueError("safe_serialization=False is not supported: it writes a pickle (expected True)")
    target = as_path("the checkpoint", folder)
    names = FileNames.of(variant)
    # The configuration is that of all variants; each file has its own dtype.
    dtype = model.dtype if names.variant is None else None
    config = copy_config(model.config, architectures=[type(model).__name__], dtype=dtype)
    config.validate()
    text = config.to_json_string()
    state = _state_to_save(model, config, state_dict)
    with writing("the checkpoint", folder):
        _write(target, text, state, max_shard_size, names)


def _write(target: Path, text: str, state: Mapping[str, Tensor], max_shard_size: int | str, files: FileNames) -> None:
    """Write the configuration `text` and the tensors `state` into the folder `target`."""
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    pattern = f"{files.shard_prefix}{{suffix}}.safetensors"
    plan = split_torch_state_dict_into_shards(
        state, filename_pattern=pattern, max_shard_size=max_shard_size
    )  # checks the size
    target.mkdir(parents=True, exist_ok=True)
    names = {files.weights: files.weights}
    if plan.is_sharded:
        names = _free_names(target, list(plan.filename_to_tensors), files.shard_prefix)
    with unfinished_folder(target) as unfinished:
        (unfinished / CONFIG_NAME).write_text(text, encoding="utf-8")
        for planned, keys in plan.filename_to_tensors.items():
            file = unfinished / names[planned]
            save_file({key: state[key] for key in keys}, file, metadata={"format": "pt"})
            # safetensors creates files that only their owner can read.
            shutil.copymode(unfinished / CONFIG_NAME, file)
        if plan.is_sharded:
            weight_map = {key: names[planned] for key, planned in plan.tensor_to_filename.items()}
            index = {"metadata": plan.metadata, "weight_map": dict(sorted(weight_map.items()))}
            text = json.dumps(index, indent=2, sort_keys=True) + "\n"
            (unfinished / files.index_file).write_text(text, encoding="utf-8")
        _replace_checkpoint(unfinished, target, list(names.values()), plan.is_sharded, files)


def _state_to_save(model: PretrainedModel, config: BeitConfig, given: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """Return the tensors passed, or the model's own.

    Their names are those that `from_pretrained` reads.

    Raises:
        ValueError: If they are not complete, do not fit the model, or could not be read back.
    """
    own = model.state_dict(keep_vars=True)  # a parameter that is detached loses its subclass
    values = own if given is None else given
    unsupported = _unsupported_values(model, values)
    if unsupported:
        raise ValueError(
            f"save_pretrained writes plain dense tensors; these cannot be written: {join_some(unsupported)}. "
            "Save the model before it is quantized, or write its state_dict() with torch.save"
        )
    own = {without_wrappers(key): tensor for key, tensor in own.items()}
    state = {without_wrappers(key): tensor.detach().contiguous() for key, tensor in values.items()}
    built = build_expected(model, config)
    expected = own
    if built is not None:
        expected = without_absent_heads(built.state_dict(keep_vars=True), own, hasattr(model, "lm_head"))
    errors = {
        "parameters on the meta device have no values": [key for key in state if state[key].is_meta],
        _SHARDED: [key for key in state if hasattr(state[key], "device_mesh")],
    }
    if given is not None and _shapes(state) != _shapes(own):
        errors |= _errors_of_argument(state, expected)
    if any(errors.values()):
        raise ValueError("\n".join(f"{error}: {join_some(keys)}" for error, keys in errors.items() if keys))
    mismatches = find_mismatches(state, expected, {path for path, _ in (built or model).named_modules()})
    if mismatches:
        raise ValueError(describe_mismatches(model, mismatches))
    return _without_ties(state)


def _errors_of_argument(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """List how the argument `state_dict` differs from `expected`."""
    return {
        "state_dict lacks parameters of the model": [key for key in expected if key not in state],
        "state_dict has parameters that the model does not have": [key for key in state if key not in expected],
        "state_dict has parameters of a different shape": [
            f"{key} {list(state[key].shape)} (expected {list(expected[key].shape)})"
            for key in state
            if key in expected and state[key].shape != expected[key].shape
        ],
    }


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {key: tensor.shape for key, tensor in tensors.items()}


def _without_ties(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors that share memory with an earlier one.

    safetensors refuses tied tensors.
    """
    addresses: set[tuple[torch.device, int]] = set()
    untied = {}
    for key, tensor in state.items():
        address = (tensor.device, tensor.data_ptr())
        untied[key] = tensor.clone() if address in addresses else tensor
        addresses.add(address)
    return untied


def _unsupported_values(model: PretrainedModel, state: Mapping[str, Any]) -> list[str]:
    """List the modules with values that safetensors cannot store.

    Each item also names the types of these values. A tensor subclass may hold more than its elements, such as the
    scales of quantized weights.
    """
    modules = {name: full_name(type(module)) for name, module in model.named_modules()}
    found: dict[str, dict[str, None]] = {}
    for key, value in state.items():
        description = _unsupported_type(value)
        if description is not None:
            path = key.rpartition(".")[0]
            owner = f"{path} ({modules[path]})" if path and path in modules else key
            found.setdefault(owner, {})[description] = None
    return [f"{owner} has values of type {' and '.join(types)}" for owner, types in found.items()]


def _unsupported_type(value: Any) -> str | None:
    """Describe a value that safetensors cannot store; None if it can. DTensors have an error of their own."""
    if not isinstance(value, Tensor):
        return full_name(type(value))
    if hasattr(value, "device_mesh"):
        return None
    if type(value) not in (Tensor, nn.Parameter):
        return full_name(type(value))
    if value.layout != torch.strided or value.is_quantized:
        return f"{full_name(type(value))} ({value.layout}, {value.dtype})"
    return None


def _free_names(folder: Path, planned: list[str], prefix: str) -> dict[str, str]:
    """Map planned shard names to names that no file in `folder` has."""
    if not any((folder / name).exists() for name in planned):
        return {name: name for name in planned}
    tag = os.urandom(4).hex()
    return {name: name.replace(f"{prefix}-", f"{prefix}-{tag}-", 1) for name in planned}


def _replace_checkpoint(
    unfinished: Path, folder: Path, weights: Sequence[str], sharded: bool, files: FileNames
) -> None:
    """Move complete files into `folder`.

    The folder contains one whole set of weights at every moment. New shards are not read before the index is replaced.
    A single file takes precedence over an index. Files of other variants are kept.
    """
    replaced = _shards_in(folder, files.index_file) - set(weights)
    order = [*weights, files.index_file, CONFIG_NAME] if sharded else [files.weights, CONFIG_NAME]
    replace_files([(unfinished / name, folder / name) for name in order])
    stale = replaced | ({files.weights} if sharded else {files.index_file})
    for name in sorted(stale):
        (folder / name).unlink(missing_ok=True)


def _shards_in(folder: Path, index: str) -> set[str]:
    """Names of the shards that `index` in `folder` lists; none if it is missing or damaged."""
    try:
        weight_map = read_json_object(folder / index).get("weight_map")
    except (FileNotFoundError, ValueError):
        return set()
    names = weight_map.values() if isinstance(weight_map, dict) else ()
    plain_names = {name for name in names if isinstance(name, str) and Path(name).name == name}
    return {name for name in plain_names if name.endswith(".safetensors")}
