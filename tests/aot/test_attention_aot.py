"""Attention kernels compiled for every supported GPU: spills and shared memory.

The tests also count the instructions of the main loop with and without the bias. They check that the vector loads of
the bias match the register layout of the compiler. They do not need a GPU.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="needs Triton")
if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
    pytest.skip("the Triton interpreter and compiler cannot share a process", allow_module_level=True)

from beit_fast.kernels.aot import attention_variants, sass, ttgir_layouts  # noqa: E402
from beit_fast.kernels.aot import compile as aot  # noqa: E402
from beit_fast.kernels.aot.attention_variants import Variant, shipped  # noqa: E402
from beit_fast.kernels.aot.compile import CAPABILITIES, Inspection  # noqa: E402
from beit_fast.kernels.attention import configs  # noqa: E402
from beit_fast.kernels.common import gpu  # noqa: E402

REPOSITORY = Path(__file__).resolve().parents[2]
CACHE = aot.cache_folder(REPOSITORY / "build" / "aot")
REFERENCE_TILE = configs.TileConfig(64, 64, 4, 2)
COUNTED_WITH = "3.7.1"
PRECISIONS = {"half": ("bf16", "ieee"), "tf32": ("fp32", "tf32"), "ieee": ("fp32", "ieee")}
CAPABILITIES_OF = {
    architecture: [
        capability for capability in CAPABILITIES if gpu.architecture_class(*divmod(capability, 10)) == architecture
    ]
    for architecture in gpu.ARCHITECTURES
}


def even_layout(capability: int, dtype: str = "bf16") -> configs.BiasLayout:
    """Return the bias layout of even windows that fit the paired layout."""
    return attention_variants.bias_layouts(capability, dtype)[0]


def inspect_variants(*variants: Variant) -> list[Inspection]:
    """Compile the variants, which must not fail, and return the inspections."""
    found = list(aot.inspect_all(variants, CACHE))
    failures = [inspection for _, inspection in found if isinstance(inspection, str)]
    assert not failures, "\n".join(failures)
    return [inspection for _, inspection in found if not isinstance(inspection, str)]


def find_errors(variants: Iterable[Variant], workers: int = 1) -> list[str]:
    """Compile the variants and return every error found."""
    errors = []
    for variant, found in aot.inspect_all(variants, CACHE, workers, with_loop=False):
        if isinstance(found, str):
            errors.append(found)
            continue
        limit = attention_variants.shared_memory_limit(variant)
        if found.shared > limit:
            errors.append(f"{variant}: {found.shared} bytes of shared memory, limit {limit}")
        if found.spills:
            errors.append(f"{variant}: spills {found.stack} + {found.local} bytes")
        errors += [f"{variant}: {error}" for error in layout_errors(variant, found)]
    return errors


def layout_errors(variant: Variant, found: Inspection) -> list[str]:
    """Return errors in the register layout or the width of the bias loads."""
    if variant.tile is None:
        return []
    expected = {variant.bias_layout.vector} - {0}
    if variant.bias_layout.name == "extended" and variant.bias_layout.vector:
        expected.add(2)  # of the column offsets
    vectors = {load.vector for load in found.bias_loads}
    errors = [] if vectors == expected else [f"loads vectors of {sorted(vectors)} (expected {sorted(expected)})"]
    return errors + [error for load in found.bias_loads if (error := ttgir_layouts.misplaced(load))]


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_attention_shipped_kernels_fit_registers_and_shared_memory(capability: int) -> None:
    """Include small GPUs, whose shared memory is limited to 99 KiB.

    Bugs elsewhere: triton-lang/triton#8182, state-spaces/mamba#387.
    """
    layout = even_layout(capability)
    variants = [shipped(Variant(kernel, capability, bias_layout=layout)) for kernel in configs.KERNELS]
    variants += [shipped(Variant("forward", capability))]
    variants += [shipped(Variant("forward", capability, bias_layout=layout, split=True))]
    variants += attention_variants.small_kernels(capability)
    assert not (errors := find_errors(variants)), "\n".join(errors)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("kernel", configs.KERNELS)
def test_attention_vector_loads_match_tensor_core_layout(kernel: str, capability: int) -> None:
    """Check the layout that `load_bias_tile` assumes.

    A thread holds two columns of the rows m and m + 8.
    """
    variant = shipped(Variant(kernel, capability, bias_layout=even_layout(capability)))
    (found,) = inspect_variants(variant)
    assert {load.vector for load in found.bias_loads} == {variant.bias_layout.vector} != {1}
    assert [ttgir_layouts.misplaced(load) for load in found.bias_loads] == [None] * len(found.bias_loads)


@pytest.mark.parametrize("capability", [80, 90])
def test_attention_extended_column_offsets_are_loaded_in_pairs(capability: int) -> None:
    variant = shipped(Variant("forward", capability, bias_layout=configs.BiasLayout("extended", 1)))
    (found,) = inspect_variants(variant)
    assert {load.vector for load in found.bias_loads} == {1, 2}
    assert not layout_errors(variant, found)


def issued_instructions(variant: Variant) -> float:
    """Count main-loop instructions per scheduler for 64 x 64 scores."""
    (found,) = inspect_variants(variant)
    unknown = [name for name in found.loop if not sass.is_known(name)]
    assert not unknown, f"{variant}: sass.py does not know {unknown}"
    return sum(sass.instructions_by_pipe(found.loop, attention_variants.work(variant)).values())


counted = pytest.mark.skipif(
    triton.__version__ != COUNTED_WITH, reason=f"instructions are counted with Triton {COUNTED_WITH}"
)


@counted
@pytest.mark.parametrize(("capability", "limit"), [(90, 386), (80, 463)])
def test_attention_forward_loop_instructions_below_limit(capability: int, limit: int) -> None:
    assert (
        issued_instructions(Variant("forward", capability, REFERENCE_TILE, bias_layout=even_layout(capability)))
        <= limit
    )


@counted
@pytest.mark.parametrize(("layout", "ratio"), [("paired", 1.05), ("plain", 1.25), ("extended", 1.4)])
@pytest.mark.parametrize("capability", [80, 90])
def test_attention_bias_instructions_below_ratio(capability: int, layout: str, ratio: float) -> None:
    """Count instructions of the shipped tiles.

    Windows of even width read the paired layout, those of odd width the plain layout.
    """
    (found,) = [one for one in attention_variants.bias_layouts(capability, "bf16") if one.name == layout]
    with_bias = issued_instructions(shipped(Variant("forward", capability, bias_layout=found)))
    assert with_bias <= ratio * issued_instructions(shipped(Variant("forward", capability)))


@pytest.mark.parametrize("capability", [80, 90])
def test_attention_main_loop_holds_one_tile(capability: int) -> None:
    """The compiler must not unroll the loop: counts are per tile."""
    for kernel in configs.KERNELS:
        variant = Variant(kernel, capability, REFERENCE_TILE, bias_layout=even_layout(capability))
        (found,) = inspect_variants(variant)
        work = attention_variants.work(variant)
        assert sass.multiply_adds(found.loop) == work.multiply_adds / work.warps, kernel


REPEATED = {
    ("backward_dkv", "half", dropout, architecture, 128): 1.5
    for dropout in (False, True)
    for architecture in (gpu.SMALL, gpu.SM80)
}
"""How often each product is executed by a tile (kernel, arithmetic, dropout, architecture, padded head dimension) whose
warps repeat each other. Every other tile that was tried spills registers. Tiles that are not listed execute it once."""


def executions(kernel: str, arithmetic: str, dropout: bool, capability: int, block_d: int) -> float:
    """Return how many times the main loop of a shipped tile executes each product."""
    dtype, precision = PRECISIONS[arithmetic]
    layout = even_layout(capability, dtype)
    variant = shipped(Variant(kernel, capability, None, dtype, precision, block_d, layout, dropout=dropout))
    (found,) = inspect_variants(variant)
    work = attention_variants.work(variant)
    executed = sass.multiply_adds(found.loop)
    assert executed is not None, f"{variant}: the names of its products have no shape"
    return executed * work.warps / work.multiply_adds


@pytest.mark.parametrize("capability", [80, 86, 90])
def test_attention_main_loop_multiplies_once(capability: int) -> None:
    """A tile with fewer than 16 rows per warp makes warps repeat each other's products."""
    architecture = gpu.architecture_class(*divmod(capability, 10))
    for kernel in configs.KERNELS:
        entry = (kernel, "half", False, architecture, 64)
        assert entry not in REPEATED
        assert executions(kernel, "half", False, capability, 64) == 1, entry


