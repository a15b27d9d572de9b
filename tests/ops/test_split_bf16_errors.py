"""Errors of split-bf16 linear layers, and reasons why they are unsupported."""

import json
import os
import subprocess
import sys

import pytest
import torch

from beit_fast import native
from beit_fast.ops.cpu_linear import split_bf16

needs_tiles = pytest.mark.skipif(
    split_bf16.unsupported_reason() is not None, reason=f"{split_bf16.unsupported_reason()}"
)

GOOD = {"x": (4, 40), "packed": None, "bias": (6,), "residual": (4, 6)}
BAD_CALLS = {
    "fp64": ({"x": torch.zeros(4, 40, dtype=torch.float64)}, ["x must be float32"]),
    "bf16": ({"x": torch.zeros(4, 40, dtype=torch.bfloat16)}, ["x must be float32"]),
    "a number": ({"x": torch.zeros(())}, ["x must be [..., K]"]),
    "depth": ({"x": torch.zeros(4, 65)}, ["packed must be what _pack_split_bf16 returns for [6, 65] and 3 terms"]),
    "columns": ({"out_features": 33}, ["[33, 40] and 3 terms, uint8 [2, 12288]", "bias must be [N] = [33]"]),
    "negative columns": ({"out_features": -1}, ["out_features must not be negative"]),
    "other terms": ({"terms": 2}, ["packed must be what _pack_split_bf16 returns for [6, 40] and 2 terms"]),
    "number of terms": ({"terms": 4}, ["terms is 4, not 2 or 3"]),
    "floats for bytes": ({"packed": torch.zeros(1, 12288)}, ["packed must be what _pack_split_bf16 returns for"]),
    "bias": ({"bias": torch.zeros(1, 6)}, ["bias must be [N] = [6]"]),
    "bias of halves": ({"bias": torch.zeros(6).half()}, ["bias must be float32"]),
    "residual": ({"residual": torch.zeros(6)}, ["residual must be [..., N] = [4, 6]"]),
    "device": ({"bias": torch.zeros(6, device="meta")}, ["all tensors must be on one device"]),
    "all at once": (
        {"x": torch.zeros(4, 40).half(), "bias": torch.zeros(5), "terms": 1},
        ["x must be float32", "bias must be [N] = [6]", "terms is 1, not 2 or 3"],
    ),
}


@needs_tiles
@pytest.mark.parametrize("name", BAD_CALLS)
def test_linear_with_bad_arguments_raises_one_error(name):
    changes, reasons = BAD_CALLS[name]
    good = {
        "x": torch.zeros(4, 40),
        "packed": split_bf16.pack(torch.zeros(6, 40), 3),
        "out_features": 6,
        "terms": 3,
        "bias": torch.zeros(6),
        "residual": torch.zeros(4, 6),
    }
    with pytest.raises(ValueError, match=r"beit_fast::_linear_split_bf16 cannot serve x ") as raised:
        split_bf16.linear(**good | changes)
    for reason in reasons:
        assert reason in str(raised.value)


@needs_tiles
@pytest.mark.parametrize(
    ("matrix", "terms", "reason"),
    [
        (torch.zeros(4, 40, dtype=torch.float64), 3, "matrix must be float32"),
        (torch.zeros(4, 40, 2), 3, "matrix must be [N, K], or [K, N] where it is transposed"),
        (torch.zeros(4, 40), 1, "terms is 1, not 2 or 3"),
    ],
)
def test_pack_with_bad_matrix_raises(matrix, terms, reason):
    with pytest.raises(ValueError, match="beit_fast::_pack_split_bf16 cannot serve matrix ") as raised:
        split_bf16.pack(matrix, terms)
    assert reason in str(raised.value)


REPORT = """
import json, torch
from beit_fast.ops.cpu_linear import split_bf16
errors = []
for call in (lambda: split_bf16.pack(torch.zeros(3, 4), 3),
             lambda: split_bf16.linear(torch.zeros(2, 4), torch.zeros(1, 6144, dtype=torch.uint8), 3, 3)):
    try:
        call()
    except ValueError as error:
        errors.append(str(error))
print(json.dumps([split_bf16.unsupported_reason(), errors]))
"""


def report_errors(**environment):
    """Return the unsupported reason and both errors in a new process."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", REPORT],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_operators_without_library_raise_one_error():
    reason, errors = report_errors(BEIT_FAST_NATIVE="0")
    assert reason == "BEIT_FAST_NATIVE=0 was set when beit_fast was imported"
    assert errors == [
        f"beit_fast::_pack_split_bf16 cannot serve matrix float32[3, 4] on cpu: {reason}",
        f"beit_fast::_linear_split_bf16 cannot serve x float32[2, 4] on cpu, packed uint8[1, 6144] on cpu: {reason}",
    ]


@pytest.mark.skipif("avx512" not in native.instruction_sets()[1], reason="avx512 is not available")
def test_operators_without_tiles_raise_one_error():
    reason, errors = report_errors(BEIT_FAST_CPU_ISA="avx512")
    assert reason == "the instruction set is avx512, and only amx has tiles"
    assert [error.endswith(f": {reason}") for error in errors] == [True, True]


def test_unsupported_reason_names_older_library(monkeypatch):
    monkeypatch.setattr(native, "unsupported_reason", lambda name: None)
    monkeypatch.setattr(native, "is_loaded", lambda name: True)
    monkeypatch.setattr(native, "ask", lambda function: None)
    assert "was built before it had split-bf16 linear layers" in split_bf16.unsupported_reason()


@pytest.mark.skipif(not native.is_loaded("_C"), reason="the native library is not loaded")
def test_native_ask_returns_known_facts():
    assert native.ask("beit_fast_cpu_isa") == native.instruction_sets()[0]
    assert native.ask("beit_fast_split_bf16_unsupported") is not None
    assert native.ask("beit_fast_no_such_function") is None


def test_linear_meta_tensors_return_shapes():
    packed = split_bf16.pack(torch.empty(33, 40, device="meta"), 3)
    assert (packed.shape, packed.dtype) == ((2, 2 * 3 * 2048), torch.uint8)
    assert split_bf16.linear(torch.empty(5, 7, 40, device="meta"), packed, 33, 3).shape == (5, 7, 33)


@needs_tiles
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"x": torch.randn(2, 9)}, "matrix must be [N, K] with K = 9"),
        ({"x": torch.randn(2, 8).double()}, "x must be float32"),
        ({"x": torch.tensor(1.0)}, "x must be [..., K]"),
        ({"matrix": torch.randn(8)}, "matrix must be [N, K], or [K, N]"),
        ({"matrix": torch.randn(4, 8).half()}, "matrix must be float32"),
        ({"bias": torch.randn(5)}, "bias must be [N] = [4]"),
        ({"terms": 1}, "terms is 1, not 2 or 3"),
    ],
)
def test_matmul_with_bad_arguments_raises(change, reason):
    call = {"x": torch.randn(2, 8), "matrix": torch.randn(4, 8), "terms": 3, "bias": torch.randn(4)} | change
    messages = []
    for move in (lambda x: x, lambda x: x.to("meta") if torch.is_tensor(x) else x):
        with pytest.raises(ValueError, match="_matmul_split_bf16 cannot serve") as raised:
            split_bf16.matmul(**{name: move(value) for name, value in call.items()})
        messages.append(str(raised.value))
    assert all(reason in message for message in messages)
