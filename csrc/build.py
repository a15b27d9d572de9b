"""Compile csrc/ into the package's libraries, for setup.py: plain commands, in parallel, incremental.

`*.cpp` is compiled once for every machine, `*.isa.cpp` once for each instruction set in `ISAS`, and `*.cu` by nvcc.

Every object that uses an inline function or a template has a copy of it, compiled for that object's instruction set.
The linker keeps the first copy for all objects. So objects are linked from the oldest instruction set to the newest:
each object then links to a copy compiled for its own set or an older one. Link-time optimization would mix the sets,
so it is disabled.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

SOURCES = {"_C": "*.cpp", "_C_cuda": "*.cu"}
"""The sources of each library, anywhere in csrc/."""

SHARED = ("errors.cpp",)
"""Sources of `_C` that `_C_cuda` has a copy of: neither library uses symbols of the other."""

_AVX512 = "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mf16c"
ISAS = {
    "portable": ("", ""),
    "avx2": ("-mavx2 -mfma -mf16c", "vfmadd231ps %ymm0, %ymm0, %ymm0"),
    "avx512": (_AVX512, "vpermw %zmm0, %zmm0, %zmm0"),
    "avx512_bf16": (f"{_AVX512} -mavx512bf16", "vdpbf16ps %zmm0, %zmm0, %zmm0"),
    "amx": (f"{_AVX512} -mavx512bf16 -mavx512vbmi -mamx-tile -mamx-bf16", "tdpbf16ps %tmm0, %tmm1, %tmm2"),
}
"""The list of instruction sets, oldest first: compiler flags, and an instruction that the assembler must support.

csrc/cpu/isa.cpp has a function `supports_<name>` for each; C++ gets the names as `BEIT_FAST_FOR_EACH_ISA`.
"""

_CPU_FLAGS = "-O2 -ffp-contract=fast -fno-math-errno -fno-trapping-math -Wall -Wextra -fPIC -fvisibility=hidden"
# nvcc warns about `#pragma unroll` before a loop of one iteration.
_CUDA_FLAGS = "-O3 -diag-suppress 128 -Xcompiler -fPIC,-fvisibility=hidden -DUSE_CUDA"
_CUDA_TARGETS = ("8.0", "9.0", "10.0")
_OLDEST_TORCH = (2, 11)
_STABLE_ABI = "-DTORCH_TARGET_VERSION=0x{:02x}{:02x}000000000000".format(*_OLDEST_TORCH)


class BuildError(Exception):
    """A library cannot be built: a short reason. The output of the compiler has been printed."""


@dataclass(frozen=True)
class Plan:
    """The commands that compile each object and link them, and a note: the targets."""

    objects: dict[Path, list[str]]
    link: list[str]
    note: str


@dataclass(frozen=True)
class Result:
    """The file of a library, or None, and a note: its targets, or why it was not built."""

    file: Path | None
    note: str


def build(names: Sequence[str], folder: Path) -> dict[str, Result]:
    """Build the named libraries in parallel, all files in `folder`; the working folder is the project's root."""
    with ThreadPoolExecutor(_jobs()) as compilers:
        begun = {name: _begin(name, folder, compilers) for name in sorted(names, reverse=True)}  # nvcc takes longest
        return {name: _finish(name, folder, *begun[name]) for name in names}


def _begin(name: str, folder: Path, compilers: ThreadPoolExecutor) -> tuple[Plan | Exception, list[Future]]:
    """The plan of a library, or why it cannot be built; and its objects, which are being compiled."""
    try:
        if sys.platform != "linux":
            raise BuildError("native libraries are built on Linux only")
        plan = (_plan_cpu if name == "_C" else _plan_cuda)(folder)
    except (BuildError, OSError) as error:
        return error, []
    return plan, [compilers.submit(_make, target, command) for target, command in plan.objects.items()]


def _finish(name: str, folder: Path, plan: Plan | Exception, objects: list[Future]) -> Result:
    try:
        if isinstance(plan, Exception):
            raise plan
        for made in objects:
            made.result()
        command = [*plan.link, *map(str, plan.objects)]
        library = _named(folder, name, ".so", command)
        _make(library, command, list(plan.objects))
        return Result(library, plan.note)
    except (BuildError, OSError) as error:
        return Result(None, str(error))


