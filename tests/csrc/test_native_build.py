"""csrc/build.py on a few lines of C++: instruction sets, incremental builds and errors."""

import ctypes
import importlib.util
import platform
import shutil
from pathlib import Path

import pytest

from ..support.checkout import ROOT, load_native_build

X86 = platform.machine() in ("x86_64", "AMD64")

pytestmark = [
    pytest.mark.skipif(not (ROOT / "csrc").exists(), reason="runs from a checkout"),
    pytest.mark.skipif(shutil.which("c++") is None, reason="a C++ compiler was not found"),
]
needs_x86 = pytest.mark.skipif(not X86, reason="only x86 has instruction sets to choose from")

# The template is not inlined or folded, so the linker must choose one of its copies.
HEADER = """
#pragma once
template <typename T> __attribute__((noinline, noipa)) int copy_for(T) {
#if defined(__AMX_BF16__)
    return 4;
#elif defined(__AVX512BF16__)
    return 3;
#elif defined(__AVX512F__)
    return 2;
#elif defined(__AVX2__)
    return 1;
#else
    return 0;
#endif
}
"""
ISA_SOURCE = """
#include "copies.h"
#define JOIN(left, right) left##right
#define NAMED(isa) JOIN(copy_in_, isa)
extern "C" __attribute__((visibility("default"))) int NAMED(BEIT_FAST_ISA)() { return copy_for(CALLED_WITH); }
"""
NEWER_ONLY = """
#include "copies.h"
#define JOIN(left, right) left##right
#define NAMED(isa) JOIN(only_in_, isa)
extern "C" __attribute__((visibility("default"))) int NAMED(BEIT_FAST_ISA)() {
#if defined(__AVX512F__)
    return copy_for(1.0f);
#else
    return 0;
#endif
}
"""
PLAIN_SOURCE = """
#define EXPORTED extern "C" __attribute__((visibility("default")))
#define COUNT(isa) +1
EXPORTED int sets() { return 0 BEIT_FAST_FOR_EACH_ISA(COUNT); }
EXPORTED double fused(double a, double b, double c) { return a * b + c; }
"""


@pytest.fixture
def native_build(monkeypatch, tmp_path):
    """Build module in a project of three sources, with its environment variables unset."""
    module = load_native_build()
    for name in ("CXX", "CXXFLAGS", "LDFLAGS", "MAX_JOBS", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "csrc" / "part").mkdir(parents=True)
    (tmp_path / "csrc" / "copies.h").write_text(HEADER)
    (tmp_path / "csrc" / "part" / "all.isa.cpp").write_text(ISA_SOURCE.replace("CALLED_WITH", "1"))
    (tmp_path / "csrc" / "part" / "newer.isa.cpp").write_text(NEWER_ONLY)
    (tmp_path / "csrc" / "plain.cpp").write_text(PLAIN_SOURCE)
    monkeypatch.chdir(tmp_path)
    return module


def build(native_build):
    return native_build.build(["_C"], Path("build"))["_C"]


def objects():
    return {file.name.rpartition("-")[0]: file.stat().st_mtime_ns for file in Path("build").glob("*.o")}


@needs_x86
def test_build_shared_function_is_copy_for_oldest_instruction_set(native_build):
    """The linker must keep the oldest copy of a header function."""
    result = build(native_build)
    isas = list(native_build.ISAS)
    assert result.note == ", ".join(isas)
    library = ctypes.CDLL(str(result.file.resolve()))
    assert [getattr(library, f"copy_in_{isa}")() for isa in isas] == [0, 0, 0, 0, 0]
    # AVX-512 is the oldest set with this copy, and newer sets share it
    assert [getattr(library, f"only_in_{isa}")() for isa in isas] == [0, 0, 2, 2, 2]


