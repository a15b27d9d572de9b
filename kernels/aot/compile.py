"""Compiles kernels without a GPU, as a launch would, and says what came out: resources, loop, layouts.

What can be compiled is in the other files of this folder, one for each folder of kernels: see `Compilable`.

Needs Triton only. What was found is kept as JSON under the hash of the kernels' source, Triton's version and all that
the compiler was given, so asking again compiles nothing.
"""

import concurrent.futures
import dataclasses
import functools
import hashlib
import json
import multiprocessing
import os
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ..common import primitives
from . import sass, ttgir_layouts

CAPABILITIES = (80, 86, 89, 90, 100, 120)
DTYPES = {"bf16": 2, "fp16": 2, "fp32": 4}
"""Bytes of an element."""


class CompileSpec(NamedTuple):
    """A kernel with all that the compiler needs: constants, signature and options."""

    function: Any  # triton.JITFunction
    constants: dict[str, Any]
    specialisation: tuple[dict[str, Any], dict[tuple[int, ...], Any], dict[tuple[int, ...], Any]]
    options: dict[str, int]


class Compilable(Protocol):
    """One way to compile one kernel; its text says which."""

    @property
    def capability(self) -> int: ...

    @property
    def tile(self) -> Any:
        """None for kernels that have no main loop to look at."""

    def compile_spec(self) -> CompileSpec: ...


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler made of a variant."""

    cubin: bytes
    ptx: str
    ttgir: str
    shared: int  # bytes


@dataclasses.dataclass(frozen=True)
class Inspection:
    """What one program of a compiled variant needs, and what its main loop does."""

    registers: int  # of a thread
    stack: int  # bytes of a thread; with `local`, what was spilled
    local: int
    shared: int  # bytes
    loop: Counter[str]  # instructions of the main loop, see sass.main_loop
    bias_loads: list[ttgir_layouts.BiasLoad]

    @property
    def spills(self) -> int:
        return self.stack + self.local


AnyVariant = TypeVar("AnyVariant", bound=Compilable)


class CompilationError(RuntimeError):
    """The compiler gave up on a variant."""


def require_compiler() -> None:
    """RuntimeError where Triton's interpreter has taken the compiler's place."""
    if not isinstance(primitives.split_program_id, triton.JITFunction):
        raise RuntimeError(
            "Triton's interpreter is on (TRITON_INTERPRET is set), and it cannot share a process with the compiler: "
            "unset TRITON_INTERPRET to compile kernels"
        )


def compile_variant(variant: Compilable) -> Compiled:
    """Compile for a GPU that need not be there; CompilationError says which variant does not compile, and why."""
    require_compiler()
    spec = variant.compile_spec()
    source = ASTSource(spec.function, *spec.specialisation)
    with tempfile.TemporaryDirectory() as folder, knobs.cache.scope():
        knobs.cache.dir = folder
        try:
            compiled = triton.compile(source, target=GPUTarget("cuda", variant.capability, 32), options=spec.options)
        except Exception as error:  # of every kind: from the front end, MLIR, LLVM and ptxas
            raise CompilationError(f"{variant} does not compile: {type(error).__name__}: {error}") from error
        return Compiled(compiled.asm["cubin"], compiled.asm["ptx"], compiled.asm["ttgir"], compiled.metadata.shared)


def cache_folder(default: Path) -> Path:
    """Where results are kept: BEIT_FAST_AOT_CACHE, or else `default`."""
    return Path(os.environ.get("BEIT_FAST_AOT_CACHE") or default)


def inspect(variant: Compilable, cache: Path) -> Inspection:
    """Compile and look, or read what an earlier call with the same sources found."""
    file = cache / f"{_key(variant)}.json"
    if not file.exists():
        _write(file, _inspect_compiled(compile_variant(variant), variant))
    found = json.loads(file.read_text())
    found["loop"] = Counter(found["loop"])
    found["bias_loads"] = [ttgir_layouts.BiasLoad(*load) for load in found["bias_loads"]]
    return Inspection(**found)


def _inspect_compiled(compiled: Compiled, variant: Compilable) -> Inspection:
    return Inspection(
        **sass.resources(compiled.cubin)._asdict(),
        shared=compiled.shared,
        loop=sass.main_loop(sass.disassemble(compiled.cubin)) if variant.tile else Counter(),
        bias_loads=ttgir_layouts.bias_loads(compiled.ttgir, variant.capability),
    )


def _write(file: Path, inspection: Inspection) -> None:
    """All at once, because another process may look for the same file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(f".{os.getpid()}.part")
    part.write_text(json.dumps(vars(inspection)))
    part.replace(file)


def _key(variant: Compilable) -> str:
    spec = variant.compile_spec()
    text = [variant, sorted(spec.constants.items()), sorted(spec.options.items())]
    return hashlib.sha256(f"{_sources()} {triton.__version__} {text}".encode()).hexdigest()


@functools.cache
def _sources() -> str:
    """Hash of the kernels and of what looks at them; what configs.py decides is in variants and constants."""
    folder = Path(__file__).parent.parent
    files = [
        file
        for file in sorted(folder.glob("*/*.py"))
        if file.stem not in ("arguments", "configs", "device", "gpu", "launch", "tiles")
    ]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def inspect_all(
    variants: Iterable[AnyVariant], cache: Path, workers: int = 1
) -> Iterator[tuple[AnyVariant, Inspection | str]]:
    """Each variant with what `inspect` gave, or with why it does not compile, in order.

    Args:
        cache: folder of results, see `cache_folder`.
        workers: processes that compile; 1 is this one.
    """
    require_compiler()
    variants = list(variants)
    attempt = functools.partial(_attempt, cache=cache)
    if workers == 1:
        yield from zip(variants, map(attempt, variants), strict=True)
        return
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
        yield from zip(variants, pool.map(attempt, variants), strict=True)


def _attempt(variant: Compilable, cache: Path) -> Inspection | str:
    """As `inspect`, an error of the compiler as its text."""
    try:
        return inspect(variant, cache)
    except CompilationError as error:
        return str(error)
