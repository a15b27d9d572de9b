"""Loading of the native libraries, fallbacks without them, and reported reasons."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import beit_fast
from beit_fast import native
from beit_fast.ops import arguments, patch_embed
from beit_fast.ops.dispatch import availability

PACKAGE = Path(beit_fast.__file__).parent
CPU, META = torch.device("cpu"), torch.device("meta")
REPORT = """
import json, pathlib, torch, beit_fast
from beit_fast import native
from beit_fast.ops.dispatch import attention, availability
q = torch.randn(1, 5, 2, 8)
out = beit_fast.rel_pos_attention(q, q, q)
tokens = beit_fast.patch_embed(torch.randn(1, 3, 8, 8), torch.randn(4, 3, 4, 4))
maps = pathlib.Path("/proc/self/maps").read_text()
assert torch.isfinite(out).all() and torch.isfinite(tokens).all()
print(json.dumps({
    "attention": attention.kernel_name("triton", "cpu", torch.float32, 8),
    "default": attention.kernel_name(None, "cpu", torch.float32, 8),
    "patches": availability.patch_embed_kernel(torch.device("cpu")),
    "reasons": {name: native.unsupported_reason(name) for name in native.LIBRARIES},
    "loaded": [name for name in native.LIBRARIES if native.is_loaded(name)],
    "mapped": [name for name in native.LIBRARIES if native.file_name(name) in maps],
}))
"""
BUILT = (PACKAGE / native.file_name("_C")).exists()
needs_library = pytest.mark.skipif(not BUILT, reason="the native library was not built")


def report(package=PACKAGE, *options, **environment):
    """Import `package` in a new process; return its facts and warnings."""
    cleared = {
        name: value for name, value in os.environ.items() if name not in ("BEIT_FAST_NATIVE", "TRITON_INTERPRET")
    }
    run = subprocess.run(
        [sys.executable, *options, "-c", REPORT],
        cwd="/",
        env=cleared | {"PYTHONPATH": str(package.parent)} | environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout), run.stderr


@pytest.fixture
def bare(tmp_path):
    """A copy of the package without native libraries."""
    ignored = shutil.ignore_patterns("_C*.so", native.BUILD_NOTES, "__pycache__")
    return Path(shutil.copytree(PACKAGE, tmp_path / "beit_fast", ignore=ignored))


@needs_library
def test_import_loads_cpu_library_only():
    facts, warnings = report(PACKAGE, "-W", "error")
    assert (facts["attention"], facts["default"], facts["patches"]) == ("cpp", "cpp", "cpp")
    assert facts["loaded"] == facts["mapped"] == ["_C"]
    assert facts["reasons"]["_C"] is None
    assert warnings == ""


def test_import_with_native_0_loads_no_library():
    facts, _ = report(BEIT_FAST_NATIVE="0")
    assert (facts["attention"], facts["default"], facts["patches"]) == ("torch", "sdpa", "torch")
    assert facts["loaded"] == facts["mapped"] == []
    assert set(facts["reasons"].values()) == {"BEIT_FAST_NATIVE=0 was set when beit_fast was imported"}


def test_import_under_interpreter_loads_no_cpu_library():
    facts, _ = report(TRITON_INTERPRET="1")
    assert (facts["attention"], facts["default"], facts["patches"]) == ("triton-interpret", "sdpa", "torch")
    assert facts["loaded"] == facts["mapped"] == []
    assert facts["reasons"]["_C"] == "TRITON_INTERPRET=1 was set when beit_fast was imported"


def test_kernels_without_libraries_are_fallbacks(bare):
    facts, warnings = report(bare)
    assert (facts["attention"], facts["patches"]) == ("torch", "torch")
    assert facts["reasons"] == {name: f"{native.file_name(name)} was not built" for name in native.LIBRARIES}
    assert warnings.count("RuntimeWarning") == 1  # attention is slow


def test_unsupported_reason_includes_build_note(bare):
    notes = {"_C": {"built": False, "note": "the C++ compiler none was not found"}}
    (bare / native.BUILD_NOTES).write_text(json.dumps(notes))
    reasons = report(bare)[0]["reasons"]
    assert reasons["_C"] == f"{native.file_name('_C')} was not built: the C++ compiler none was not found"
    assert reasons["_C_cuda"] == f"{native.file_name('_C_cuda')} was not built"


def test_load_of_another_interface_is_rejected(bare):
    """A library with other argument meanings would compute wrong results."""
    stale = f"_C.{native.INTERFACE - 1}.so"
    (bare / stale).write_bytes(b"not even a library")
    facts, warnings = report(bare)
    assert facts["attention"] == "torch"
    assert facts["reasons"]["_C"] == f"{native.file_name('_C')} was not built, and {stale} has another interface"
    assert warnings.count("RuntimeWarning") == 1  # attention is slow


def test_load_failure_warns_and_gives_reason(bare):
    (bare / native.file_name("_C")).write_bytes(b"not a library")
    facts, warnings = report(bare)
    assert facts["attention"] == "torch"
    assert facts["reasons"]["_C"].startswith(f"{native.file_name('_C')} does not load: ")
    assert warnings.count("RuntimeWarning: beit_fast: _C") == 1


def test_interface_changes_with_schemas():
    """A change of the schemas needs a new interface number."""
    schemas = (
        arguments.REL_POS_ATTENTION,
        arguments.REL_POS_ATTENTION_BACKWARD,
        arguments.PATCH_EMBED,
        arguments.PATCH_EMBED_CUDA,
    )
    digest = hashlib.sha256("\n".join(schemas).encode()).hexdigest()[:16]
    assert (native.INTERFACE, digest) == (2, "c96186bb50227aa8")


def test_patch_embed_kernel_per_device_has_reasons_for_others():
    assert availability.patch_embed_kernel(CPU) == ("cpp" if native.is_loaded("_C") else "torch")
    assert availability.patch_embed_kernel(META) == "torch"
    assert availability.patch_embed_unsupported_reasons("torch", META) == ()
    assert availability.patch_embed_unsupported_reasons("cpp", META)[0] == "serves cpu tensors, not meta"
    unsupported = [
        kernel
        for kernel in availability.PATCH_EMBED_KERNELS
        if availability.patch_embed_unsupported_reasons(kernel, CPU)
    ]
    assert [*unsupported, availability.patch_embed_kernel(CPU)] == sorted(
        availability.PATCH_EMBED_KERNELS, key=lambda kernel: kernel == availability.patch_embed_kernel(CPU)
    )


def test_patch_embed_reasons_of_cuda_kernel():
    reasons = availability.patch_embed_unsupported_reasons("cuda", CPU, [torch.float32, torch.float64], 129)
    assert reasons[0] == "serves cuda tensors, not cpu"
    assert reasons[-2:] == (
        "dtype torch.float64 is not supported (expected float16, bfloat16 or float32)",
        "mean and std have more than 128 channels",
    )


@pytest.mark.parametrize("built", [False, True])
def test_patch_embed_on_cuda_runs_library_or_fallback(monkeypatch, built):
    """The CUDA implementation runs on CPU tensors, with a fake library."""
    calls = []
    library = torch.library.Library("beit_fast", "IMPL")
    library.impl("_patch_embed_cuda", lambda *arguments: calls.append(arguments) or arguments[0].sum(), "CPU")
    monkeypatch.setattr(availability, "patch_embed_kernel", lambda *facts: "cuda")
    monkeypatch.setattr(native, "load", lambda name: built)
    pixels, weight = torch.randn(1, 3, 8, 8), torch.randn(4, 3, 4, 4)
    try:
        tokens = patch_embed._run_cuda(arguments.PatchEmbedArguments(pixels, weight, *[None] * 7))
    finally:
        library._destroy()
    if built:
        assert [len(arguments) for arguments in calls] == [10]
        assert calls[0][-1] is (torch.backends.cuda.matmul.fp32_precision == "tf32")
    else:
        assert calls == []
        assert tokens.shape == (1, 4, 4)


def test_describe_matches_loaded_libraries():
    facts = {name: native.describe(name) for name in native.LIBRARIES}
    for name, fact in facts.items():
        assert fact["interface"] == native.INTERFACE
        assert fact["loaded"] is native.is_loaded(name)
        assert (fact["file"] is not None) is (PACKAGE / native.file_name(name)).exists()
        assert not (fact["loaded"] and fact["reason"])
    used, usable = native.instruction_sets()
    assert (used in usable) if native.is_loaded("_C") else (used, usable) == (None, ())
