"""Every attention kernel becomes a cubin for every supported GPU, without a GPU: nothing spills, everything fits.

Also counted: the instructions of the main loop, with and without the bias; and read off the compiler's own layouts:
that the vector loads of the bias find in a thread's registers what they take to be there.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="there is nothing to compile without Triton")
if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
    pytest.skip("Triton's interpreter and its compiler cannot share a process", allow_module_level=True)

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
    """How the bias of a usual window is read: its width is even, it fits the paired layout."""
    return attention_variants.bias_layouts(capability, dtype)[0]


def inspected(*variants: Variant) -> list[Inspection]:
    """What came out of each variant, all of which compile."""
    found = list(aot.inspect_all(variants, CACHE))
    failures = [inspection for _, inspection in found if isinstance(inspection, str)]
    assert not failures, "\n".join(failures)
    return [inspection for _, inspection in found if not isinstance(inspection, str)]


def complaints(variants: Iterable[Variant], workers: int = 1) -> list[str]:
    """Everything that is wrong with what the variants compile to."""
    wrong = []
    for variant, found in aot.inspect_all(variants, CACHE, workers):
        if isinstance(found, str):
            wrong.append(found)
            continue
        limit = attention_variants.shared_memory_limit(variant)
        if found.shared > limit:
            wrong.append(f"{variant}: {found.shared} bytes of shared memory, limit {limit}")
        if found.spills:
            wrong.append(f"{variant}: spills {found.stack} + {found.local} bytes")
        wrong += [f"{variant}: {problem}" for problem in layout_complaints(variant, found)]
    return wrong


def layout_complaints(variant: Variant, found: Inspection) -> list[str]:
    """What is wrong with the places that the bias loads fill, or with which loads there are."""
    if variant.tile is None:
        return []
    expected = {variant.bias_layout.vector} - {0}
    if variant.bias_layout.name == "extended" and variant.bias_layout.vector:
        expected.add(2)  # of the column offsets
    vectors = {load.vector for load in found.bias_loads}
    wrong = [] if vectors == expected else [f"loads vectors of {sorted(vectors)} and not of {sorted(expected)}"]
    return wrong + [problem for load in found.bias_loads if (problem := ttgir_layouts.misplaced(load))]


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_shipped_kernels_neither_spill_nor_exceed_shared_memory(capability: int) -> None:
    """Small GPUs have 99 KiB: triton-lang/triton#8182, state-spaces/mamba#387."""
    layout = even_layout(capability)
    variants = [shipped(Variant(kernel, capability, bias_layout=layout)) for kernel in configs.KERNELS]
    variants += [shipped(Variant("forward", capability))]
    variants += [shipped(Variant("forward", capability, bias_layout=layout, split=True))]
    variants += attention_variants.small_kernels(capability)
    assert not (wrong := complaints(variants)), "\n".join(wrong)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("kernel", configs.KERNELS)
def test_vector_loads_fill_registers_in_the_layout_of_the_tensor_cores(kernel: str, capability: int) -> None:
    """The pair of columns, and the rows m and m + 8, that primitives.load_bias_tile takes a thread to hold."""
    variant = shipped(Variant(kernel, capability, bias_layout=even_layout(capability)))
    (found,) = inspected(variant)
    assert {load.vector for load in found.bias_loads} == {variant.bias_layout.vector} != {1}
    assert [ttgir_layouts.misplaced(load) for load in found.bias_loads] == [None] * len(found.bias_loads)


@pytest.mark.parametrize("capability", [80, 90])
def test_column_offsets_of_an_extended_table_are_loaded_in_pairs(capability: int) -> None:
    variant = shipped(Variant("forward", capability, bias_layout=configs.BiasLayout("extended", 1)))
    (found,) = inspected(variant)
    assert {load.vector for load in found.bias_loads} == {1, 2}
    assert not layout_complaints(variant, found)


def issued(variant: Variant) -> float:
    """Instructions of the main loop that each scheduler issues for 64 x 64 scores."""
    (found,) = inspected(variant)
    unknown = [name for name in found.loop if not sass.is_known(name)]
    assert not unknown, f"{variant}: sass.py does not know {unknown}"
    return sum(sass.instructions_by_pipe(found.loop, attention_variants.work(variant)).values())


counted = pytest.mark.skipif(
    triton.__version__ != COUNTED_WITH, reason=f"instructions are counted with Triton {COUNTED_WITH}"
)


@counted
@pytest.mark.parametrize(("capability", "limit"), [(90, 386), (80, 463)])
def test_instructions_of_the_forward_loop(capability: int, limit: int) -> None:
    assert issued(Variant("forward", capability, REFERENCE_TILE, bias_layout=even_layout(capability))) <= limit


@counted
@pytest.mark.parametrize(("layout", "ratio"), [("paired", 1.05), ("plain", 1.25), ("extended", 1.4)])
@pytest.mark.parametrize("capability", [80, 90])
def test_the_bias_costs_next_to_no_instructions(capability: int, layout: str, ratio: float) -> None:
    """Of the shipped tiles; windows of even width read the paired layout, those of odd width the plain one."""
    (found,) = [one for one in attention_variants.bias_layouts(capability, "bf16") if one.name == layout]
    with_bias = issued(shipped(Variant("forward", capability, bias_layout=found)))
    assert with_bias <= ratio * issued(shipped(Variant("forward", capability)))