@pytest.mark.slow
@pytest.mark.parametrize("arithmetic", ["half"])
@pytest.mark.parametrize("capability", [80, 86, 90])
def test_attention_main_loop_of_every_tile_multiplies_once_unless_listed(capability: int, arithmetic: str) -> None:
    architecture = gpu.architecture_class(*divmod(capability, 10))
    entries = list(itertools.product(configs.KERNELS, [arithmetic], (False, True), [architecture], configs.HEAD_DIMS))
    repeated = {entry: round(executions(*entry[:3], capability, entry[-1]), 2) for entry in entries}
    assert repeated == {entry: REPEATED.get(entry, 1) for entry in entries}


def test_select_every_configuration_returns_tile() -> None:
    errors = []
    for entry in itertools.product(
        configs.KERNELS, gpu.ARCHITECTURES, configs.HEAD_DIMS, gpu.ARITHMETICS, (False, True)
    ):
        try:
            tile = configs.select(*entry)
        except LookupError as error:
            errors.append(f"{entry}: no entry ({error!r})")
            continue
        sizes = (tile.block_m, tile.block_n, tile.num_warps)
        if any(size & (size - 1) for size in sizes) or min(sizes[:2]) < 16 or not 1 <= tile.num_warps <= 16:
            errors.append(f"{entry}: {tile} is not a valid tile")
    assert not errors, "\n".join(errors)


