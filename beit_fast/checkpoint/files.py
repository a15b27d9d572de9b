"""Where a checkpoint's files are, locally or on the hub, and what they hold: safetensors, shards, pickled tensors."""

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

SAFE_PICKLE_VERSION = (2, 10)
"""Before torch 2.10 `weights_only=True` could be made to run code (GHSA-63cw-57p8-fm3p)."""

_WRAPPERS = ("model", "module", "state_dict")
_LARGE = 1 << 30


@dataclass(frozen=True)
class CheckpointFiles:
    """A checkpoint's files on this machine; `weights` are all shards, `config` is None where there is none."""

    name: str
    config: Path | None
    weights: list[Path] = field(default_factory=list)


def find_checkpoint(name_or_path: str | os.PathLike[str], hub: HubOptions) -> CheckpointFiles:
    """The files of a folder, a file of weights or a hub repository (`"org/name"`), fetched where need be.

    Raises:
        FileNotFoundError: nothing is there; says what was looked for and where a local folder goes.
        ValueError: a file is of no known kind.
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
    """Every tensor of the files, on `device`. Several files, or more than 1 GiB, show a progress bar.

    Raises:
        ValueError: a file is damaged, of no known kind, holds more than tensors, or repeats a name.
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
                    raise ValueError(f"{os.fspath(file)!r} holds {key!r}, which another shard held already")
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
        raise ValueError(f"{os.fspath(file)!r} is damaged or no safetensors file: {error}") from error


def _read_pickle(file: Path, device: torch.device | str) -> Iterator[tuple[str, Tensor]]:
    import pickle

    check_pickle_is_safe(file)
    try:
        # Training scripts save their argparse options beside the weights: plain data.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(file, map_location=device, weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{os.fspath(file)!r} holds more than tensors and plain data, and is not run: {error}. Convert it where "
            "you trust it: torch.load(...) there, then safetensors.torch.save_file(state_dict, ...)"
        ) from error
    except (RuntimeError, EOFError) as error:
        raise ValueError(f"{os.fspath(file)!r} is damaged or no file of torch.save: {error}") from error
    yield from _unwrapped(content, file).items()


def check_pickle_is_safe(file: Path) -> None:
    """ValueError for a suffix that is no weights file's, and for a torch that cannot read pickles safely."""
    if file.suffix not in PICKLE_SUFFIXES:
        accepted = ", ".join((".safetensors", ".index.json", *PICKLE_SUFFIXES))
        raise ValueError(f"{os.fspath(file)!r} is no file of weights; accepted: {accepted}")
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < SAFE_PICKLE_VERSION:
        raise ValueError(
            f"{os.fspath(file)!r} is a pickle, which torch {torch.__version__} cannot read without risk "
            "(GHSA-63cw-57p8-fm3p); accepted: safetensors, or torch 2.10 and later"
        )


def _unwrapped(content: Any, file: Path) -> dict[str, Tensor]:
    """The state dict inside what training scripts save around it."""
    while isinstance(content, Mapping):
        inner = next((content[name] for name in _WRAPPERS if isinstance(content.get(name), Mapping)), None)
        if inner is None:
            tensors = {key: value for key, value in content.items() if isinstance(value, Tensor)}
            if tensors:
                return tensors
            break
        content = inner
    raise ValueError(f"{os.fspath(file)!r} holds no state dict, also not under {', '.join(map(repr, _WRAPPERS))}")


def _in_folder(name: str, folder: Path) -> CheckpointFiles:
    found = next((folder / weights for weights in WEIGHT_NAMES if (folder / weights).is_file()), None)
    if found is None:
        raise FileNotFoundError(f"the folder {name!r} holds no weights; looked for {', '.join(WEIGHT_NAMES)}")
    config = folder / CONFIG_NAME
    return CheckpointFiles(name, config if config.is_file() else None, _shards(found))


def _shards(file: Path) -> list[Path]:
    if not file.name.endswith(".index.json"):
        return [file]
    shards = [file.parent / name for name in _shard_names(file)]
    missing = [shard.name for shard in shards if not shard.is_file()]
    if missing:
        raise FileNotFoundError(f"{os.fspath(file)!r} names shards that are not beside it: {', '.join(missing)}")
    return shards


def _shard_names(index: Path) -> list[str]:
    """Files that an index names; ValueError where it leads out of its folder."""
    weight_map = read_json_object(index).get("weight_map")
    names = sorted(set(weight_map.values())) if isinstance(weight_map, dict) else []
    if not names or any(not isinstance(name, str) or Path(name).name != name for name in names):
        raise ValueError(f"{os.fspath(index)!r} has no weight_map from parameters to file names beside it")
    return names
