"""NVIDIA compute-sanitizer on small cases: invalid accesses and shared-memory races."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import beit_fast

from .calls import needs_cuda_library
from .sanitized_cases import CASES, PATCH_CASES

ROOT = Path(beit_fast.__file__).resolve().parents[1]
SECONDS = 240


def find_sanitizer() -> str | None:
    """Find compute-sanitizer on the path or in the CUDA toolkit."""
    toolkits = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")] + ["/usr/local/cuda"]
    folders = [f"{toolkit}/bin" for toolkit in toolkits if toolkit]
    return shutil.which("compute-sanitizer", path=os.pathsep.join([os.environ.get("PATH", ""), *folders]))


SANITIZER = find_sanitizer()
pytestmark = pytest.mark.skipif(SANITIZER is None, reason="compute-sanitizer was not found (part of the CUDA toolkit)")


def sanitize(tool: str, *names: str) -> None:
    """Run cases under a tool of the sanitizer.

    A case that did not run fails, like a case with an error.
    """
    script = Path(__file__).with_name("sanitized_cases.py")
    environment = os.environ | {
        "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    command = [str(SANITIZER), "--tool", tool, "--error-exitcode", "1", sys.executable, str(script), *names]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-2000:]}"
    for name in names:
        assert f"ran: {name}" in done.stdout


def test_attention_memcheck_passes() -> None:
    sanitize("memcheck", *CASES)


def test_attention_racecheck_passes() -> None:
    sanitize("racecheck", "odd width")


@needs_cuda_library
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck", "initcheck"])
def test_patch_embed_sanitizer_passes(tool: str) -> None:
    sanitize(tool, *PATCH_CASES)
