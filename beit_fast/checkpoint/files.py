"""Find the files of a checkpoint and read their tensors: safetensors, shards and pickles."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..utils.files import CONFIG_NAME, read_json_object
from ..utils.hub import PICKLE_SUFFIXES, WEIGHT_NAMES, HubOptions, Repository
from ..utils.messages import join_choices

SAFE_PICKLE_VERSION = (2, 10)
"""Before torch 2.10, a file could run code despite `weights_only=True` (GHSA-63cw-57p8-fm3p)."""

_WRAPPERS = ("model", "module", "state_dict")
_LARGE = 1 << 30


@dataclass(frozen=True)
class CheckpointFiles:
    """Local files of a checkpoint.

    Attributes:
        name: The path or repository that the user passed.
        config: `config.json`, or None if there is none.
        weights: All shards.
    """

    name: str
    config: Path | None
    weights: list[Path] = field(default_factory=list)


def find_checkpoint(name_or_path: str | os.PathLike[str], hub: HubOptions) -> CheckpointFiles:
    """Find the files of a checkpoint.

    The name is that of a folder, a weights file or a hub repository (`"org/name"`). Files of a repository are
    downloaded if they are not in the cache.

    Raises:
        FileNotFoundError: If there is no checkpoint.
        ValueError: If an index of shards is not valid.
    """
    name = os.fspath(name_or_path)
    path = Path(name).expanduser()
    if path.is_dir():
        return _in_folder(name, path)
    if path.is_file():
        config = path.parent / CONFIG_NAME
        return CheckpointFiles(name, config if config.is_file() else None, _shards(path))
    repository = Repository(name, hub)
    weights = repository.fetch_first(WEIGHT_NAMES)
    shards = [weights]
    if weights.name.endswith(".index.json"):
        shards = [repository.fetch(shard) for shard in _shard_names(weights)]
    return CheckpointFiles(name, repository.fetch_optional(CONFIG_NAME), shards)


def read_tensors(files: Sequence[Path], device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Read all tensors to `device`.

    A progress bar is shown for several files or more than 1 GiB.

    Raises:
        ValueError: If a file is damaged, has an unknown format, contains objects other than tensors and plain data, or
            repeats a name.
    """
    from tqdm import tqdm

    size = sum(file.stat().st_size for file in files)
    state: dict[str, Tensor] = {}
    quiet = len(files) < 2 and size < _LARGE
    with tqdm(total=size, unit="B", unit_scale=True, desc="Loading weights", disable=quiet, leave=False) as bar:
        for file in files:
            read = _read_safetensors if file.suffix == ".safetensors" else _read_pickle
            for key, tensor in read(file, device):
                if key in state:
                    raise ValueError(f"{os.fspath(file)!r} contains {key!r}, which another shard also contains")
                state[key] = tensor
                bar.update(tensor.nbytes)
    return state


def _read_safetensors(file: Path, device: torch.device | str) -> Iterator[tuple[str, Tensor]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt", device=str(device)) as stored:
            for key in stored.keys():  # noqa: SIM118
                yield key, stored.get_tensor(key)
    except SafetensorError as error:
        raise ValueError(f"{os.fspath(file)!r} is damaged or not a safetensors file: {error}") from error


def _read_pickle(file: Path, device: torch.device | str) -> Iterator[tuple[str, Tensor]]:
    import pickle

    check_pickle_is_safe(file)
    try:
        # Training scripts save their argparse options beside the weights: plain data.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(file, map_location=device, weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{os.fspath(file)!r} contains objects other than tensors and plain data, and was not loaded: {error}. If "
            "you trust the file, convert it: torch.load(...), then safetensors.torch.save_file(state_dict, ...)"
        ) from error
    except (RuntimeError, EOFError) as error:
        raise ValueError(f"{os.fspath(file)!r} is damaged or not a file of torch.save: {error}") from error
    yield from _unwrapped(content, file).items()


def check_pickle_is_safe(file: Path) -> None:
    """Check the suffix of a pickle and the version of torch.

    Versions of torch before 2.10 do not read pickles safely.

    Raises:
        ValueError: If the file is not a weights file, or torch is too old.
    """
    if file.suffix not in PICKLE_SUFFIXES:
        *suffixes, last = (".safetensors", ".index.json", *PICKLE_SUFFIXES)
        raise ValueError(f"{os.fspath(file)!r} is not a weights file (expected {', '.join(suffixes)} or {last})")
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < SAFE_PICKLE_VERSION:
        raise ValueError(
            f"{os.fspath(file)!r} is a pickle, and torch {torch.__version__} cannot read pickles safely "
            "(GHSA-63cw-57p8-fm3p; expected a safetensors file, or torch 2.10 or later)"
        )


def _unwrapped(content: Any, file: Path) -> dict[str, Tensor]:
    """Find the state dict in the dictionary that a training script saved."""
    while isinstance(content, Mapping):
        inner = next((content[name] for name in _WRAPPERS if isinstance(content.get(name), Mapping)), None)
        if inner is None:
            tensors = {key: value for key, value in content.items() if isinstance(value, Tensor)}
            if tensors:
                return tensors
            break
        content = inner
    raise ValueError(f"{os.fspath(file)!r} does not contain a state dict, nor does its {join_choices(_WRAPPERS)}")


def _in_folder(name: str, folder: Path) -> CheckpointFiles:
    found = next((folder / weights for weights in WEIGHT_NAMES if (folder / weights).is_file()), None)
    if found is None:
        raise FileNotFoundError(f"the folder {name!r} does not contain weights (expected {' or '.join(WEIGHT_NAMES)})")
    config = folder / CONFIG_NAME
    return CheckpointFiles(name, config if config.is_file() else None, _shards(found))


def _shards(file: Path) -> list[Path]:
    if not file.name.endswith(".index.json"):
        return [file]
    shards = [file.parent / name for name in _shard_names(file)]
    missing = [shard.name for shard in shards if not shard.is_file()]
    if missing:
        raise FileNotFoundError(f"{os.fspath(file)!r} lists shards that are not in its folder: {', '.join(missing)}")
    return shards


def _shard_names(index: Path) -> list[str]:
    """Names of the files that an index lists.

    Raises:
        ValueError: If there are none, or a name leads out of the folder.
    """
    weight_map = read_json_object(index).get("weight_map")
    names = sorted(set(weight_map.values())) if isinstance(weight_map, dict) else []
    if not names or any(not isinstance(name, str) or Path(name).name != name for name in names):
        raise ValueError(f"{os.fspath(index)!r} does not have a weight_map from parameters to files of its folder")
    return names