def _plan_cpu(folder: Path) -> Plan:
    torch = _torch_folder()
    compiler, standard = _compiler()
    names = list(ISAS) if platform.machine() in ("x86_64", "AMD64") else ["portable"]
    isas = [name for name in names if _supports(compiler, name)]
    given = shlex.split(os.environ.get("CXXFLAGS", ""))

    isa_list = f"-DBEIT_FAST_FOR_EACH_ISA(X)={' '.join(f'X({name})' for name in isas)}"

    def command(*flags: str) -> list[str]:
        return [*compiler, standard, *_CPU_FLAGS.split(), isa_list, *flags, *_includes(torch), *given, "-fno-lto", "-c"]

    sources = [source for source in _sources("_C") if not source.name.endswith(".isa.cpp")]
    objects = _objects(folder, command(), sources)
    sources = [source for source in _sources("_C") if source.name.endswith(".isa.cpp")]
    for name in isas:
        compile_one = command("-O3", *ISAS[name][0].split(), f"-DBEIT_FAST_ISA={name}")
        objects |= _objects(folder, compile_one, sources, f".{name}")
    link = [*compiler, "-shared", *given, *shlex.split(os.environ.get("LDFLAGS", "")), "-fno-lto"]
    link += ["-Wl,-z,defs", "-Wl,--no-as-needed", f"-L{torch / 'lib'}", "-ltorch_cpu"]
    unsupported = [name for name in names if name not in isas]
    note = ", ".join(isas) + (f" (the compiler does not support {', '.join(unsupported)})" if unsupported else "")
    return Plan(objects, link, note)


