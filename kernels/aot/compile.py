"""Compiles kernels without a GPU, as a launch would, and says what came out: resources, loop, layouts.

The variants here are those of attention; a kernel of another folder brings its own, see `Compilable`.

Needs Triton only. What was found is kept as JSON under the hash of the kernels' source, Triton's version and all that
the compiler was told, so asking again compiles nothing.
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

from ..attention import (
    backward_dbias,
    backward_dkv,
    backward_dq,
    backward_preprocess,
    configs,
    forward,
    pack_bias,
    primitives,
)
from . import sass, ttgir_layouts

CAPABILITIES = (80, 86, 89, 90, 100, 120)
DTYPES = {"bf16": 2, "fp16": 2, "fp32": 4}
"""Bytes of an element."""

KERNELS = {
    "forward": forward.attention_forward_kernel,
    "key_value_gradient": backward_dkv.key_value_gradient_kernel,
    "query_gradient": backward_dq.query_gradient_kernel,
    "bias_gradient": backward_dbias.bias_gradient_kernel,
    "bias_records": pack_bias.bias_records_kernel,
    "merge_splits": forward.merge_splits_kernel,
    "row_statistics": backward_preprocess.row_statistics_kernel,
    "cls_column_gradient": backward_dbias.cls_column_gradient_kernel,
    "patch_rows_gradient": backward_dbias.patch_rows_gradient_kernel,
    "cls_rows_gradient": backward_dbias.cls_rows_gradient_kernel,
}
PRODUCTS = {"forward": 2, "key_value_gradient": 4, "query_gradient": 3, "bias_gradient": 2}
"""Matrix products of a step, each of BLOCK_M x BLOCK_N x BLOCK_D multiply-adds."""

ROWS = ("query", "key", "value", "out", "grad_out", "grad_query", "grad_key", "grad_value")
POINTERS = {
    "bias_records": "*fp32",
    "cls_column": "*fp32",
    "column_offsets": "*i32",
    "grad_table": "*fp32",
    "key_mask": "*i1",
    "lse": "*fp32",
    "partial_lse": "*fp32",
    "partial_out": "*fp32",
    "records": "*fp32",
    "row_delta": "*fp32",
    "row_lse": "*fp32",
    "scratch": "*fp32",
    "table": "*fp32",
}
FLOATS = ("scale", "scale_log2", "drop_scale", "inverse_scale")
LAUNCH_DEFAULTS = {"num_warps": 4, "num_stages": 3}
"""Triton's own, for the kernels that have no tiles to choose."""


class Told(NamedTuple):
    """What the compiler is told."""

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

    def told(self) -> Told: ...


class Variant(NamedTuple):
    """One way to compile one attention kernel."""

    kernel: str
    capability: int
    tile: configs.TileConfig | None = None  # None for kernels that have no choice
    dtype: str = "bf16"
    precision: str = "ieee"  # of fp32 products
    head_dim: int = 64
    route: configs.BiasRoute = configs.NO_BIAS
    key_mask: bool = False
    dropout: bool = False
    split: bool = False  # forward only

    @property
    def arithmetic(self) -> str:
        return configs.arithmetic(DTYPES[self.dtype], self.precision)

    @property
    def architecture(self) -> str:
        return configs.architecture_class(*divmod(self.capability, 10))

    def told(self) -> Told:
        constants = _constants(self)
        return Told(KERNELS[self.kernel], constants, _specialisation(self, constants), _options(self))

    def __str__(self) -> str:
        words = [self.kernel, f"sm_{self.capability}", self.dtype, f"D={self.head_dim}", route_name(self.route)]
        words += [self.precision] if self.dtype == "fp32" else []
        words += [name for name in ("key_mask", "dropout", "split") if getattr(self, name)]
        return " ".join(words + ([tile_name(self.tile)] if self.tile else []))


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


