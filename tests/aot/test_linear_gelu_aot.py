"""The linear-GELU kernel compiled for every supported GPU: spills and shared memory."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="needs Triton")
if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
    pytest.skip("the Triton interpreter and compiler cannot share a process", allow_module_level=True)

from beit_fast.kernels.aot import compile as aot  # noqa: E402
from beit_fast.kernels.aot import sass  # noqa: E402
from beit_fast.kernels.aot.linear_gelu_variants import LinearVariant, shipped, work  # noqa: E402
from beit_fast.kernels.common import gpu  # noqa: E402
from beit_fast.kernels.linear_gelu import configs  # noqa: E402

CACHE = aot.cache_folder(Path(__file__).resolve().parents[2] / "build" / "aot")
COUNTED_WITH = "3.7.1"
KINDS = {"bf16": ("bf16", "ieee"), "fp16": ("fp16", "ieee"), "tf32": ("fp32", "tf32"), "ieee": ("fp32", "ieee")}


def find_errors(variants: Iterable[LinearVariant], workers: int = 1) -> list[str]:
    """Compile the variants and return every error found."""
    errors = []
    for variant, found in aot.inspect_all(variants, CACHE, workers, with_loop=False):
        if isinstance(found, str):
            errors.append(found)
            continue
        limit = gpu.SHARED_MEMORY_LIMIT[variant.architecture]
        if found.shared > limit:
            errors.append(f"{variant}: {found.shared} bytes of shared memory, limit {limit}")
        if found.spills:
            errors.append(f"{variant}: spills {found.stack} + {found.local} bytes")
    return errors


def inspect_variant(variant: LinearVariant) -> aot.Inspection:
    ((_, found),) = aot.inspect_all([variant], CACHE)
    assert not isinstance(found, str), found
    return found


@pytest.mark.parametrize("capability", aot.CAPABILITIES)
def test_linear_gelu_shipped_kernels_fit_registers_and_shared_memory(capability: int) -> None:
    assert not (errors := find_errors(shipped(capability))), "\n".join(errors)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("capability", "kind"),
    [*((capability, kind) for capability in aot.CAPABILITIES for kind in KINDS if kind != "fp16"), (90, "fp16")],
)
def test_linear_gelu_all_configs_fit_registers_and_shared_memory(capability: int, kind: str) -> None:
    """Include partial steps; odd outputs never use the tile for many rows.

    fp16 differs from bf16 only in the type of the products, and a kernel without a bias needs fewer registers. A
    sample is enough for both.
    """
    dtype, precision = KINDS[kind]
    usual = shipped(capability, dtype, precision)
    if capability in (86, 89):  # the tiles of 120, on which everything is compiled
        assert not (errors := find_errors(usual, workers=2)), "\n".join(errors)
        return
    variants = usual + [variant._replace(whole_steps=False) for variant in usual]
    tiles = configs.TILES[
        gpu.arithmetic(aot.DTYPES[dtype], precision),
        gpu.architecture_class(*divmod(capability, 10)),
    ]
    variants += [variant._replace(even_outputs=False) for variant in variants if variant.tile in tiles[:2]]
    variants += [variant._replace(bias=False) for variant in usual]
    assert not (errors := find_errors(variants, workers=2)), "\n".join(errors)


@pytest.mark.skipif(triton.__version__ != COUNTED_WITH, reason=f"instructions are counted with Triton {COUNTED_WITH}")
@pytest.mark.parametrize(("capability", "limits"), [(90, (106, 60, 40)), (80, (130, 96, 38))])
def test_linear_gelu_loop_instructions_below_limit(capability: int, limits: tuple[int, ...]) -> None:
    """Count instructions per step for 64 x 64 results, by number of rows.

    There are fewer than the tensor cores take cycles.
    """
    for variant, limit in zip(shipped(capability), limits, strict=True):
        found = inspect_variant(variant)
        issued = sum(sass.instructions_by_pipe(found.loop, work(variant)).values())
        assert not [name for name in found.loop if not sass.is_known(name)]
        assert issued <= limit, f"{variant}: {issued}"
        assert issued < sass.cycles_by_pipe(found.loop, work(variant))["mma"]


@pytest.mark.skipif(triton.__version__ != COUNTED_WITH, reason=f"instructions are counted with Triton {COUNTED_WITH}")
@pytest.mark.parametrize("capability", [90, 80])
def test_linear_gelu_epilogue_instructions_below_limit(capability: int) -> None:
    """Count instructions outside the loop per result, those of GELU included.

    The error function alone would take 43.
    """
    *_, variant = shipped(capability)
    compiled = aot.compile_variant(variant)
    code = sass.disassemble(compiled.cubin)
    outside = Counter(line.name for line in sass.parse(code)) - sass.main_loop(code)
    results = variant.tile.block_m * variant.tile.block_n / (32 * variant.tile.num_warps)
    assert sum(outside.values()) / results <= 24


@pytest.mark.parametrize("capability", [80, 90])
def test_linear_gelu_main_loop_holds_one_tile(capability: int) -> None:
    for variant in shipped(capability):
        found = inspect_variant(variant)
        assert sass.multiply_adds(found.loop) == work(variant).multiply_adds / work(variant).warps


def test_linear_variant_str_names_every_option() -> None:
    variant = LinearVariant(90, configs.LinearTile(64, 64, 32, 4, 2), "fp32", "tf32", False, False, False)
    assert str(variant) == "linear_gelu sm_90 fp32 tf32 ragged steps no bias odd outputs 64x64x32 4w 2s"
