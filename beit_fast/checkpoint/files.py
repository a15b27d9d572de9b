"""Where a checkpoint's files are, locally or on the hub, and what they hold: safetensors, shards, pickled tensors."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..utils.files import CONFIG_NAME, find_json_file, read_json_object

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
WEIGHT_NAMES = (WEIGHTS_NAME, INDEX_NAME, "pytorch_model.bin", "pytorch_model.bin.index.json")
"""What a folder's weights are called, best first."""

PICKLE_SUFFIXES = (".bin", ".pth", ".pt", ".ckpt")
SAFE_PICKLE_VERSION = (2, 10)
"""Before torch 2.10 `weights_only=True` could be made to run code (GHSA-63cw-57p8-fm3p)."""

_WRAPPERS = ("model", "module", "state_dict")
_LARGE = 1 << 30


@dataclass(frozen=True)
class HubOptions:
    """How `huggingface_hub` finds a repository's files; None leaves it its own default."""

    revision: str | None = None
    cache_dir: str | os.PathLike[str] | None = None
    token: str | bool | None = None
    local_files_only: bool = False


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
    repository = _Repository(_checked_repository(name), hub)
    weights = repository.fetch_first(WEIGHT_NAMES)
    shards = [weights]
    if weights.name.endswith(".index.json"):
        shards = [repository.fetch(shard) for shard in _shard_names(weights)]
    return CheckpointFiles(name, repository.fetch_optional(CONFIG_NAME), shards)


def find_options(name_or_path: str | os.PathLike[str], file_name: str, what: str, hub: HubOptions) -> Path:
    """A JSON file beside a checkpoint: in a folder or a hub repository, or given by its own path.

    Raises:
        FileNotFoundError: nothing is there; `what` says what was looked for.
    """
    name, path = os.fspath(name_or_path), Path(name_or_path)
    if not path.exists() and "/" in name and is_repository_name(name):
        return _Repository(_checked_repository(name), hub).fetch_first((file_name,))
    return find_json_file(path, file_name, what)


def is_repository_name(name: str) -> bool:
    """Whether `name` could be `"name"` or `"org/name"` on the hub, rather than a path."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not name.endswith((".json", ".safetensors", *PICKLE_SUFFIXES))


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


def _checked_repository(name: str) -> str:
    if not is_repository_name(name):
        raise FileNotFoundError(
            f"no checkpoint at {name!r}: there is no such file or folder, and it is no hub repository's name; "
            f"accepted: a folder with {CONFIG_NAME} and {WEIGHTS_NAME}, a file of weights, or 'org/name'"
        )
    return name


class _Repository:
    """One revision of a hub repository; the first lost connection turns to the cache alone."""

    def __init__(self, name: str, hub: HubOptions) -> None:
        self.name = name
        self.hub = hub
        self.local_files_only = hub.local_files_only

    def fetch(self, file: str) -> Path:
        return self.fetch_first((file,))

    def fetch_optional(self, file: str) -> Path | None:
        found, _ = self._fetch(file)
        return found

    def fetch_first(self, files: Sequence[str]) -> Path:
        """The first of `files` that the repository has, else one error that names them all."""
        reason: Exception | None = None
        for file in files:
            found, error = self._fetch(file)
            if found is not None:
                return found
            reason = reason or error
        raise FileNotFoundError(self._explain(files, reason)) from reason

    def _fetch(self, file: str) -> tuple[Path | None, Exception | None]:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

        try:
            found = hf_hub_download(
                self.name,
                file,
                revision=self.hub.revision,
                cache_dir=self.hub.cache_dir,
                token=self.hub.token,
                local_files_only=self.local_files_only,
            )
        except LocalEntryNotFoundError as error:
            self.local_files_only = True
            return None, error
        except EntryNotFoundError as error:
            return None, error
        except (HfHubHTTPError, OSError) as error:
            raise FileNotFoundError(self._explain((file,), error)) from error
        return Path(found), None

    def _explain(self, files: Sequence[str], reason: Exception | None) -> str:
        from huggingface_hub.constants import HF_HUB_CACHE

        cache = os.fspath(self.hub.cache_dir or HF_HUB_CACHE)
        if self.hub.local_files_only:
            why = "local_files_only=True was asked for"
        else:
            why = str(reason).strip().splitlines()[0] if reason is not None and str(reason).strip() else repr(reason)
        return (
            f"no checkpoint {self.name!r}: there is no such folder or file here, and the hub's repository of that "
            f"name gave none of {', '.join(files)} at revision {self.hub.revision or 'main'!r}, neither from the "
            f"cache {cache!r} nor from the network ({why}). Without a network, pass the path of a local folder "
            f"with {CONFIG_NAME} and {WEIGHTS_NAME} instead of the name"
        )


@contextmanager
def unfinished_folder(folder: Path) -> Iterator[Path]:
    """A new folder inside `folder` for what is being written; it is gone afterwards, with all still in it.

    Those that killed processes of this machine left there are removed too.
    """
    import platform
    import shutil
    import tempfile

    prefix = f".unfinished-{platform.node()}-"
    for left in folder.glob(f"{prefix}*"):
        if not _is_running(left.name.removeprefix(prefix).partition("-")[0]):
            shutil.rmtree(left, ignore_errors=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f"{prefix}{os.getpid()}-", dir=folder))
    try:
        yield unfinished
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _is_running(process: str) -> bool:
    """Whether a process of that number runs; True where that cannot be told."""
    if os.name != "posix" or not process.isdecimal():
        return True
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def flush_to_disk(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