def tile_name(tile: configs.TileConfig) -> str:
    return f"{tile.block_m}x{tile.block_n} {tile.num_warps}w {tile.num_stages}s"


def route_name(route: configs.BiasRoute) -> str:
    """The layout; pairs of a plain table are told from single entries."""
    return "plain pairs" if route == configs.BiasRoute("plain", 2) else route.layout


def bias_routes(capability: int, dtype: str) -> list[configs.BiasRoute]:
    """How the bias is read on a GPU: windows of even and odd width, and one whose band is too large."""
    architecture = configs.architecture_class(*divmod(capability, 10))
    windows = ((14, 14), (15, 15), (96, 96))
    return [configs.bias_route(architecture, DTYPES[dtype], window) for window in windows]


def shipped(variant: Variant) -> Variant:
    """The variant with the tiles that the launcher would choose."""
    block_d = configs.padded_head_dim(variant.head_dim)
    tile = configs.select(variant.kernel, variant.architecture, block_d, variant.arithmetic, variant.dropout)
    return variant._replace(tile=tile)


def small_kernels(capability: int, dtype: str = "bf16", head_dim: int = 64) -> list[Variant]:
    """The kernels that have no tiles to choose, in the forms in which they are launched."""
    plain = Variant("bias_records", capability, dtype=dtype, head_dim=head_dim)
    layouts = {route.layout: route for route in bias_routes(capability, dtype)}
    variants = [plain._replace(route=route) for route in layouts.values()]
    any_route = variants[0].route
    variants += [plain._replace(kernel=name) for name in ("merge_splits", "row_statistics")]
    variants += [
        plain._replace(kernel="cls_column_gradient", route=any_route, key_mask=masked, dropout=masked)
        for masked in (False, True)
    ]
    return variants + [plain._replace(kernel=name) for name in ("patch_rows_gradient", "cls_rows_gradient")]


AnyVariant = TypeVar("AnyVariant", bound=Compilable)


class CompilationError(RuntimeError):
    """The compiler gave up on a variant."""


def require_compiler() -> None:
    """RuntimeError where Triton's interpreter has taken the compiler's place."""
    if not isinstance(forward.attention_forward_kernel, triton.JITFunction):
        raise RuntimeError(
            "Triton's interpreter is on (TRITON_INTERPRET is set), and it cannot share a process with the compiler: "
            "unset TRITON_INTERPRET to compile kernels"
        )


def compile_variant(variant: Compilable) -> Compiled:
    """Compile for a GPU that need not be there; CompilationError says which variant does not compile, and why."""
    require_compiler()
    told = variant.told()
    source = ASTSource(told.function, *told.specialisation)
    with tempfile.TemporaryDirectory() as folder, knobs.cache.scope():
        knobs.cache.dir = folder
        try:
            compiled = triton.compile(source, target=GPUTarget("cuda", variant.capability, 32), options=told.options)
        except Exception as error:  # of every kind: from the front end, MLIR, LLVM and ptxas
            raise CompilationError(f"{variant} does not compile: {type(error).__name__}: {error}") from error
        return Compiled(compiled.asm["cubin"], compiled.asm["ptx"], compiled.asm["ttgir"], compiled.metadata.shared)


def _options(variant: Variant) -> dict[str, int]:
    tile = variant.tile
    return {"num_warps": tile.num_warps, "num_stages": tile.num_stages} if tile else LAUNCH_DEFAULTS


