"""Read the tensors of a pickled module without running its code.

`torch.load(weights_only=True)` refuses such files, because a module is an object of the program that wrote it. Here
every object becomes a record of its attributes. No class is imported, and no function of the file is called. Both
formats of `torch.save` are read: zip archives, and the plain pickles of torch before 1.6.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor

from ...utils.messages import join_some

_PLAIN_MAGIC = 0x1950A86A20F9469CFC6C
_PLAIN_VERSION = 1001

_DTYPES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_MODULES = ("dall_e.", "torch.nn.modules.")
"""Prefixes of the modules whose classes become records."""


class _Storage(NamedTuple):
    """The place of numbers in the file."""

    key: str
    dtype: torch.dtype


class _StoredTensor(NamedTuple):
    """A tensor of the pickle before its numbers are read."""

    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


class _Record:
    """The attributes of an object in the pickle; its class is not imported."""

    def __init__(self, *unused: Any) -> None:
        self.attributes: dict[str, Any] = {}

    def __setstate__(self, state: Any) -> None:
        self.attributes = state if isinstance(state, dict) else {}


class _Mapping(dict[Any, Any]):
    """An OrderedDict of the pickle; attributes such as `_metadata` are dropped."""

    def __setstate__(self, state: Any) -> None:
        del state


class _RecordUnpickler(pickle.Unpickler):
    """An unpickler that builds records, mappings and places of tensors.

    `refused` has the names of other objects. They become empty records, so that the error can list all of them.
    """

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file)
        self.refused: dict[str, None] = {}

    def find_class(self, module: str, name: str) -> Any:
        """Return what stands for a class or function of the file; nothing is imported."""
        qualified = f"{module}.{name}"
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        if qualified in _REPLACEMENTS:
            return _REPLACEMENTS[qualified]()
        if not f"{module}.".startswith(_MODULES):
            self.refused[qualified] = None
        return _Record

    def persistent_load(self, pid: Any) -> Any:
        """Return the place of a storage, or a record class."""
        if pid[0] == "module":
            return pid[1]
        kind, dtype, key, _, _, *views = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype) or any(view is not None for view in views):
            raise pickle.UnpicklingError(f"it has the unknown reference {kind!r}")
        return _Storage(str(key), dtype)


def _tensor_builder() -> Callable[..., _StoredTensor]:
    # A new function for each file: a pickle can set attributes of functions.
    def build(storage: Any, offset: Any, size: Any, stride: Any, *unused: Any) -> _StoredTensor:
        numbers = (offset, *size, *stride)
        if not isinstance(storage, _Storage) or any(type(number) is not int or number < 0 for number in numbers):
            raise pickle.UnpicklingError("a tensor has no valid shape")
        return _StoredTensor(storage, offset, tuple(size), tuple(stride))

    return build


def _parameter_builder() -> Callable[..., Any]:
    return lambda data, *unused: data


_REPLACEMENTS: Mapping[str, Callable[[], Any]] = {
    "torch._utils._rebuild_tensor": _tensor_builder,
    "torch._utils._rebuild_tensor_v2": _tensor_builder,
    "torch._utils._rebuild_parameter": _parameter_builder,
    "torch.device": lambda: lambda *names: ":".join(map(str, names)),
    "collections.OrderedDict": lambda: _Mapping,
    "builtins.set": lambda: set,
    "__builtin__.set": lambda: set,
}


def read_module_tensors(file: Path) -> dict[str, Tensor]:
    """Return the tensors of a pickled module or state dict by name.

    They are views of the bytes of the file.

    Raises:
        ValueError: If the file is damaged, is not one of `torch.save`, or contains other objects; the error names all
            of them.
    """
    refused: dict[str, None] = {}
    try:
        if zipfile.is_zipfile(file):
            root, storages = _read_archive(file, refused)
        else:
            root, storages = _read_plain(file, refused)
        tensors = {} if refused else _tensors_of(root, storages)
    except Exception as error:  # a damaged pickle raises anything
        if not refused:
            reason = str(error) or type(error).__name__
            raise ValueError(f"{os.fspath(file)!r} is damaged or not a file of torch.save: {reason}") from error
    if refused:
        raise ValueError(
            f"{os.fspath(file)!r} contains objects other than tensors and modules of dall_e and torch.nn, and was not "
            f"loaded: {join_some(refused)}"
        )
    return tensors


def _unpickle(file: IO[bytes], refused: dict[str, None]) -> Any:
    unpickler = _RecordUnpickler(file)
    unpickler.refused = refused
    return unpickler.load()


def _read_archive(file: Path, refused: dict[str, None]) -> tuple[Any, dict[str, Tensor]]:
    """Read a zip archive: `NAME/data.pkl` and the bytes of each storage in `NAME/data/KEY`."""
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise pickle.UnpicklingError("its entries are compressed")
        names = [entry.filename for entry in entries]
        pickles = [name for name in names if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise pickle.UnpicklingError(f"it has {len(pickles)} entries data.pkl (expected 1)")
        prefix = pickles[0].removesuffix("data.pkl")
        if f"{prefix}byteorder" in names and archive.read(f"{prefix}byteorder") != b"little":
            raise pickle.UnpicklingError("its numbers are big-endian (expected little-endian)")
        with archive.open(pickles[0]) as stored:
            root = _unpickle(io.BytesIO(stored.read()), refused)
        data = f"{prefix}data/"
        keys = [name.removeprefix(data) for name in names if name.startswith(data)]
        return root, {key: _bytes(archive.read(data + key)) for key in keys}


def _read_plain(file: Path, refused: dict[str, None]) -> tuple[Any, dict[str, Tensor]]:
    """Read five pickles, then each storage: its number of elements (8 bytes) and its bytes."""
    with file.open("rb") as stream:
        if stream.read(2) == b"PK":
            raise pickle.UnpicklingError("it is a zip archive without its list of entries, so its end is missing")
        stream.seek(0)
        if (_unpickle(stream, refused), _unpickle(stream, refused)) != (_PLAIN_MAGIC, _PLAIN_VERSION):
            raise pickle.UnpicklingError("it does not begin as such a file")
        system = _unpickle(stream, refused)
        if not system["little_endian"]:
            raise pickle.UnpicklingError("its numbers are big-endian (expected little-endian)")
        root = _unpickle(stream, refused)
        sizes = {place.key: place.dtype.itemsize for place in _places_of(root)}
        storages = {}
        for key in _unpickle(stream, refused):
            count = int.from_bytes(stream.read(8), "little")
            length = count * sizes[key] if key in sizes else 0
            if key not in sizes or length > os.path.getsize(file):
                raise pickle.UnpicklingError(f"the storage {key!r} has no valid length")
            storages[key] = _bytes(stream.read(length))
        return root, storages


def _bytes(content: bytes) -> Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8) if content else torch.empty(0, dtype=torch.uint8)


def _tensors_of(root: Any, storages: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: _tensor(name, stored, storages) for name, stored in _named(root).items()}


def _places_of(root: Any) -> list[_Storage]:
    return [stored.storage for stored in _named(root).values()]


def _named(root: Any, prefix: str = "") -> dict[str, _StoredTensor]:
    """Return the stored tensors of a record or state dict by name."""
    if isinstance(root, dict):
        return {f"{prefix}{name}": value for name, value in root.items() if isinstance(value, _StoredTensor)}
    if not isinstance(root, _Record):
        raise pickle.UnpicklingError(f"it contains a {type(root).__name__} (expected a module or a state dict)")
    parts = [root.attributes.get(name) or {} for name in ("_parameters", "_buffers")]
    named = {name: stored for part in parts for name, stored in _named(part, prefix).items()}
    for name, child in (root.attributes.get("_modules") or {}).items():
        if child is not None:
            named |= _named(child, f"{prefix}{name}.")
    return named


def _tensor(name: str, stored: _StoredTensor, storages: Mapping[str, Tensor]) -> Tensor:
    """Return a view of the numbers of a tensor.

    Raises:
        UnpicklingError: If the file is too short for it.
    """
    place, offset, size, stride = stored
    content = storages.get(place.key, torch.empty(0, dtype=torch.uint8))
    length = 0 if 0 in size else 1 + offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if length * place.dtype.itemsize > content.numel() or math.prod(size) > max(content.numel(), 1):
        raise pickle.UnpicklingError(f"{name} has fewer numbers than its shape {list(size)}")
    whole = content[: content.numel() // place.dtype.itemsize * place.dtype.itemsize].view(place.dtype)
    return whole.as_strided(size, stride, offset) if length else whole.new_empty(size)
