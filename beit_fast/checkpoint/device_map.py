"""Split a model over devices, host memory and disk with accelerate: the argument `device_map`."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from typing import Any

import torch

from .protocol import PretrainedModel

DeviceMap = str | int | torch.device | Mapping[str, int | str | torch.device]

STRATEGIES = ("auto", "balanced", "balanced_low_0", "sequential")
"""Strategies of accelerate; any other string is a device."""


def check(device: Any, device_map: DeviceMap | None, **only_with_a_map: Any) -> None:
    """Check arguments that depend on `device_map`, before a file is read.

    Args:
        device: The argument `device`.
        device_map: The argument `device_map`.
        only_with_a_map: Arguments without effect if there is no `device_map`.

    Raises:
        ValueError: If both `device` and `device_map` are set, or an argument has no effect.
        ImportError: If accelerate is not installed.
    """
    if device_map is None:
        unused = [name for name, value in only_with_a_map.items() if value is not None]
        if unused:
            raise ValueError(f"{' and '.join(unused)} have no effect without device_map")
        return
    if device is not None:
        raise ValueError(f"{device=} and {device_map=} both place the parameters; pass one of them")
    if importlib.util.find_spec("accelerate") is None:
        raise ImportError("device_map requires accelerate: pip install accelerate")


def dispatch(
    model: PretrainedModel,
    device_map: DeviceMap,
    max_memory: Mapping[int | str, int | str] | None = None,
    offload_folder: str | os.PathLike[str] | None = None,
) -> None:
    """Place a model's layers on devices, with hooks that move tensors.

    `model.hf_device_map` is the device of every module afterwards. Modules with hooks are called as modules, so
    operators that replace several modules, such as patch embedding, are not used.

    Args:
        model: A model whose parameters have values.
        device_map: `"auto"`, `"balanced"`, `"balanced_low_0"` or `"sequential"`, which fill the available devices
            and never split a block; one device; or a mapping from module names to devices, `"cpu"` or `"disk"`.
        max_memory: Maximum memory of each device for these strategies, by index or `"cpu"`, in bytes or as in
            `"10GB"`.
        offload_folder: The folder for weights on `"disk"`.
    """
    import accelerate

    places = _places(model, device_map, max_memory)
    accelerate.dispatch_model(model, places, offload_dir=offload_folder)


def _places(model: PretrainedModel, device_map: DeviceMap, max_memory: Mapping[int | str, int | str] | None) -> Any:
    from accelerate.utils import get_balanced_memory, infer_auto_device_map

    if isinstance(device_map, Mapping):
        return dict(device_map)
    if device_map not in STRATEGIES:
        return {"": device_map}
    limits = dict(max_memory) if max_memory is not None else None
    whole = model._no_split_modules
    if device_map != "sequential":
        limits = get_balanced_memory(
            model, limits, no_split_module_classes=whole, low_zero=device_map == "balanced_low_0"
        )
    return infer_auto_device_map(model, limits, no_split_module_classes=whole)