def _plan_cuda(folder: Path) -> Plan:
    nvcc = find_nvcc()
    if nvcc is None:
        raise BuildError("nvcc was not found")
    torch = _torch_folder()
    compiler, standard = _compiler()
    targets, note = _cuda_targets(nvcc)
    sources = _sources("_C_cuda")
    # nvcc accepts only the name of its host compiler, without `ccache` or flags
    host = [word for word in compiler if not word.startswith("-")][-1]
    command = [nvcc, "-ccbin", host]
    threads = str(max(1, _jobs() // len(sources)))
    compile_all = [*command, standard, *_CUDA_FLAGS.split(), *targets, "--threads", threads, *_includes(torch), "-c"]
    objects = _objects(folder, compile_all, sources)
    shared = [source for source in _sources("_C") if source.name in SHARED]
    objects |= _objects(folder, [*compiler, standard, *_CPU_FLAGS.split(), *_includes(torch), "-c"], shared)
    # libtorch loads libtorch_cuda too, which a CPU build of torch does not have
    link = [*command, "-shared", "-cudart", "static", "-Xlinker", "--no-as-needed"]
    return Plan(objects, [*link, f"-L{torch / 'lib'}", "-ltorch_cpu", "-ltorch"], note)


def _jobs() -> int:
    text = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
    if not text.isdigit() or int(text) < 1:
        raise SystemExit(f"MAX_JOBS is {text!r} (expected a positive number)")
    return int(text)


def _sources(library: str) -> list[Path]:
    found = sorted(Path("csrc").rglob(SOURCES[library]))
    if not found:
        raise BuildError(f"csrc has no {SOURCES[library]}")
    return found


def _objects(folder: Path, command: list[str], sources: list[Path], variant: str = "") -> dict[Path, list[str]]:
    """The command for each object."""
    commands = [[*command, str(source)] for source in sources]
    return {_named(folder, f"{Path(line[-1]).name}{variant}", ".o", line): line for line in commands}


def _named(folder: Path, name: str, suffix: str, command: Sequence[str]) -> Path:
    """The file that `command` writes: its name depends on the command."""
    return folder / f"{name}-{hashlib.sha256(shlex.join(command).encode()).hexdigest()[:12]}{suffix}"


def _includes(torch: Path) -> list[str]:
    api = torch / "include" / "torch" / "csrc" / "api" / "include"
    return [_STABLE_ABI, "-Icsrc", "-isystem", str(torch / "include"), "-isystem", str(api)]


def _torch_folder() -> Path:
    """The folder of torch, found without importing it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise BuildError("torch is not installed in the build environment (use pip --no-build-isolation)")
    folder = Path(spec.origin).parent
    header = folder / "include" / "torch" / "headeronly" / "version.h"
    numbers = re.findall(r"define TORCH_VERSION_(?:MAJOR|MINOR) (\d+)", header.read_text()) if header.exists() else []
    if tuple(map(int, numbers)) < _OLDEST_TORCH:
        raise BuildError(
            f"the headers of torch {'.'.join(map(str, _OLDEST_TORCH))} or later were not found in {folder}"
        )
    return folder


def _compiler() -> tuple[list[str], str]:
    """The C++ compiler and the newest standard that it supports. The compiler is `CXX` or the system's."""
    usual = next(filter(shutil.which, ("c++", "g++", "clang++")), "c++")
    compiler = shlex.split(os.environ.get("CXX", "")) or [usual]
    if shutil.which(compiler[0]) is None:
        raise BuildError(f"the C++ compiler {compiler[0]} was not found")
    for standard in ("-std=c++20", "-std=c++17"):
        if _compiles(compiler, standard, "#include <optional>"):
            return compiler, standard
    raise BuildError(f"the C++ compiler {shlex.join(compiler)} does not support C++17")


def _supports(compiler: list[str], isa: str) -> bool:
    flags, instruction = ISAS[isa]
    return _compiles(compiler, flags, f'void probe() {{ asm("{instruction}"); }}')


def _compiles(compiler: list[str], flags: str, code: str) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        command = [*compiler, *flags.split(), "-x", "c++", "-c", "-", "-o", f"{folder}/probe.o"]
        return subprocess.run(command, input=code, text=True, capture_output=True, check=False).returncode == 0


def find_nvcc() -> str | None:
    """Return the path of nvcc, or None if it is not found.

    The order is `CUDA_HOME`, `CUDA_PATH`, the path, and the default folder of CUDA.
    """
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    candidates = (*(f"{home}/bin/nvcc" for home in homes if home), "nvcc", "/usr/local/cuda/bin/nvcc")
    return next(filter(None, map(shutil.which, candidates)), None)


def _cuda_targets(nvcc: str) -> tuple[list[str], str]:
    """nvcc's options for `TORCH_CUDA_ARCH_LIST`, or for the supported `_CUDA_TARGETS`; and the names of the targets."""
    requested = re.split(r"[;,\s]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip("; ,\t"))
    if requested == [""]:
        listing = subprocess.run([nvcc, "--list-gpu-arch"], text=True, capture_output=True, check=False).stdout
        requested = [number for number in _CUDA_TARGETS if f"compute_{number.replace('.', '')}" in listing.split()]
        requested[-1:] = [f"{number}+PTX" for number in requested[-1:]]
    targets: dict[str, str] = {}
    for entry in requested:
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", entry)
        if match is None or int(match[1]) < 8:
            raise BuildError(
                f"TORCH_CUDA_ARCH_LIST: {entry!r} is not supported (expected 8.0 or later, such as 9.0 or 9.0+PTX)"
            )
        number = match[1] + match[2] + match[3]
        targets |= {f"sm_{number}": number} | ({f"compute_{number}": number} if match[4] else {})
    if not targets:
        raise BuildError(f"{nvcc} does not support any of {', '.join(_CUDA_TARGETS)}")
    options = [f"-gencode=arch=compute_{number},code={name}" for name, number in targets.items()]
    return options, ", ".join(targets)


def _make(target: Path, command: list[str], sources: Sequence[Path] = ()) -> None:
    """Run `command` unless `target` is current. A current target is newer than `sources` and its dependencies."""
    listing = target.with_name(f"{target.name}.d")
    if _is_current(target, [*sources, *_read_dependencies(listing)]):
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.{os.getpid()}")
    record = ["-MD", "-MF", str(listing)] if "-c" in command else []
    done = subprocess.run([*command, *record, "-o", str(partial)], text=True, capture_output=True, check=False)
    print(done.stdout + done.stderr, end="", file=sys.stderr)
    if done.returncode != 0:
        print(f"failed: {shlex.join(command)}", file=sys.stderr)
        raise BuildError(f"{Path(command[0]).name} fails on {command[-1] if record else target.name} (see above)")
    os.replace(partial, target)


def _is_current(target: Path, sources: Sequence[Path]) -> bool:
    try:
        return bool(sources) and target.stat().st_mtime >= max(source.stat().st_mtime for source in sources)
    except OSError:
        return False


def _read_dependencies(listing: Path) -> list[Path]:
    """The files named in a compiler's rule `object: source header ...`."""
    if not listing.exists():
        return []
    rule = listing.read_text().replace("\\\n", " ")
    return [Path(name) for name in shlex.split(rule.split(": ", 1)[1])]
