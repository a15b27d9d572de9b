"""Split a model over devices, host memory and disk with accelerate: the argument `device_map`."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from .protocol import PretrainedModel

DeviceMap = str | int | torch.device | Mapping[str, int | str | torch.device]

STRATEGIES = ("auto", "balanced", "balanced_low_0", "sequential")
"""Strategies of accelerate; any other string is a device."""


class Placement(NamedTuple):
    """Arguments of `from_pretrained` that place the parameters.

    Attributes:
        device: One device, or None for the default.
        device_map: A strategy, one device, or a mapping from module names to devices, `"cpu"` or `"disk"`. The
            strategies `"auto"`, `"balanced"`, `"balanced_low_0"` and `"sequential"` fill the available devices and
            never split a block.
        max_memory: Maximum memory of each device for these strategies, by index or `"cpu"`, in bytes or as in
            `"10GB"`.
        offload_folder: The folder for weights on `"disk"`.
        offload_buffers: Whether buffers are offloaded too.
    """

    device: torch.device | str | None
    device_map: DeviceMap | None
    max_memory: Mapping[int | str, int | str] | None
    offload_folder: str | os.PathLike[str] | None
    offload_buffers: bool = False

    def check(self) -> None:
        """Check the arguments, before a file is read.

        Raises:
            ValueError: If both `device` and `device_map` are set, an argument has no effect, or a device is not usable.
            ImportError: If accelerate is not installed.
        """
        if self.device_map is None:
            unused = [name for name in ("max_memory", "offload_folder") if getattr(self, name) is not None]
            unused += ["offload_buffers"] if self.offload_buffers else []
            if unused:
                raise ValueError(f"{' and '.join(unused)} have no effect without device_map")
            check_device("device", self.device)
            return
        if self.device is not None:
            given = f"device={self.device!r} and device_map={self.device_map!r}"
            raise ValueError(f"{given} both place the parameters; pass one of them")
        if importlib.util.find_spec("accelerate") is None:
            raise ImportError("device_map requires accelerate: pip install accelerate")
        if isinstance(self.device_map, Mapping):
            for place in set(self.device_map.values()) - {"disk"}:
                check_device("device_map", place)
        elif self.device_map not in STRATEGIES:
            check_device("device_map", self.device_map)

    def loading_device(self) -> torch.device:
        """The device on which the file is read: host memory if there is a `device_map`."""
        if self.device_map is not None:
            return torch.device("cpu")
        return torch.get_default_device() if self.device is None else torch.device(self.device)

    def dispatch(self, model: PretrainedModel) -> None:
        """Place a model's layers by `device_map`, with hooks that move tensors.

        Without a `device_map`, nothing happens. `model.hf_device_map` is the device of every module afterwards.
        Modules with hooks are called as modules, so operators that replace several modules, such as patch
        embedding, are not used.
        """
        if self.device_map is None:
            return
        import accelerate

        places = _places(model, self.device_map, self.max_memory)
        accelerate.dispatch_model(model, places, offload_dir=self.offload_folder, offload_buffers=self.offload_buffers)


def check_device(argument: str, device: int | str | torch.device | None) -> None:
    """Check that parameters can be read to a device; None is torch's default device.

    Raises:
        TypeError: If it is of another type.
        ValueError: If it is not a device, this machine does not have it, or it is the meta device.
    """
    given = f"{argument}={device!r}" if device is not None else "torch's default device"
    try:
        resolved = torch.get_default_device() if device is None else torch.device(device)
    except (RuntimeError, TypeError) as error:
        kind = type(error) if isinstance(error, TypeError) else ValueError
        raise kind(f"{given} is not a device (expected 'cpu', or an accelerator such as 'cuda:0')") from error
    if resolved.type == "meta":
        raise ValueError(
            f"{given} is meta, which has no values, so weights cannot be loaded to it (expected another device; for a "
            "model without values, construct it under torch.device('meta'))"
        )
    try:
        torch.empty(0, device=resolved)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{given} cannot be used here: {reason}") from error


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
