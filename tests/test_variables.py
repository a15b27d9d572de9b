"""Environment variables that cannot be honored: one error at the first use, none at import."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from beit_fast import native
from beit_fast.cli import info
from beit_fast.ops.cpu_linear import onednn, split_bf16
from beit_fast.utils import variables
from beit_fast.utils.messages import join_choices

USES = """
import json
import warnings
warnings.simplefilter("error")
import torch
import beit_fast
from beit_fast.cli.info import format_facts, gather_facts
from beit_fast.ops.cpu_linear.choice import choose_gemm
from beit_fast.ops.dispatch import attention, availability
q = torch.randn(1, 5, 2, 8)
facts = gather_facts()
uses = {
    "attention": lambda: beit_fast.rel_pos_attention(q, q, q),
    "patches": lambda: beit_fast.patch_embed(torch.randn(1, 3, 8, 8), torch.randn(4, 3, 4, 4)),
    "triton": lambda: attention.kernel_name("triton", "cpu", torch.float32, 8),
    "default": lambda: attention.kernel_name(None, "cpu", torch.float32, 8),
    "patch kernel": lambda: availability.patch_embed_kernel(torch.device("cpu")),
    "eager": lambda: attention.kernel_name("eager", "cpu", torch.float32, 8),
    "gemm": lambda: choose_gemm().name,
}
errors = {}
for name, use in uses.items():
    try:
        use()
    except ValueError as error:
        errors[name] = str(error)
rows = [row for row in facts["kernels"] + facts["patch_embed_kernels"] if row["kernel"] in ("cpp", "torch")]
available = [row["kernel"] for row in rows if row["available"]]
print(json.dumps({
    "errors": errors, "variables": facts["variables"], "text": format_facts(facts), "available": available,
}))
"""
NATIVE_USES = ("attention", "patches", "triton", "default", "patch kernel")
AVAILABLE = native.instruction_sets()[1]
MISSING = next((name for name in ("amx", "avx512_bf16", "avx2") if AVAILABLE and name not in AVAILABLE), None)
needs_library = pytest.mark.skipif(not native.is_loaded("_C"), reason="the native library is not loaded")


def run_uses(name: str, value: str) -> dict:
    """Import the package with one variable in a new process and use all that it chooses."""
    inherited = {key: x for key, x in os.environ.items() if key not in (*variables._VALUES, "TRITON_INTERPRET")}
    environment = {**inherited, "OMP_NUM_THREADS": "1", name: value}
    done = subprocess.run([sys.executable, "-c", USES], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def check_error(name: str, value: str, message: str, uses: tuple[str, ...]) -> None:
    """Check that exactly these uses raise `message`, and that `info` reports it."""
    found = run_uses(name, value)
    assert found["errors"] == dict.fromkeys(uses, message)
    assert found["variables"] == [{"name": name, "value": value, "error": message}]
    assert f"{name}={value}  error: {message}" in found["text"]
    assert "warning:" not in found["text"]
    if uses == NATIVE_USES:
        assert found["available"] == [], "every call of these kernels raises"


@pytest.mark.parametrize("value", ["maybe", "2", "no"])
def test_native_unknown_value_raises_at_first_use(value: str) -> None:
    message = f"BEIT_FAST_NATIVE='{value}' is not supported (expected '0' or '1', or unset)"
    check_error("BEIT_FAST_NATIVE", value, message, NATIVE_USES)


@needs_library
@pytest.mark.parametrize("value", ["sse9", pytest.param(MISSING, marks=pytest.mark.skipif(not MISSING, reason="none"))])
def test_cpu_isa_unavailable_value_raises_at_first_use(value: str) -> None:
    message = f"BEIT_FAST_CPU_ISA='{value}' is not supported (expected {join_choices(AVAILABLE)}, or unset)"
    check_error("BEIT_FAST_CPU_ISA", value, message, NATIVE_USES)


def test_info_gives_each_variable_its_own_error() -> None:
    inherited = {key: x for key, x in os.environ.items() if key not in (*variables._VALUES, "TRITON_INTERPRET")}
    environment = {**inherited, "BEIT_FAST_NATIVE": "3", "BEIT_FAST_CPU_ISA": "amx"}
    command = [sys.executable, "-m", "beit_fast", "info"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    lines = [line.split("  ") for line in done.stdout.splitlines() if line.startswith("  BEIT_FAST_")]
    assert {cells[1]: cells[-1].strip() for cells in lines} == {
        "BEIT_FAST_NATIVE=3": "error: BEIT_FAST_NATIVE='3' is not supported (expected '0' or '1', or unset)",
        "BEIT_FAST_CPU_ISA=amx": "not read: the native library is not loaded",
    }


def test_tuned_unknown_value_raises_the_same_error_in_kernels_and_package(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from beit_fast.kernels.common import tuned_tiles

    monkeypatch.setitem(variables._VALUES, variables.TUNED, "maybe")
    monkeypatch.setenv(variables.TUNED, "maybe")
    errors = []
    for use in (lambda: variables.choice(variables.TUNED, ("0", "1")), tuned_tiles.is_enabled):
        with pytest.raises(ValueError, match="BEIT_FAST_TUNED") as caught:
            use()
        errors.append(str(caught.value))
    assert errors == ["BEIT_FAST_TUNED='maybe' is not supported (expected '0' or '1', or unset)"] * 2


@pytest.mark.skipif(split_bf16.unsupported_reason() is None, reason="split_bf16 can serve here")
def test_cpu_linear_without_tiles_raises_at_first_use() -> None:
    message = f"BEIT_FAST_CPU_LINEAR='split_bf16' cannot be used here: {split_bf16.unsupported_reason()}"
    check_error("BEIT_FAST_CPU_LINEAR", "split_bf16", message, ("gemm",))


def test_cpu_linear_unknown_value_raises_at_first_use() -> None:
    message = "BEIT_FAST_CPU_LINEAR='mkl' is not supported (expected 'blas', 'onednn' or 'split_bf16', or unset)"
    check_error("BEIT_FAST_CPU_LINEAR", "mkl", message, ("gemm",))


@pytest.mark.skipif(onednn.unsupported_reason("cpu", torch.float32) is not None, reason="oneDNN cannot serve")
def test_cpu_linear_requested_onednn_is_reported_and_gives_way_to_modes(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    from beit_fast.ops.cpu_linear.choice import choose_gemm

    monkeypatch.setitem(variables._VALUES, variables.CPU_LINEAR, "onednn")
    assert choose_gemm().name == "onednn"
    with FlopCounterMode(display=False):
        assert choose_gemm().name == "blas"
    rows = [row for row in info.gather_facts()["variables"] if row["name"] == variables.CPU_LINEAR]
    assert rows == [{"name": variables.CPU_LINEAR, "value": "onednn", "error": None}]
    monkeypatch.setattr(onednn, "_check", lambda dtype: "the check failed")
    with pytest.raises(ValueError, match=r"^BEIT_FAST_CPU_LINEAR='onednn' cannot be used here: the check failed$"):
        choose_gemm()
