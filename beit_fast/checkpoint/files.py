"""Find the files of a checkpoint: safetensors, shards and pickles, in a folder or on the hub."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from ..utils.files import CONFIG_NAME, read_json_object
from ..utils.hub import WEIGHT_NAMES, HubOptions, Repository, add_variant, local_folder
from ..utils.messages import describe
from ..utils.paths import as_path


class FileChoice(NamedTuple):
    """Arguments of `from_pretrained` that choose among the weights files of a checkpoint.

    Attributes:
        use_safetensors: True for safetensors files only, False for pickles only, None for either.
        variant: A part of the names before their suffix, as `"fp16"` in `model.fp16.safetensors`.
    """

    use_safetensors: bool | None = None
    variant: str | None = None

    def names(self) -> tuple[str, ...]:
        """Names of the weights in a folder, in order of preference."""
        names = [
            name
            for name in WEIGHT_NAMES
            if self.use_safetensors is None or self.use_safetensors == (".safetensors" in name)
        ]
        return tuple(add_variant(name, self.variant) for name in names)

    def check_file(self, file: Path) -> None:
        """Check the arguments for a file that the user named.

        Raises:
            ValueError: If they ask for another file.
        """
        is_safe = ".safetensors" in file.name
        if self.use_safetensors is not None and self.use_safetensors != is_safe:
            kind = "a safetensors file" if is_safe else "a pickle"
            raise ValueError(f"{os.fspath(file)!r} is {kind}, and {describe('use_safetensors', self.use_safetensors)}")
        if self.variant is not None and f".{self.variant}." not in file.name:
            raise ValueError(f"{os.fspath(file)!r} is a file, and its name does not have variant={self.variant!r}")


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


ANY_FILE = FileChoice()


def find_checkpoint(
    name_or_path: str | os.PathLike[str], hub: HubOptions, choice: FileChoice = ANY_FILE
) -> CheckpointFiles:
    """Find the files of a checkpoint.

    The name is that of a folder, a weights file or a hub repository (`"org/name"`). Files of a repository are
    downloaded if they are not in the cache.

    Raises:
        FileNotFoundError: If there is no checkpoint.
        TypeError: If the name is neither a string nor a path object.
        ValueError: If the name is empty, an index of shards is not valid, or the arguments do not fit a file.
    """
    path = as_path("the checkpoint", name_or_path).expanduser()
    name = os.fspath(name_or_path)
    if path.exists():
        path = local_folder(path, hub)
    if path.is_dir():
        return _in_folder(name, path, choice)
    if path.is_file():
        choice.check_file(path)
        return CheckpointFiles(name, _config_in(path.parent), _shards(path))
    repository = Repository(name, hub)
    weights = repository.fetch_first(choice.names())
    shards = [weights]
    if is_index(weights):
        shards = [repository.fetch(shard) for shard in _shard_names(weights)]
    return CheckpointFiles(name, repository.fetch_optional(CONFIG_NAME), shards)


def find_config(name_or_path: str | os.PathLike[str], hub: HubOptions) -> CheckpointFiles:
    """`find_checkpoint` without weights, for a state dict that the user passes."""
    path = as_path("the checkpoint", name_or_path).expanduser()
    name = os.fspath(name_or_path)
    if path.exists():
        path = local_folder(path, hub)
        return CheckpointFiles(name, _config_in(path if path.is_dir() else path.parent))
    return CheckpointFiles(name, Repository(name, hub).fetch_first((CONFIG_NAME,)))


def is_index(file: Path) -> bool:
    """Whether a file is an index of shards, such as `model.safetensors.index.json`."""
    return file.suffix == ".json" and ".index." in file.name


def _config_in(folder: Path) -> Path | None:
    config = folder / CONFIG_NAME
    return config if config.is_file() else None


def _in_folder(name: str, folder: Path, choice: FileChoice) -> CheckpointFiles:
    names = choice.names()
    found = next((folder / weights for weights in names if (folder / weights).is_file()), None)
    if found is None:
        place = name if Path(name).expanduser() == folder else os.fspath(folder)
        raise FileNotFoundError(f"the folder {place!r} does not contain weights (expected {' or '.join(names)})")
    return CheckpointFiles(name, _config_in(folder), _shards(found))


def _shards(file: Path) -> list[Path]:
    if not is_index(file):
        return [file]
    shards = [file.parent / name for name in _shard_names(file)]
    missing = [shard.name for shard in shards if not shard.is_file()]
    if missing:
        raise FileNotFoundError(f"{os.fspath(file)!r} lists shards that are not in its folder: {', '.join(missing)}")
    return shards


def _shard_names(index: Path) -> Sequence[str]:
    """Names of the files that an index lists.

    Raises:
        ValueError: If there are none, or a name leads out of the folder.
    """
    weight_map = read_json_object(index).get("weight_map")
    names = sorted(set(weight_map.values())) if isinstance(weight_map, dict) else []
    if not names or any(not isinstance(name, str) or Path(name).name != name for name in names):
        raise ValueError(f"{os.fspath(index)!r} does not have a weight_map from parameters to files of its folder")
    return names