def test_capabilities_cover_every_architecture() -> None:
    assert all(CAPABILITIES_OF.values())
    assert [configs.padded_head_dim(head_dim - 8) for head_dim in configs.HEAD_DIMS] == list(configs.HEAD_DIMS)
    assert set(PRECISIONS) == set(gpu.ARITHMETICS)


def has_more_demanding(kernel: str, architecture: str, block_d: int, arithmetic: str, dropout: bool) -> bool:
    """Return whether an entry with a larger head dimension or dropout has the same tile."""
    tile = configs.select(kernel, architecture, block_d, arithmetic, dropout)
    others = itertools.product([size for size in configs.HEAD_DIMS if size >= block_d], {dropout, True})
    return any(
        configs.select(kernel, architecture, size, arithmetic, dropped) == tile
        for size, dropped in others
        if (size, dropped) != (block_d, dropout)
    )


def table_variants(architecture: str) -> list[Variant]:
    """Return variants for the entries of the configs of an architecture.

    Each tile has its most demanding options. These are the largest head dimension that uses it, dropout, the extended
    table, a key mask, and a head dimension that is padded. Half precision also has every head dimension in the layout
    of even windows, whose vector loads depend on the tile. The other layouts are tested at head dimension 64. Of the
    small GPUs, sm_86 represents sm_89, and sm_120 is tested if registers are scarce.
    """
    variants = []
    for kernel, arithmetic, block_d, dropout, capability in itertools.product(
        configs.KERNELS, gpu.ARITHMETICS, configs.HEAD_DIMS, (False, True), CAPABILITIES_OF[architecture]
    ):
        is_half = arithmetic == "half"
        if capability == 89 or (capability == 120 and not (is_half and block_d >= 64)):
            continue
        dtype, precision = PRECISIONS[arithmetic]
        even, odd, large = attention_variants.bias_layouts(capability, dtype)
        variant = shipped(
            Variant(kernel, capability, None, dtype, precision, block_d - 8, large, key_mask=True, dropout=dropout)
        )
        if not has_more_demanding(kernel, architecture, block_d, arithmetic, dropout):
            variants.append(variant)
        if is_half and not dropout:
            variants.append(variant._replace(bias_layout=even, head_dim=block_d, key_mask=False))
        if block_d == 64 and not dropout:
            others = [odd if is_half else even] + ([] if kernel == "backward_dbias" else [configs.NO_BIAS])
            variants += [variant._replace(bias_layout=layout, head_dim=64) for layout in others]
    return variants


