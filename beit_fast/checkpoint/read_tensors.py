"""Read the tensors of weights files: safetensors, and pickles without running code."""

from __future__ import annotations

import argparse
import os
import pickle
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..utils.hub import PICKLE_SUFFIXES
from ..utils.messages import count_of, join_some
from .training_files import FoundWeights, find_state_dict, script_options
from .wrappers import averaging_counter, choose_average

SAFE_PICKLE_VERSION = (2, 10)
"""Before torch 2.10, a file could run code despite `weights_only=True` (GHSA-63cw-57p8-fm3p)."""

_LARGE = 1 << 30
_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_OBJECT = re.compile(r"GLOBAL ([\w.]+)")


class StoredTensors(NamedTuple):
    """Tensors of a checkpoint, by their names in the files.

    Attributes:
        tensors: The tensors by name.
        entry: The entry of the file that was read, or None for a plain state dict.
        average: The entry or prefix of the averaged weights, or the name of their counter, if these were read.
        left_aside: Other entries of the file and names of tensors, which were not read.
        options: Options of the training script.
    """

    tensors: dict[str, Tensor]
    entry: str | None = None
    average: str | None = None
    left_aside: tuple[str, ...] = ()
    options: Mapping[str, Any] = MappingProxyType({})


def read_tensors(
    files: Sequence[Path], device: torch.device | str = "cpu", use_ema: bool | None = None
) -> StoredTensors:
    """Read all tensors to `device`.

    A progress bar is shown for several files or more than 1 GiB.

    Args:
        files: All shards.
        device: Where the tensors are read to.
        use_ema: Whether to read averaged weights; None reads them if there are any.

    Raises:
        ValueError: If a file is damaged, has an unknown format, repeats a name, or contains objects other than tensors
            and plain data. Also if it has parameters without elements, or does not have the weights that `use_ema`
            selects.
    """
    from tqdm import tqdm

    size = sum(file.stat().st_size for file in files)
    state: dict[str, Tensor] = {}
    weights: FoundWeights | None = None
    options: Mapping[str, Any] = {}
    quiet = len(files) < 2 and size < _LARGE
    with tqdm(total=size, unit="B", unit_scale=True, desc="Loading weights", disable=quiet or None, leave=False) as bar:
        for file in files:
            if file.suffix == ".safetensors":
                found = FoundWeights(_read_safetensors(file, device), None, False, ())
            else:
                content = _read_pickle(file, device)
                found = find_state_dict(content, os.fspath(file), use_ema)
                options = options or script_options(content)
            weights = weights or found
            for key, tensor in found.tensors.items():
                if key in state:
                    raise ValueError(f"{os.fspath(file)!r} contains {key!r}, which another shard also contains")
                state[key] = tensor
                bar.update(tensor.nbytes)
    if weights is None:
        return StoredTensors({})
    stored = _one_model(weights._replace(tensors=state), os.fspath(files[0]), use_ema)
    return stored._replace(options=options)


def tensors_of(state_dict: Mapping[str, object], device: torch.device | str, use_ema: bool | None) -> StoredTensors:
    """Copy the tensors of a state dict to `device`.

    It may be inside the dictionary of a training script.

    Raises:
        ValueError: As in `read_tensors`.
    """
    found = find_state_dict(state_dict, "state_dict", use_ema)
    copies = {name: tensor.detach().to(device, copy=True) for name, tensor in found.tensors.items()}
    return _one_model(found._replace(tensors=copies), "state_dict", use_ema)._replace(
        options=script_options(state_dict)
    )


def _one_model(found: FoundWeights, name: str, use_ema: bool | None) -> StoredTensors:
    """Choose between a model and its average by names; check the result."""
    chosen = choose_average(found.tensors, use_ema, found.is_averaged)
    mark = chosen.average or averaging_counter(chosen.tensors)
    left_aside = (*found.left_aside, *chosen.left_aside)
    if use_ema is False and mark is not None:
        raise ValueError(f"{name!r} contains only averaged weights (it has {mark!r}), and use_ema=False")
    average = found.entry if found.is_averaged else mark
    if use_ema and average is None:
        entries = f"; its other entries are {join_some(map(repr, left_aside))}" if left_aside else ""
        raise ValueError(f"{name!r} does not contain averaged weights, and use_ema=True{entries}")
    empty = [key for key, tensor in chosen.tensors.items() if tensor.numel() == 0]
    if empty:
        raise ValueError(
            f"{name!r} contains {count_of(len(empty), 'tensor')} without elements: {join_some(empty, 5)} (expected all "
            "parameters; DeepSpeed's ZeRO-3 divides them among files, which its zero_to_fp32.py merges)"
        )
    return StoredTensors(chosen.tensors, found.entry, average, left_aside)


def _read_safetensors(file: Path, device: torch.device | str) -> dict[str, Tensor]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt", device=str(device)) as stored:
            return {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{os.fspath(file)!r} is damaged or not a safetensors file: {error}") from error


def _read_pickle(file: Path, device: torch.device | str) -> Any:
    check_pickle_is_safe(file)
    # Training scripts save their argparse options beside the weights: plain data.
    with torch.serialization.safe_globals([argparse.Namespace]):
        try:
            return torch.load(file, map_location=device, weights_only=True)
        except pickle.UnpicklingError as error:
            raise ValueError(
                f"{os.fspath(file)!r} contains objects other than tensors and plain data, and was not loaded: "
                f"{_foreign_objects(file, error)}. If you trust the file, convert it: read its state dict in the "
                "program that wrote it, then safetensors.torch.save_file(state_dict, 'model.safetensors')"
            ) from None
        except (RuntimeError, EOFError) as error:
            raise ValueError(f"{os.fspath(file)!r} is damaged or not a file of torch.save: {error}") from error


def _foreign_objects(file: Path, error: pickle.UnpicklingError) -> str:
    """Name objects in a pickle that are not plain data, outermost first."""
    outermost = _OBJECT.findall(str(error))
    try:
        found = set(torch.serialization.get_unsafe_globals_in_checkpoint(file))
    except Exception:  # a pickle of an older format
        found = set(outermost)
    names = [*found.intersection(outermost), *sorted(found.difference(outermost))]  # torch lists them in any order
    if names:
        return join_some(names)
    lines = [line.strip() for line in _ANSI.sub("", str(error)).rpartition("WeightsUnpickler error:")[2].splitlines()]
    return next((line for line in lines if line), type(error).__name__).rstrip(".")


def check_pickle_is_safe(file: Path) -> None:
    """Check the suffix of a pickle and the version of torch.

    Versions of torch before 2.10 do not read pickles safely.

    Raises:
        ValueError: If the file is not a weights file, or torch is too old.
    """
    if not file.name.endswith(PICKLE_SUFFIXES):
        *suffixes, last = (".safetensors", ".index.json", *PICKLE_SUFFIXES)
        raise ValueError(f"{os.fspath(file)!r} is not a weights file (expected {', '.join(suffixes)} or {last})")
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < SAFE_PICKLE_VERSION:
        raise ValueError(
            f"{os.fspath(file)!r} is a pickle, and torch {torch.__version__} cannot read pickles safely "
            "(GHSA-63cw-57p8-fm3p; expected a safetensors file, or torch 2.10 or later)"
        )
