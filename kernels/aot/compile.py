"""Compile kernels without a GPU, as a launch would, and inspect them.

An inspection covers resources, the main loop and register layouts. Variants to compile are in the other files of this
folder, one for each folder of kernels. This needs Triton alone. Results are cached as JSON under a hash of the kernels'
source, Triton's version and all arguments of the compiler.
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


def capabilities_error(given: Iterable[int]) -> str | None:
    """Return the error of unknown compute capabilities, or None."""
    unknown = sorted(set(given) - set(CAPABILITIES))
    accepted = ", ".join(map(str, CAPABILITIES))
    return f"compute capabilities {unknown} are not supported (expected {accepted})" if unknown else None


class CompileSpec(NamedTuple):
    """A kernel, and the constants, signature and options to compile it with."""

    function: Any  # triton.JITFunction
    constants: dict[str, Any]
    specialization: tuple[dict[str, Any], dict[tuple[int, ...], Any], dict[tuple[int, ...], Any]]
    options: dict[str, int]


class Compilable(Protocol):
    """One way to compile one kernel; `str()` names it."""

    @property
    def capability(self) -> int: ...

    @property
    def tile(self) -> Any:
        """None for kernels without a main loop to inspect."""

    def compile_spec(self) -> CompileSpec: ...


@dataclasses.dataclass(frozen=True)
class Compiled:
    """The compiler's output for a variant."""

    cubin: bytes
    ptx: str
    ttgir: str
    shared: int  # bytes


@dataclasses.dataclass(frozen=True)
class Inspection:
    """Resources of a compiled variant, and the instructions of its main loop."""

    registers: int  # of a thread
    stack: int  # bytes of a thread; stack and local memory hold spilled registers
    local: int
    shared: int  # bytes of a program
    loop: Counter[str]  # instructions of the main loop, see sass.main_loop; empty if not asked for
    bias_loads: list[ttgir_layouts.BiasLoad]

    @property
    def spills(self) -> int:
        return self.stack + self.local


AnyVariant = TypeVar("AnyVariant", bound=Compilable)


class CompilationError(RuntimeError):
    """A variant does not compile."""


def require_compiler() -> None:
    """Check that Triton compiles in this process.

    Raises:
        RuntimeError: If TRITON_INTERPRET is set.
    """
    if not isinstance(primitives.split_program_id, triton.JITFunction):
        raise RuntimeError(
            "Triton's interpreter is on (TRITON_INTERPRET is set), and it cannot share a process with the compiler: "
            "unset TRITON_INTERPRET to compile kernels"
        )


def compile_variant(variant: Compilable) -> Compiled:
    """Compile for the variant's GPU architecture.

    Raises:
        CompilationError: If the variant does not compile, with its name and the reason.
    """
    require_compiler()
    spec = variant.compile_spec()
    source = ASTSource(spec.function, *spec.specialization)
    with tempfile.TemporaryDirectory() as folder, knobs.cache.scope():
        knobs.cache.dir = folder
        try:
            compiled = triton.compile(source, target=GPUTarget("cuda", variant.capability, 32), options=spec.options)
        # The front end, MLIR, LLVM and ptxas raise different types.
        except Exception as error:
            raise CompilationError(f"{variant} does not compile: {type(error).__name__}: {error}") from error
        return Compiled(compiled.asm["cubin"], compiled.asm["ptx"], compiled.asm["ttgir"], compiled.metadata.shared)


def cache_folder(default: Path) -> Path:
    """Return the folder of cached results: BEIT_FAST_AOT_CACHE, or else `default`."""
    return Path(os.environ.get("BEIT_FAST_AOT_CACHE") or default)


def inspect(variant: Compilable, cache: Path, with_loop: bool = True) -> Inspection:
    """Compile and inspect a variant, or read the cached result.

    Args:
        variant: The variant.
        cache: Folder of cached results, see `cache_folder`.
        with_loop: Whether to disassemble the main loop, which takes a third of the time.
    """
    key = _key(variant)
    whole, resources = cache / f"{key}.json", cache / f"{key}.resources.json"
    file = whole if with_loop or whole.exists() else resources
    if not file.exists():
        _write(file, _inspect_compiled(compile_variant(variant), variant, with_loop))
    found = json.loads(file.read_text())
    found["loop"] = Counter(found["loop"])
    found["bias_loads"] = [ttgir_layouts.BiasLoad(*load) for load in found["bias_loads"]]
    return Inspection(**found)


def _inspect_compiled(compiled: Compiled, variant: Compilable, with_loop: bool) -> Inspection:
    return Inspection(
        **sass.resources(compiled.cubin)._asdict(),
        shared=compiled.shared,
        loop=sass.main_loop(sass.disassemble(compiled.cubin)) if with_loop and variant.tile else Counter(),
        bias_loads=ttgir_layouts.bias_loads(compiled.ttgir, variant.capability),
    )


def _write(file: Path, inspection: Inspection) -> None:
    """Cache a result."""
    # By atomic rename, because other processes read the same folder.
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
    """Return a hash of the source of kernels and inspection."""
    # What the excluded files decide is part of variants and constants.
    folder = Path(__file__).parent.parent
    files = [
        file
        for file in sorted(folder.glob("*/*.py"))
        if file.stem
        not in ("arguments", "compiler_hazards", "configs", "device", "gpu", "launch", "tiles", "tuned_tiles")
    ]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def inspect_all(
    variants: Iterable[AnyVariant], cache: Path, workers: int = 1, with_loop: bool = True
) -> Iterator[tuple[AnyVariant, Inspection | str]]:
    """Yield each variant, in order, with its inspection or the compiler's error.

    Args:
        variants: Variants of one kind.
        cache: Folder of cached results, see `cache_folder`.
        workers: Number of processes that compile; 1 compiles in this one.
        with_loop: As for `inspect`.
    """
    require_compiler()
    variants = list(variants)
    attempt = functools.partial(_attempt, cache=cache, with_loop=with_loop)
    if workers == 1:
        yield from zip(variants, map(attempt, variants), strict=True)
        return
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
        yield from zip(variants, pool.map(attempt, variants), strict=True)


def _attempt(variant: Compilable, cache: Path, with_loop: bool) -> Inspection | str:
    """Inspect a variant; return an error of the compiler as text."""
    try:
        return inspect(variant, cache, with_loop)
    except CompilationError as error:
        return str(error)
