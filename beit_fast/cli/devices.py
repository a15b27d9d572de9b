"""The devices that `--device` names."""

from __future__ import annotations

import torch

from ..utils.messages import count_of


def parse_device(name: str | None) -> torch.device:
    """Return the device of that name; None is CUDA if it is available, else the CPU.

    Raises:
        ValueError: If it is not the name of a device.
    """
    try:
        return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise ValueError(f"--device {name!r} is not supported (expected cpu, cuda or cuda:INDEX)") from error


def usable_device(name: str | None) -> torch.device:
    """`parse_device`, if this machine has the device.

    Raises:
        ValueError: If it is not the name of a device of this machine.
    """
    device = parse_device(name)
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            found = count_of(count, "CUDA device") if count else "no CUDA device"
            raise ValueError(f"--device {name!r} cannot be used here: torch finds {found}")
        return device
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if device.type not in {"cpu", "cpu" if accelerator is None else accelerator.type}:
        raise ValueError(f"--device {name!r} cannot be used here (expected cpu, cuda or cuda:INDEX)")
    return device
