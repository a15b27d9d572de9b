"""The native libraries at run time: which one is loaded and when, what serves without it, and what is said about it."""

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
    """What a fresh process says that imports `package`, with the warnings it gave."""
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
    """A copy of the package without what was compiled."""
    ignored = shutil.ignore_patterns("_C*.so", native.BUILD_NOTES, "__pycache__")
    return Path(shutil.copytree(PACKAGE, tmp_path / "beit_fast", ignore=ignored))


@needs_library
def test_the_cpu_library_is_loaded_at_import_and_the_cuda_library_is_not():
    facts, warnings = report(PACKAGE, "-W", "error")
    assert (facts["attention"], facts["default"], facts["patches"]) == ("cpp", "cpp", "cpp")
    assert facts["loaded"] == facts["mapped"] == ["_C"]
    assert facts["reasons"]["_C"] is None
    assert warnings == ""


def test_native_0_leaves_the_libraries_alone():
    facts, _ = report(BEIT_FAST_NATIVE="0")
    assert (facts["attention"], facts["default"], facts["patches"]) == ("torch", "sdpa", "torch")
    assert facts["loaded"] == facts["mapped"] == []
    assert set(facts["reasons"].values()) == {"BEIT_FAST_NATIVE=0 was set when beit_fast was imported"}


def test_the_interpreter_keeps_the_cpu_library_away():
    facts, _ = report(TRITON_INTERPRET="1")
    assert (facts["attention"], facts["default"], facts["patches"]) == ("triton-interpret", "sdpa", "torch")
    assert facts["loaded"] == facts["mapped"] == []
    assert facts["reasons"]["_C"] == "TRITON_INTERPRET=1 was set when beit_fast was imported"


def test_without_libraries_the_composites_serve_and_say_so(bare):
    facts, warnings = report(bare)
    assert (facts["attention"], facts["patches"]) == ("torch", "torch")
    assert facts["reasons"] == {name: f"{native.file_name(name)} was not built" for name in native.LIBRARIES}
    assert warnings.count("RuntimeWarning") == 1  # attention is slow


def test_the_reason_that_the_build_left_is_told(bare):
    notes = {"_C": {"built": False, "note": "the C++ compiler none was not found"}}
    (bare / native.BUILD_NOTES).write_text(json.dumps(notes))
    refusals = report(bare)[0]["reasons"]
    assert refusals["_C"] == f"{native.file_name('_C')} was not built: the C++ compiler none was not found"
    assert refusals["_C_cuda"] == f"{native.file_name('_C_cuda')} was not built"


def test_a_library_of_another_interface_is_never_loaded(bare):
    """One with the same number of arguments and another meaning would compute garbage."""
    stale = f"_C.{native.INTERFACE - 1}.so"
    (bare / stale).write_bytes(b"not even a library")
    facts, warnings = report(bare)
    assert facts["attention"] == "torch"
    assert facts["reasons"]["_C"] == f"{native.file_name('_C')} was not built, and {stale} has another interface"
    assert warnings.count("RuntimeWarning") == 1  # attention is slow


def test_a_library_that_does_not_load_is_a_warning_and_a_reason(bare):
    (bare / native.file_name("_C")).write_bytes(b"not a library")
    facts, warnings = report(bare)
    assert facts["attention"] == "torch"
    assert facts["reasons"]["_C"].startswith(f"{native.file_name('_C')} does not load: ")
    assert warnings.count("RuntimeWarning: beit_fast: _C") == 1


def test_the_interface_is_counted_up_when_a_schema_changes():
    """Change both together: what was compiled for other arguments must have another name."""
    schemas = (
        arguments.REL_POS_ATTENTION,
        arguments.REL_POS_ATTENTION_BACKWARD,
        arguments.PATCH_EMBED,
        arguments.PATCH_EMBED_CUDA,
    )
    digest = hashlib.sha256("\n".join(schemas).encode()).hexdigest()[:16]
    assert (native.INTERFACE, digest) == (1, "c96186bb50227aa8")


def test_one_kernel_embeds_patches_on_each_device_and_the_others_say_why_not():
    assert availability.patch_embed_kernel(CPU) == ("cpp" if native.is_loaded("_C") else "torch")
    assert availability.patch_embed_kernel(META) == "torch"
    assert availability.patch_embed_unsupported_reasons("torch", META) == ()
    assert availability.patch_embed_unsupported_reasons("cpp", META)[0] == "serves cpu tensors, not meta"
    refused = [
        kernel
        for kernel in availability.PATCH_EMBED_KERNELS
        if availability.patch_embed_unsupported_reasons(kernel, CPU)
    ]
    assert [*refused, availability.patch_embed_kernel(CPU)] == sorted(
        availability.PATCH_EMBED_KERNELS, key=lambda kernel: kernel == availability.patch_embed_kernel(CPU)
    )


def test_the_cuda_kernel_says_what_it_does_not_take():
    reasons = availability.patch_embed_unsupported_reasons("cuda", CPU, [torch.float32, torch.float64], 129)
    assert reasons[0] == "serves cuda tensors, not cpu"
    assert reasons[-2:] == (
        "dtype torch.float64 is not supported (expected float16, bfloat16 or float32)",
        "mean and std have more than 128 channels",
    )


@pytest.mark.parametrize("built", [False, True])
def test_cuda_runs_the_library_where_it_loads_and_the_composite_elsewhere(monkeypatch, built):
    """The function that serves CUDA tensors, on CPU tensors: which of the two it calls."""
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


def test_info_describes_libraries_and_instruction_sets():
    facts = {name: native.describe(name) for name in native.LIBRARIES}
    for name, fact in facts.items():
        assert fact["interface"] == native.INTERFACE
        assert fact["loaded"] is native.is_loaded(name)
        assert (fact["file"] is not None) is (PACKAGE / native.file_name(name)).exists()
        assert not (fact["loaded"] and fact["reason"])
    used, usable = native.instruction_sets()
    assert (used in usable) if native.is_loaded("_C") else (used, usable) == (None, ())