def _constants(variant: Variant) -> dict[str, Any]:
    """Compile-time arguments, as the launcher passes them; tensors that are not there are None."""
    blocks = {
        "bias_records": {"BLOCK": configs.RECORD_BLOCK},
        "merge_splits": {"BLOCK_M": configs.MERGE_BLOCK},
        "row_statistics": {"BLOCK_M": configs.STATISTICS_BLOCK},
        "cls_column_gradient": {"BLOCK_M": configs.STATISTICS_BLOCK},
        "patch_rows_gradient": {
            "BLOCK_P": configs.DIAGONAL_BLOCK_PATCHES,
            "BLOCK_V": configs.DIAGONAL_BLOCK_DIFFERENCES,
        },
        "cls_rows_gradient": {"BLOCK": configs.CLS_BLOCK},
    }
    constants: dict[str, Any] = {
        "HEAD_DIM": variant.head_dim,
        "BLOCK_D": configs.padded_head_dim(variant.head_dim),
        "BIAS_LAYOUT": variant.route.layout,
        "BIAS_VECTOR": variant.route.vector,
        "SPLIT": variant.split,
        "DROPOUT": variant.dropout,
        "PRECISION": variant.precision,
        "UPCAST": False,
        **blocks.get(variant.kernel, {}),
    }
    if variant.tile:
        constants.update(BLOCK_M=variant.tile.block_m, BLOCK_N=variant.tile.block_n)
    absent = {
        "bias_records": variant.route.layout == "none",
        "column_offsets": variant.route.layout != "extended",
        "key_mask": not variant.key_mask,
    }
    constants.update({name: None for name, is_absent in absent.items() if is_absent})
    return {name: value for name, value in constants.items() if name in KERNELS[variant.kernel].arg_names}


def _specialisation(variant: Variant, constants: dict[str, Any]) -> tuple[dict, dict, dict]:
    """Signature, constants and attributes of a usual launch: 16 divides pointers, and strides of whole heads.

    A head begins `head_dim` elements after the one before it, which 16 need not divide.
    """
    signature: dict[str, Any] = {}
    constexprs: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    divisible = [["tt.divisibility", 16]]
    for position, name in enumerate(KERNELS[variant.kernel].arg_names):
        if name in constants:
            signature[name] = "constexpr"
            constexprs[(position,)] = constants[name]
        elif name in ROWS or name in POINTERS:
            signature[name] = _pointer_type(name, variant)
            attributes[(position,)] = divisible
        elif name in ("mask_strides", "table_strides"):
            signature[name] = ("i32", "constexpr")
            constexprs[(position, 1)] = 1
        elif name.endswith("_strides"):
            signature[name] = ("i32", "i32", "i32")
            axes = (0, 1, 2) if variant.head_dim % 16 == 0 else (0, 1)
            attributes.update({(position, axis): divisible for axis in axes})
        elif name in FLOATS or name in primitives.RUNTIME_INTEGERS:
            signature[name] = "fp32" if name in FLOATS else "i32"
        else:
            raise ValueError(f"{variant.kernel}: nothing says which type the argument {name!r} has")
    return signature, constexprs, attributes


def _pointer_type(name: str, variant: Variant) -> str:
    if name == "out" and variant.split:
        return "*fp32"
    return POINTERS.get(name, f"*{variant.dtype}")


def work(variant: Variant) -> sass.Work:
    """What an iteration of a variant's main loop does; for the kernels that have tiles."""
    tile = variant.tile
    assert tile is not None, f"{variant.kernel} has no main loop"
    scores = tile.block_m * tile.block_n
    products = PRODUCTS[variant.kernel] * scores * configs.padded_head_dim(variant.head_dim)
    return sass.Work(variant.capability, tile.num_warps, scores, products, variant.arithmetic == "tf32")


def shared_memory_limit(variant: Variant) -> int:
    return configs.SHARED_MEMORY_LIMIT[variant.architecture]


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
    told = [variant, sorted(variant.told().constants.items()), sorted(variant.told().options.items())]
    return hashlib.sha256(f"{_sources()} {triton.__version__} {told}".encode()).hexdigest()


@functools.cache
def _sources() -> str:
    """Hash of the kernels and of what looks at them; what configs.py decides is in variants and constants."""
    folder = Path(__file__).parent.parent
    files = [
        file for file in sorted(folder.glob("*/*.py")) if file.stem not in ("arguments", "configs", "launch", "tiles")
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
