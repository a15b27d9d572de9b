"""The conditions that a measurement is published with: devices, versions and the commit."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..utils.version import __version__


def environment(device: torch.device | str | None = None) -> dict[str, Any]:
    """Collect the conditions of a measurement, for JSON; it contains no folder, user or host.

    Args:
        device: The device (default: the current CUDA device, else the CPU).

    Returns:
        Names and values; values that do not apply are None.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return {
        "device": device.type,
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda,
        "triton": installed_version("triton"),
        "transformers": installed_version("transformers"),
        "beit_fast": __version__,
        "commit": _commit(),
        "default_dtype": str(torch.get_default_dtype()).removeprefix("torch."),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "triton_interpret": os.environ.get("TRITON_INTERPRET") == "1",
        "gpu": _gpu_facts(device) if device.type == "cuda" else None,
    }


def _gpu_facts(device: torch.device) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(device)
    return {
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
        "cudnn": torch.backends.cudnn.version(),
        **gpu_readings(device, ("driver_version", "clocks.max.sm", "clocks.max.memory", "power.limit")),
    }


def gpu_readings(device: torch.device | str, fields: Sequence[str]) -> dict[str, str | None]:
    """Query a CUDA device with nvidia-smi.

    Args:
        device: The CUDA device.
        fields: Names that `nvidia-smi --help-query-gpu` lists.

    Returns:
        A value for each field, or None if it is not available. Clocks are in MHz, the power limit is in watts.
    """
    return _ask_nvidia_smi(f"GPU-{torch.cuda.get_device_properties(device).uuid}", fields)


def _ask_nvidia_smi(gpu: str, fields: Sequence[str]) -> dict[str, str | None]:
    query = ",".join(fields)
    command = ["nvidia-smi", f"--id={gpu}", f"--query-gpu={query}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return dict.fromkeys(fields)
    values = [value.strip() for value in done.stdout.strip().split(",")]
    if done.returncode != 0 or len(values) != len(fields):
        return dict.fromkeys(fields)
    return {field: None if value.startswith("[") else value for field, value in zip(fields, values, strict=True)}


def installed_version(distribution: str) -> str | None:
    """Return the version of a distribution, or None if not installed.

    The distribution is not imported.
    """
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def cpu_name() -> str:
    """Return the model name of the CPU.

    If the system does not give a name, return the architecture.
    """
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def _commit() -> str | None:
    """Return the short commit of the checkout, or None outside one.

    The commit ends with `-dirty` if files differ.
    """
    root = Path(__file__).resolve().parents[2]
    if not ((root / ".git").exists() and (root / "pyproject.toml").exists()):
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
