"""Every attention kernel becomes a cubin for every supported GPU, without a GPU: nothing spills, everything fits.

The compiler runs in a process of its own, once for each architecture and dtype.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from .support import aot

pytest.importorskip("triton", reason="there is nothing to compile without Triton")

SHARED_MEMORY_KIB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
HEAD_DIMS = (16, 32, 64, 80, 128)
FEW_BYTES = 32
"""What ptxas may move to the stack for the sake of occupancy: eight registers of a thread, in fp32 and dropout."""


@pytest.fixture(scope="session")
def compiler_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("triton-cache")


def compile_all(requests: list[dict[str, Any]], cache: Path) -> list[dict[str, int]]:
    """Resources of each request, from a fresh process that compiles and imports no torch."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    process = subprocess.run(
        [sys.executable, aot.__file__, json.dumps(requests)],
        env={**environment, "TRITON_CACHE_DIR": str(cache)},
        cwd=cache,
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


def check_resources(requests: list[dict[str, Any]], cache: Path, *, spill_limit: int = 0) -> None:
    """Build every request and collect everything that is wrong before failing."""
    wrong = []
    for request, resources in zip(requests, compile_all(requests, cache), strict=True):
        print(request, resources)
        limit = SHARED_MEMORY_KIB[request["capability"]] * 1024
        if resources["shared"] > limit:
            wrong.append(f"{request}: {resources['shared']} bytes of shared memory, limit {limit}")
        if resources["stack"] + resources["local"] > spill_limit:
            wrong.append(f"{request}: spills {resources['stack']} + {resources['local']} bytes")
    assert not wrong, "\n".join(wrong)


def requests_for(capability: int, dtype: str, head_dim: int, **options: Any) -> list[dict[str, Any]]:
    return [
        {"kernel": kernel, "capability": capability, "dtype": dtype, "head_dim": head_dim, **options}
        for kernel in aot.SCORE_KERNELS
    ]


@pytest.mark.parametrize("capability", SHARED_MEMORY_KIB)
def test_kernels_neither_spill_nor_exceed_shared_memory(capability: int, compiler_cache: Path) -> None:
    """Small GPUs have 99 KiB: triton-lang/triton#8182, state-spaces/mamba#387."""
    requests = requests_for(capability, "bf16", 64)
    requests += [
        {"kernel": kernel, "capability": capability, "dtype": "bf16", "head_dim": 64} for kernel in aot.SMALL_KERNELS
    ]
    check_resources(requests, compiler_cache)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("capability", [80, 90])
def test_every_dtype_and_head_dimension(capability: int, dtype: str, compiler_cache: Path) -> None:
    requests = [request for head_dim in HEAD_DIMS for request in requests_for(capability, dtype, head_dim, mask=True)]
    check_resources(requests, compiler_cache, spill_limit=FEW_BYTES if dtype == "fp32" else 0)


@pytest.mark.slow
@pytest.mark.parametrize("capability", SHARED_MEMORY_KIB)
def test_key_mask_and_tf32(capability: int, compiler_cache: Path) -> None:
    requests = requests_for(capability, "bf16", 64, mask=True)
    requests += requests_for(capability, "bf16", 128, mask=True)
    check_resources(requests, compiler_cache)
    requests = requests_for(capability, "fp32", 64, precision="tf32")
    requests += requests_for(capability, "fp32", 128, precision="tf32")
    check_resources(requests, compiler_cache, spill_limit=FEW_BYTES)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 89, 90, 100])
def test_dropout_and_no_bias(capability: int, compiler_cache: Path) -> None:
    """Philox needs registers."""
    requests = requests_for(capability, "bf16", 64, mask=True, dropout=True)
    requests += [
        request for request in requests_for(capability, "bf16", 64, bias=False) if request["kernel"] != "bias_gradient"
    ]
    check_resources(requests, compiler_cache, spill_limit=FEW_BYTES)


def test_kernel_files_import_without_torch() -> None:
    """What compiles ahead of time needs Triton alone."""
    modules = "attention.forward, attention.backward, attention.primitives, attention.configs"
    script = f"import sys; sys.path.insert(0, {str(aot.KERNELS_FOLDER)!r}); import {modules}"
    script += "; assert 'torch' not in sys.modules"
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
