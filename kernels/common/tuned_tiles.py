"""Tiles that `beit-fast tune` measured on this machine. They replace those of the tables.

A launcher calls `find`. The file of a GPU is read once in a process, at the first launch there; BEIT_FAST_TUNED=0
leaves it unread. Tiles are stored for one GPU, Triton, version of the package and hash of the kernels' sources.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import re
import reprlib
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

VARIABLE = "BEIT_FAST_TUNED"
FORMAT = 1
"""Version of the file's format."""
LARGEST_BLOCK = 128
"""Largest side of a tile: margins and padded rows are that long."""

TILE_FIELDS = {
    "forward": ("block_m", "block_n", "num_warps", "num_stages"),
    "backward_dkv": ("block_m", "block_n", "num_warps", "num_stages"),
    "backward_dq": ("block_m", "block_n", "num_warps", "num_stages"),
    "backward_dbias": ("block_m", "block_n", "num_warps", "num_stages"),
    "linear_gelu": ("block_m", "block_n", "block_k", "num_warps", "num_stages"),
    "residual_norm": ("num_warps",),
    "residual_norm_backward": ("num_warps", "programs_per_sm"),
}
"""Kernels that can be tuned, and the fields of a tile of each."""

MOST = {"num_warps": 32, "num_stages": 8, "programs_per_sm": 32}
"""Largest accepted value of the other fields of a tile."""
LARGEST_AMOUNT = 2**40
LONGEST = 3600.0
"""Most seconds of one launch."""

Tile = tuple[int, ...]


class Identity(NamedTuple):
    """What a measurement holds for."""

    gpu: str
    capability: str
    triton: str
    beit_fast: str
    kernels: str  # hash of their sources


class Measured(NamedTuple):
    """The fastest tile of one kernel for one shape."""

    kernel: str  # one of TILE_FIELDS
    variant: str  # dtype and sizes, which have to be equal
    amount: int  # rows, or heads of all samples; the nearest measured one is taken
    tile: Tile
    seconds: float
    shipped_seconds: float  # of the tile in the tables


class UnusableFileError(ValueError):
    """A file of tuned tiles that is damaged or for other versions."""


_forced: dict[str, Tile] = {}
_read: dict[int, dict[tuple[str, str], list[Measured]]] = {}
_INTERPRETER = -1


def find(kernel: str, variant: str, amount: int, tensor: Tensor) -> Tile | None:
    """Return the tuned tile of a launch, or None if not measured.

    Args:
        kernel: One of TILE_FIELDS.
        variant: dtype and sizes that the measurement has to share.
        amount: Rows, or heads of all samples.
        tensor: A tensor on the device of the launch.
    """
    if kernel in _forced:
        return _forced[kernel]
    measured = _tiles_on(tensor).get((kernel, variant))
    if not measured:
        return None
    return min(measured, key=lambda entry: abs(math.log(entry.amount / max(amount, 1)))).tile


def dtype_name(tensor: Tensor) -> str:
    """Return the dtype of a tensor as variants name it: "float16"."""
    return str(tensor.dtype).removeprefix("torch.")


@contextmanager
def force(kernel: str, tile: Tile) -> Iterator[None]:
    """Launch `kernel` with `tile` inside the context, in this process."""
    before = dict(_forced)
    _forced[kernel] = tuple(tile)
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(before)


def forced_tile(kernel: str) -> Tile | None:
    """Return the tile of `kernel` that `force` set, or None."""
    return _forced.get(kernel)


def is_enabled() -> bool:
    """Return whether tuned tiles may be used. BEIT_FAST_TUNED=0 switches them off.

    Raises:
        ValueError: If the variable has another value than 0 and 1.
    """
    value = os.environ.get(VARIABLE) or "1"
    if value not in ("0", "1"):
        raise ValueError(f"{VARIABLE}={value!r} is not supported (expected '0' or '1', or unset)")
    return value == "1"


def forget_read_files() -> None:
    """Read the files again at the next launch."""
    _read.clear()


def identity_of(device: torch.device) -> Identity:
    """Return the identity of a CUDA device.

    For a CPU it is that of Triton's interpreter.
    """
    gpu, capability = "interpreter", "0.0"
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        gpu, capability = properties.name, f"{properties.major}.{properties.minor}"
    return Identity(gpu, capability, triton.__version__, _package_version(), _sources_hash())


def folder() -> Path:
    """Return the folder of tuned tiles in the user's cache (XDG_CACHE_HOME)."""
    # The XDG specification ignores a relative path.
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "")
    return (cache if cache.is_absolute() else Path.home() / ".cache") / "beit_fast" / "tuned"


def file_of(identity: Identity) -> Path:
    """Return the path of the tiles of an identity."""
    gpu = re.sub(r"[^a-z0-9]+", "-", identity.gpu.lower()).strip("-")
    versions = f"triton-{identity.triton}-beit_fast-{identity.beit_fast}-{identity.kernels}"
    return folder() / f"{gpu}-{identity.capability}" / f"{versions}.json"


