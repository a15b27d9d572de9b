"""A model spread over devices, host memory and disk, by the package accelerate: what `device_map` asks for."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from typing import Any

import torch

from .protocol import PretrainedModel

DeviceMap = str | int | torch.device | Mapping[str, int | str | torch.device]

STRATEGIES = ("auto", "balanced", "balanced_low_0", "sequential")
"""Names that have accelerate decide; any other string is a device."""


def check(device: Any, device_map: DeviceMap | None, **only_with_a_map: Any) -> None:
    """Refuse what does not go together, before anything is loaded.

    Raises:
        ValueError: `device` beside `device_map`, or an argument that does nothing without `device_map`.
        ImportError: accelerate is not installed.
    """
    if device_map is None:
        idle = [name for name, value in only_with_a_map.items() if value is not None]
        if idle:
            raise ValueError(f"{' and '.join(idle)} say how device_map spreads a model; without it they do nothing")
        return
    if device is not None:
        raise ValueError(f"{device=} and {device_map=} both say where the parameters go; give one")
    if importlib.util.find_spec("accelerate") is None:
        raise ImportError("device_map needs the package accelerate: pip install accelerate")


def dispatch(
    model: PretrainedModel,
    device_map: DeviceMap,
    max_memory: Mapping[int | str, int | str] | None = None,
    offload_folder: str | os.PathLike[str] | None = None,
) -> None:
    """Place the model's layers, and have hooks bring inputs, and weights from host memory or disk, to where they run.

    `model.hf_device_map` tells the place of every part afterwards. Modules with hooks are called as modules: what else
    stands in for them in one operator, such as patch embedding, does not.

    Args:
        device_map: `"auto"`, `"balanced"`, `"balanced_low_0"` or `"sequential"`, which fill the devices that are there
            and never split a block; a device for all; or devices, `"cpu"` or `"disk"` by names of modules.
        max_memory: what those strategies may take of each device, by index or `"cpu"`, in bytes or as in `"10GB"`.
        offload_folder: where weights go that are placed on `"disk"`.
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