def test_table_variants_cover_every_tile() -> None:
    for architecture in gpu.ARCHITECTURES:
        entries = itertools.product(configs.KERNELS, [architecture], configs.HEAD_DIMS, gpu.ARITHMETICS, (False, True))
        expected = {(entry[0], entry[3], configs.select(*entry)) for entry in entries}
        assert {(one.kernel, one.arithmetic, one.tile) for one in table_variants(architecture)} == expected


@pytest.mark.slow
@pytest.mark.parametrize("architecture", gpu.ARCHITECTURES)
def test_attention_all_configs_fit_registers_and_shared_memory(architecture: str) -> None:
    errors = find_errors(table_variants(architecture), workers=2)
    assert not errors, f"{len(errors)} of the variants failed:\n" + "\n".join(errors)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_attention_small_kernels_of_every_head_dim_and_dtype_fit(capability: int) -> None:
    variants = [
        variant
        for dtype, head_dim in itertools.product(("fp16", "fp32"), (8, 128))
        for variant in attention_variants.small_kernels(capability, dtype, head_dim)
    ]
    assert not (errors := find_errors(variants, workers=2)), "\n".join(errors)


def test_inspect_cached_variant_does_not_compile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    variant = Variant("dtable_cls", 80)
    first = aot.inspect(variant, tmp_path)
    monkeypatch.setattr(triton, "compile", None)
    assert aot.inspect(variant, tmp_path) == first
    monkeypatch.setattr(configs, "CLS_BLOCK", 2 * configs.CLS_BLOCK)
    with pytest.raises(aot.CompilationError):
        aot.inspect(variant, tmp_path)


def test_inspect_all_failed_variant_is_reported_and_not_cached(tmp_path: Path) -> None:
    """Compile a tile of 48 rows, not a power of two, and a valid variant."""
    bad = Variant("forward", 80, configs.TileConfig(48, 64, 4, 2))
    good = Variant("dtable_cls", 80)
    (_, failure), (_, found) = aot.inspect_all([bad, good], tmp_path)
    assert isinstance(failure, str)
    assert failure.startswith(f"{bad} does not compile")
    assert isinstance(found, Inspection)
    assert len(list(tmp_path.iterdir())) == 1


def test_cache_folder_follows_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BEIT_FAST_AOT_CACHE", raising=False)
    assert aot.cache_folder(tmp_path) == tmp_path
    monkeypatch.setenv("BEIT_FAST_AOT_CACHE", "/elsewhere")
    assert aot.cache_folder(tmp_path) == Path("/elsewhere")


def test_kernels_import_without_torch(tmp_path: Path) -> None:
    """Ahead-of-time compilation requires Triton only."""
    (tmp_path / "only_kernels").symlink_to(REPOSITORY / "kernels")
    script = f"import sys; sys.path.insert(0, {str(tmp_path)!r})"
    script += "; from only_kernels.aot import attention_variants, compile, linear_gelu_variants, residual_norm_variants"
    script += "; assert 'torch' not in sys.modules"
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
