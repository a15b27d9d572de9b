"""The conditions that a measurement is published with."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from beit_fast.cli import collect_env


def test_environment_is_json_without_private_paths() -> None:
    environment = collect_env.environment("cpu")
    text = json.dumps(environment)
    assert environment["torch"] == torch.__version__
    assert environment["threads"] == torch.get_num_threads()
    assert environment["device_name"] == environment["cpu"] != ""
    for private in (str(Path.home()), os.getcwd(), str(Path(collect_env.__file__).parent)):
        assert private == "/" or private not in text


def test_environment_outside_a_checkout_has_no_commit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(collect_env, "__file__", str(tmp_path / "beit_fast" / "collect_env.py"))
    assert collect_env.environment("cpu")["commit"] is None


def test_installed_version_of_a_missing_distribution_is_none() -> None:
    assert collect_env.installed_version("beit-fast-is-not-called-this") is None
    assert collect_env.installed_version("torch") == torch.__version__


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("echo 580.1, [N/A]", {"driver_version": "580.1", "power.limit": None}),
        ("echo No devices were found; exit 6", {"driver_version": None, "power.limit": None}),
        ("echo 580.1", {"driver_version": None, "power.limit": None}),
    ],
)
def test_gpu_readings_missing_values_are_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str, expected: dict[str, str | None]
) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert collect_env._ask_nvidia_smi("GPU-0", ("driver_version", "power.limit")) == expected


def test_gpu_readings_without_nvidia_smi_are_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert collect_env._ask_nvidia_smi("GPU-0", ("driver_version",)) == {"driver_version": None}
