"""Warnings without native kernels: once at the first use, and in `beit-fast info`."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from .support.checkout import ROOT

pytestmark = pytest.mark.skipif(not (ROOT / "pyproject.toml").exists(), reason="runs from a checkout")

CALLS = """
import warnings
import torch
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import beit_fast
    assert not caught
    for _ in range(3):
        q, k, v = (torch.randn(1, 5, 2, 8) for _ in range(3))
        beit_fast.rel_pos_attention(q, k, v, torch.randn(12, 2), (2, 2))
print([str(warning.message) for warning in caught if "beit_fast" in str(warning.message)])
"""


@pytest.fixture(scope="module")
def unbuilt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package without its native libraries."""
    folder = tmp_path_factory.mktemp("unbuilt")
    ignored = shutil.ignore_patterns("*.so", "native_build.json", "__pycache__")
    shutil.copytree(ROOT / "beit_fast", folder / "beit_fast", ignore=ignored)
    return folder


def run(folder: Path, *arguments: str, **variables: str) -> str:
    unset = ("BEIT_FAST_NATIVE", "TRITON_INTERPRET")
    inherited = {name: value for name, value in os.environ.items() if name not in unset}
    environment = {**inherited, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", **variables}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True).stdout


def test_first_use_without_library_warns_once(unbuilt: Path) -> None:
    output = run(unbuilt, "-c", CALLS)
    assert output.count("attention on this CPU runs as PyTorch operations, which is slow: _C.") == 1
    assert "BEIT_FAST_NATIVE=0" in output


def test_first_use_with_native_disabled_does_not_warn(unbuilt: Path) -> None:
    assert run(unbuilt, "-c", CALLS, BEIT_FAST_NATIVE="0").strip() == "[]"


def test_info_without_library_warns(unbuilt: Path) -> None:
    lines = run(unbuilt, "-m", "beit_fast", "info").splitlines()
    assert sum(line.startswith("warning: attention on this CPU runs as PyTorch operations") for line in lines) == 1
    facts = json.loads(run(unbuilt, "-m", "beit_fast", "info", "--json", BEIT_FAST_NATIVE="0"))
    assert facts["missing_kernels"].endswith("BEIT_FAST_NATIVE=0 was set when beit_fast was imported")