def read(file: Path, identity: Identity) -> list[Measured]:
    """Read a file of tuned tiles.

    Raises:
        UnusableFileError: If the file is damaged, or was written for another identity.
        FileNotFoundError: If there is no such file.
    """
    try:
        content = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise UnusableFileError(f"it cannot be read as JSON ({error})") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UnusableFileError(f"it does not have format {FORMAT}")
    written_for = content.get("identity")
    if written_for != identity._asdict():
        raise UnusableFileError(f"it was written for {_short(written_for)}, not for {identity._asdict()}")
    entries = content.get("tiles")
    if not isinstance(entries, list):
        raise UnusableFileError("it has no list of tiles")
    return [_checked(entry) for entry in entries]


def content_of(identity: Identity, entries: list[Measured]) -> dict[str, Any]:
    """Return the content of a file, for JSON."""
    return {
        "format": FORMAT,
        "identity": identity._asdict(),
        "tiles": [{**entry._asdict(), "tile": list(entry.tile)} for entry in entries],
    }


def _tiles_on(tensor: Tensor) -> dict[tuple[str, str], list[Measured]]:
    index = tensor.device.index if tensor.is_cuda else _INTERPRETER
    if index not in _read:
        # A capture must not wait for a disk. Launch once before it, as torch asks for.
        if tensor.is_cuda and torch.cuda.is_current_stream_capturing():
            return {}
        _read[index] = _load(tensor.device) if is_enabled() else {}
    return _read[index]


def _load(device: torch.device) -> dict[tuple[str, str], list[Measured]]:
    identity = identity_of(device)
    file = file_of(identity)
    try:
        entries = read(file, identity)
    except FileNotFoundError:
        return {}
    except UnusableFileError as error:
        warnings.warn(
            f"the tuned tiles in {file} are ignored: {error}. `beit-fast tune` writes the file again, "
            "`beit-fast tune --forget` removes it",
            RuntimeWarning,
            stacklevel=2,
        )
        return {}
    tiles: dict[tuple[str, str], list[Measured]] = {}
    for entry in entries:
        tiles.setdefault((entry.kernel, entry.variant), []).append(entry)
    return tiles


def _checked(entry: Any) -> Measured:
    """Return an entry of a file after checking it.

    Raises:
        UnusableFileError: If a field is missing, or has a type or a value that no measurement has.
    """
    if not isinstance(entry, dict) or set(entry) != set(Measured._fields):
        raise UnusableFileError(f"{_short(entry)} is not a measurement (expected {', '.join(Measured._fields)})")
    for name, value in entry.items():
        accepted = _unmet(name, value)
        if accepted is not None:
            raise UnusableFileError(f"{name} {_short(value)} of a measurement is not supported (expected {accepted})")
    names = TILE_FIELDS[entry["kernel"]]
    if len(entry["tile"]) != len(names) or not all(map(_fits, names, entry["tile"])):
        expected = f"{', '.join(names)} in their limits"
        raise UnusableFileError(f"{_short(entry['tile'])} is not a tile of {entry['kernel']} (expected {expected})")
    return Measured(**{**entry, "tile": tuple(entry["tile"])})


def _unmet(name: str, value: Any) -> str | None:
    """Return what a field accepts if it does not accept `value`."""
    if name == "kernel":
        return None if isinstance(value, str) and value in TILE_FIELDS else f"one of {', '.join(TILE_FIELDS)}"
    if name == "variant":
        return None if isinstance(value, str) else "text"
    if name == "tile":
        return None if isinstance(value, list) else "a list of integers"
    if name == "amount":
        return None if type(value) is int and 1 <= value <= LARGEST_AMOUNT else f"an integer, 1 to {LARGEST_AMOUNT}"
    # A NaN is in no interval.
    return None if type(value) in (int, float) and 0 <= value <= LONGEST else f"seconds, 0 to {LONGEST:.0f}"


def _fits(name: str, value: Any) -> bool:
    """Return whether a field of a tile can be launched."""
    if type(value) is not int:  # a bool is not a number of warps
        return False
    # Sides and warps of a kernel are powers of two; a longer side would read past the margins.
    if name.startswith("block"):
        return 16 <= value <= LARGEST_BLOCK and value & (value - 1) == 0
    return 1 <= value <= MOST[name] and (name != "num_warps" or value & (value - 1) == 0)


def _short(value: Any) -> str:
    """Return a short representation of a value from a file."""
    shortened = reprlib.Repr()
    shortened.maxdict = len(Measured._fields)
    return shortened.repr(value)


def _package_version() -> str:
    """Return the version of the package, without importing it."""
    package = sys.modules.get(__name__.partition(".")[0])
    return str(getattr(package, "__version__", "unknown"))


@functools.cache
def _sources_hash() -> str:
    """Return a hash of the Python files of all kernels."""
    files = sorted(Path(__file__).parents[1].glob("*/*.py"))
    # aot/ is not part of the wheel.
    sources = b"".join(file.read_bytes() for file in files if file.parent.name != "aot")
    return hashlib.sha256(sources).hexdigest()[:16]
