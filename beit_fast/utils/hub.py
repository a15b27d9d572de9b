"""Files of Hugging Face hub repositories: download, and the names of weights files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from .files import CONFIG_NAME, find_json_file
from .messages import suggest
from .paths import as_path

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
WEIGHT_NAMES = (WEIGHTS_NAME, INDEX_NAME, "pytorch_model.bin", "pytorch_model.bin.index.json")
"""Names of the weights in a folder, in order of preference."""

PICKLE_SUFFIXES = (".bin", ".pth", ".pt", ".ckpt", ".pth.tar", ".pt.tar")


def add_variant(name: str, variant: str | None) -> str:
    """Insert a variant, as in "model.fp16.safetensors"; None inserts nothing."""
    if variant is None:
        return name
    stem, _, suffix = name.rpartition(".")
    return f"{stem}.{variant}.{suffix}"


class HubOptions(NamedTuple):
    """Arguments of `huggingface_hub`; None selects its default.

    `subfolder` is the folder inside a repository, or inside a local folder.
    """

    revision: str | None = None
    cache_dir: str | os.PathLike[str] | None = None
    token: str | bool | None = None
    local_files_only: bool = False
    force_download: bool = False
    subfolder: str = ""


def find_options(name_or_path: str | os.PathLike[str], file_name: str, what: str, hub: HubOptions) -> Path:
    """Find a JSON file beside a checkpoint.

    Args:
        name_or_path: The file, its folder, or a hub repository such as `"org/name"`.
        file_name: The name of the file in a folder or repository.
        what: The contents of the file, for errors.
        hub: Arguments of `huggingface_hub`.

    Raises:
        FileNotFoundError: If there is no such file or subfolder.
        TypeError, ValueError: If `name_or_path` is not a path, empty, or a file and a subfolder was passed.
    """
    path = as_path(f"the {what}", name_or_path)
    name = os.fspath(name_or_path)
    if not path.exists() and "/" in name and is_repository_name(name):
        return Repository(name, hub).fetch_first((file_name,))
    return find_json_file(local_folder(path, hub), file_name, what)


def local_folder(path: Path, hub: HubOptions) -> Path:
    """Return the subfolder of `path` that `hub` names, if any.

    Raises:
        FileNotFoundError: If the folder does not have the subfolder.
        ValueError: If `path` is a file, and a subfolder was passed.
    """
    if not hub.subfolder:
        return path
    if path.is_file():
        raise ValueError(f"{os.fspath(path)!r} is a file, and subfolder={hub.subfolder!r} expects a folder")
    if path.is_dir() and not (path / hub.subfolder).is_dir():
        raise FileNotFoundError(f"the folder {os.fspath(path)!r} does not contain the subfolder {hub.subfolder!r}")
    return path / hub.subfolder


def is_repository_name(name: str) -> bool:
    """Return whether `name` can be a hub repository.

    The name of a repository is `"name"` or `"org/name"` and not a path to a file.
    """
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not name.endswith((".json", ".safetensors", *PICKLE_SUFFIXES))


class Repository:
    """One revision of a hub repository.

    Without a connection only the cache is used. One request finds this out: `huggingface_hub` would
    send six in half a minute, and print twelve lines.

    Raises:
        FileNotFoundError: If `name` is not a valid repository name.
    """

    def __init__(self, name: str, hub: HubOptions) -> None:
        if not is_repository_name(name):
            raise FileNotFoundError(
                f"no checkpoint at {name!r}: it is not a file, a folder or the name of a hub repository"
                f"{_similar_path(name)} (expected a folder with {CONFIG_NAME} and {WEIGHTS_NAME}, a weights file, or "
                "'org/name')"
            )
        self.name = name
        self.hub = hub
        self.local_files_only = hub.local_files_only
        self._is_asked = False
        self._lost_connection: Exception | None = None

    def fetch(self, file: str) -> Path:
        """Download a file, or find it in the cache.

        Raises:
            FileNotFoundError: If neither the hub nor the cache has the file.
        """
        return self.fetch_first((file,))

    def fetch_optional(self, file: str) -> Path | None:
        """`fetch`, but return None if the repository does not have the file."""
        found, _ = self._fetch(file)
        return found

    def fetch_first(self, files: Sequence[str]) -> Path:
        """`fetch` the first of `files` that the repository has; the error lists all of them."""
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

        self._ask_once(file)
        try:
            found = hf_hub_download(
                self.name,
                file,
                subfolder=self.hub.subfolder or None,
                revision=self.hub.revision,
                cache_dir=self.hub.cache_dir,
                token=self.hub.token,
                local_files_only=self.local_files_only,
                force_download=self.hub.force_download,
            )
        except LocalEntryNotFoundError as error:
            self.local_files_only = True
            return None, self._lost_connection or error
        except EntryNotFoundError as error:
            return None, error
        except (HfHubHTTPError, OSError) as error:
            raise FileNotFoundError(self._explain((file,), error)) from error
        return Path(found), None

    def _ask_once(self, file: str) -> None:
        """Check the connection to the hub, if `file` is not cached."""
        from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
        from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

        if self._is_asked or self.local_files_only or self.hub.force_download:
            return
        path = f"{self.hub.subfolder}/{file}" if self.hub.subfolder else file
        cached = try_to_load_from_cache(self.name, path, cache_dir=self.hub.cache_dir, revision=self.hub.revision)
        if isinstance(cached, str):
            return
        self._is_asked = True
        try:
            get_hf_file_metadata(hf_hub_url(self.name, path, revision=self.hub.revision), token=self.hub.token)
        except (HfHubHTTPError, EntryNotFoundError):
            pass  # the hub has answered; the download reports what is wrong
        except Exception as error:  # the HTTP library, and so its errors, depend on the version of huggingface_hub
            self.local_files_only, self._lost_connection = True, error

    def _explain(self, files: Sequence[str], error: Exception | None) -> str:
        from huggingface_hub.constants import HF_HUB_CACHE

        cache = os.fspath(self.hub.cache_dir or HF_HUB_CACHE)
        if self.hub.local_files_only:
            reason = "local_files_only=True"
        else:
            reason = str(error).strip().splitlines()[0] if error is not None and str(error).strip() else repr(error)
        missing = files[0] if len(files) == 1 else f"any of {', '.join(files)}"
        missing += f" in {self.hub.subfolder!r}" if self.hub.subfolder else ""
        return (
            f"no checkpoint {self.name!r}: there is no such file or folder{_similar_path(self.name)}, and the hub "
            f"repository of that name does not have {missing} at revision {self.hub.revision or 'main'!r}, neither in "
            f"the cache {cache!r} nor on the network ({reason}); without a network, pass a local folder with "
            f"{CONFIG_NAME} and {WEIGHTS_NAME}"
        )


def _similar_path(name: str) -> str:
    """Return " (did you mean 'x'?)" for a path that resembles `name`."""
    path = Path(name).expanduser()
    try:
        names = os.listdir(path.parent)
    except OSError:
        return ""
    return suggest(name, [os.path.join(os.path.dirname(name), each) for each in names])