@pytest.mark.parametrize("capability", [80, 90])
def test_the_main_loop_is_one_tile(capability: int) -> None:
    """What is divided by the tiles of an iteration holds that many: the compiler has unrolled nothing."""
    for kernel in configs.KERNELS:
        variant = Variant(kernel, capability, REFERENCE_TILE, bias_layout=even_layout(capability))
        (found,) = inspected(variant)
        work = attention_variants.work(variant)
        assert sass.multiply_adds(found.loop) == work.multiply_adds / work.warps, kernel


def test_every_kernel_has_tiles_for_every_arithmetic_head_dimension_and_architecture() -> None:
    wrong = []
    for entry in itertools.product(
        configs.KERNELS, gpu.ARCHITECTURES, configs.HEAD_DIMS, gpu.ARITHMETICS, (False, True)
    ):
        try:
            tile = configs.select(*entry)
        except LookupError as error:
            wrong.append(f"{entry}: no entry ({error!r})")
            continue
        sizes = (tile.block_m, tile.block_n, tile.num_warps)
        if any(size & (size - 1) for size in sizes) or min(sizes[:2]) < 16 or not 1 <= tile.num_warps <= 16:
            wrong.append(f"{entry}: {tile} is no tile")
    assert not wrong, "\n".join(wrong)


def test_capabilities_cover_every_architecture_class() -> None:
    assert all(CAPABILITIES_OF.values())
    assert [configs.padded_head_dim(head_dim - 8) for head_dim in configs.HEAD_DIMS] == list(configs.HEAD_DIMS)
    assert set(PRECISIONS) == set(gpu.ARITHMETICS)


def table_variants(architecture: str) -> list[Variant]:
    """Each entry of the table of configs for the GPUs of one class.

    At its most demanding: the extended table, a key mask, and a head dimension that is not the padded one. Without
    dropout, half precision also in the layout of even windows, whose vector loads depend on the tile; the other
    layouts at head dimension 64. Of the small GPUs sm_86 stands for sm_89, and sm_120 is taken where registers are
    scarce.
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
        variants.append(variant)
        if is_half and not dropout:
            variants.append(variant._replace(bias_layout=even, head_dim=block_d, key_mask=False))
        if block_d == 64 and not dropout:
            others = [odd if is_half else even] + ([] if kernel == "backward_dbias" else [configs.NO_BIAS])
            variants += [variant._replace(bias_layout=layout, head_dim=64) for layout in others]
    return variants


@pytest.mark.slow
@pytest.mark.parametrize("architecture", gpu.ARCHITECTURES)
def test_the_whole_table_of_configs(architecture: str) -> None:
    wrong = complaints(table_variants(architecture), workers=2)
    assert not wrong, f"{len(wrong)} of the table's variants:\n" + "\n".join(wrong)


@pytest.mark.slow
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_small_kernels_of_every_head_dimension_and_dtype(capability: int) -> None:
    variants = [
        variant
        for dtype, head_dim in itertools.product(("fp16", "fp32"), (8, 64, 120, 128))
        for variant in attention_variants.small_kernels(capability, dtype, head_dim)
    ]
    assert not (wrong := complaints(variants, workers=2)), "\n".join(wrong)


def test_a_second_look_compiles_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    variant = Variant("dtable_cls", 80)
    first = aot.inspect(variant, tmp_path)
    monkeypatch.setattr(triton, "compile", None)
    assert aot.inspect(variant, tmp_path) == first
    monkeypatch.setattr(configs, "CLS_BLOCK", 2 * configs.CLS_BLOCK)
    with pytest.raises(aot.CompilationError):
        aot.inspect(variant, tmp_path)


def test_what_does_not_compile_is_told_and_not_kept(tmp_path: Path) -> None:
    """A tile of 48 rows is no power of two; the other variant is served all the same."""
    bad = Variant("forward", 80, configs.TileConfig(48, 64, 4, 2))
    good = Variant("dtable_cls", 80)
    (_, failure), (_, found) = aot.inspect_all([bad, good], tmp_path)
    assert isinstance(failure, str)
    assert failure.startswith(f"{bad} does not compile")
    assert isinstance(found, Inspection)
    assert len(list(tmp_path.iterdir())) == 1


def test_the_cache_is_where_the_environment_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BEIT_FAST_AOT_CACHE", raising=False)
    assert aot.cache_folder(tmp_path) == tmp_path
    monkeypatch.setenv("BEIT_FAST_AOT_CACHE", "/elsewhere")
    assert aot.cache_folder(tmp_path) == Path("/elsewhere")


def test_kernel_files_import_without_torch(tmp_path: Path) -> None:
    """What compiles ahead of time needs Triton alone."""
    (tmp_path / "only_kernels").symlink_to(REPOSITORY / "kernels")
    script = f"import sys; sys.path.insert(0, {str(tmp_path)!r})"
    script += "; from only_kernels.aot import attention_variants, compile, linear_gelu_variants, residual_norm_variants"
    script += "; assert 'torch' not in sys.modules"
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