@needs_x86
def test_build_unknown_instruction_set_is_left_out(native_build, monkeypatch, tmp_path):
    compiler = tmp_path / "older-c++"
    compiler.write_text('#!/bin/sh\ncase "$*" in *-mamx*) exit 1;; esac\nexec c++ "$@"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    result = build(native_build)
    assert result.note == "portable, avx2, avx512, avx512_bf16 (the compiler does not support amx)"
    library = ctypes.CDLL(str(result.file.resolve()))
    assert library.sets() == 4
    assert not hasattr(library, "copy_in_amx")


def test_build_other_machine_gets_portable_code(native_build, monkeypatch):
    monkeypatch.setattr(native_build.platform, "machine", lambda: "aarch64")
    assert build(native_build).note == "portable"


def test_build_compiles_changed_sources_only(native_build):
    build(native_build)
    first = objects()
    build(native_build)
    assert objects() == first
    Path("csrc/copies.h").write_text(HEADER + "\n")
    build(native_build)
    again = {name for name, time in objects().items() if time != first[name]}
    assert again == {name for name in first if ".isa.cpp" in name}
    second = objects()
    Path("csrc/plain.cpp").write_text(PLAIN_SOURCE + "\n")
    build(native_build)
    assert {name for name, time in objects().items() if time != second[name]} == {"plain.cpp"}


def test_build_other_flags_make_other_objects(native_build, monkeypatch):
    """Objects of both sets of flags stay cached."""
    plain = build(native_build).file
    monkeypatch.setenv("CXXFLAGS", "-O0")
    assert build(native_build).file != plain
    monkeypatch.delenv("CXXFLAGS")
    before = plain.stat().st_mtime_ns
    assert build(native_build).file == plain
    assert plain.stat().st_mtime_ns == before


def test_build_compiler_error_gives_short_reason_and_output(native_build, capfd):
    Path("csrc/plain.cpp").write_text("int wrong = unknown_name;\n")
    result = build(native_build)
    assert result.file is None
    assert result.note == "c++ fails on csrc/plain.cpp (see above)"
    assert "unknown_name" in capfd.readouterr().err


def test_build_undefined_function_fails(native_build, capfd):
    Path("csrc/plain.cpp").write_text("int missing();\nint call() { return missing(); }\n")
    assert build(native_build).file is None
    assert "missing" in capfd.readouterr().err


def test_build_without_torch_headers_gives_reason(native_build, monkeypatch, tmp_path):
    monkeypatch.setattr(native_build.importlib.util, "find_spec", lambda name: None)
    assert build(native_build).note == "torch is not installed in the build environment (use pip --no-build-isolation)"
    spec = importlib.util.spec_from_file_location("torch", tmp_path / "torch" / "__init__.py")
    monkeypatch.setattr(native_build.importlib.util, "find_spec", lambda name: spec)
    assert build(native_build).note == f"the headers of torch 2.11 or later were not found in {tmp_path / 'torch'}"
    header = tmp_path / "torch" / "include" / "torch" / "headeronly" / "version.h"
    header.parent.mkdir(parents=True)
    header.write_text("#define TORCH_VERSION_MAJOR 2\n#define TORCH_VERSION_MINOR 9\n")
    assert "the headers of torch 2.11 or later" in build(native_build).note


@pytest.fixture
def nvcc(tmp_path):
    """Fake nvcc that supports sm_75, sm_80 and sm_90."""
    script = tmp_path / "nvcc"
    script.write_text("#!/bin/sh\necho compute_75\necho compute_80\necho compute_90\n")
    script.chmod(0o755)
    return str(script)


def test_cuda_targets_default_to_architectures_of_nvcc(native_build, nvcc):
    options, note = native_build._cuda_targets(nvcc)
    assert note == "sm_80, sm_90, compute_90"
    assert options[-1] == "-gencode=arch=compute_90,code=compute_90"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("8.6", "sm_86"),
        ("8.0;9.0+PTX", "sm_80, sm_90, compute_90"),
        ("8.0 9.0a", "sm_80, sm_90a"),
        ("8.9, 12.0", "sm_89, sm_120"),
    ],
)
def test_cuda_targets_follow_torch_cuda_arch_list(native_build, monkeypatch, nvcc, given, expected):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", given)
    assert native_build._cuda_targets(nvcc)[1] == expected


@pytest.mark.parametrize("entry", ["Hopper", "7.5", "90", "9.0+SASS"])
def test_cuda_targets_unsupported_architecture_raises(native_build, monkeypatch, nvcc, entry):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", f"8.0;{entry}")
    with pytest.raises(native_build.BuildError, match=r"TORCH_CUDA_ARCH_LIST: '.*' is not supported \(expected 8\.0"):
        native_build._cuda_targets(nvcc)


def test_build_without_nvcc_leaves_cuda_out(native_build, monkeypatch):
    monkeypatch.setattr(native_build, "find_nvcc", lambda: None)
    assert native_build.build(["_C_cuda"], Path("build"))["_C_cuda"] == native_build.Result(None, "nvcc was not found")


def test_find_nvcc_prefers_cuda_home(native_build, monkeypatch, tmp_path):
    own = tmp_path / "cuda" / "bin" / "nvcc"
    own.parent.mkdir(parents=True)
    own.write_text("#!/bin/sh\n")
    own.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    assert native_build.find_nvcc() == str(own)


@pytest.mark.parametrize("jobs", ["0", "-2", "many"])
def test_build_invalid_max_jobs_raises(native_build, monkeypatch, jobs):
    monkeypatch.setenv("MAX_JOBS", jobs)
    with pytest.raises(SystemExit, match=f"MAX_JOBS is '{jobs}'"):
        build(native_build)
