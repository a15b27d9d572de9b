"""Residual and LayerNorm kernels compiled for every supported GPU: no spills."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="needs Triton")
if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
    pytest.skip("the Triton interpreter and compiler cannot share a process", allow_module_level=True)

from beit_fast.kernels.aot import compile as aot  # noqa: E402
from beit_fast.kernels.aot.residual_norm_variants import FORMS, NormVariant, shipped  # noqa: E402
from beit_fast.kernels.residual_norm import configs  # noqa: E402

CACHE = aot.cache_folder(Path(__file__).resolve().parents[2] / "build" / "aot")
LARGEST_SHARED_MEMORY = 16 * 1024
"""Bytes for reductions and layout conversions; every GPU has more."""
SPILLED = {("3.6.0", "residual_norm backward sm_100 bf16/fp32 E=768 everything"): 8}
"""Bytes by release of Triton and variant. For sm_100 this release compiles no matrix product correctly either."""


def find_errors(variants: Iterable[NormVariant], workers: int = 1) -> list[str]:
    """Compile the variants and return every error found."""
    errors = []
    for variant, found in aot.inspect_all(variants, CACHE, workers, with_loop=False):
        if isinstance(found, str):
            errors.append(found)
        elif found.stack + found.local != SPILLED.get((triton.__version__, str(variant)), 0):
            errors.append(f"{variant}: spills {found.stack} + {found.local} bytes")
        elif found.shared > LARGEST_SHARED_MEMORY:
            errors.append(f"{variant}: {found.shared} bytes of shared memory")
    return errors


@pytest.mark.parametrize("capability", aot.CAPABILITIES)
def test_residual_norm_shipped_kernels_do_not_spill(capability: int) -> None:
    """Width of the base model: bf16, fp32, autocast, with and without optional inputs."""
    assert not (errors := find_errors(shipped(capability))), "\n".join(errors)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("size", [1, 32, 1000, 1024, configs.LARGEST_SIZE])
def test_residual_norm_other_widths_do_not_spill(size: int, capability: int) -> None:
    """The most demanding form of each kernel, also with unaligned rows."""
    variants = [
        NormVariant(kernel, capability, size, "bf16", "fp32", "fp32", aligned=size % 16 == 0) for kernel in FORMS
    ]
    assert not (errors := find_errors(variants)), "\n".join(errors)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "capability"),
    [(192, 80), (1408, 80), *((configs.LARGEST_SIZE, capability) for capability in (80, 90, 100, 120))],
)
def test_residual_norm_every_form_at_other_widths_does_not_spill(size: int, capability: int) -> None:
    """The widest rows, whose threads have the fewest registers, on every architecture; narrower ones on one."""
    assert not (errors := find_errors(shipped(capability, size), workers=2)), "\n".join(errors)


@pytest.mark.parametrize("capability", [80, 90])
def test_residual_norm_rows_use_16_byte_accesses(capability: int) -> None:
    """bf16 rows, as in bf16 training."""
    for kernel in ("forward", "backward"):
        ptx = aot.compile_variant(NormVariant(kernel, capability)).ptx
        assert re.search(r"ld\.global\S*\.v4\.b32", ptx), kernel
        assert re.search(r"st\.global\S*\.v4\.b32", ptx), kernel
        assert "atom." not in ptx, kernel


def test_residual_norm_forward_row_uses_no_shared_memory() -> None:
    """One warp holds a row of up to 1024 elements."""
    variants = [NormVariant("forward", 90, size) for size in (768, 1024)]
    assert all(aot.inspect(variant, CACHE).shared == 0 for variant in variants)


def test_inspect_all_unknown_dtype_is_reported() -> None:
    bad = NormVariant("forward", 80, dtype="bf17")
    ((_, failure),) = aot.inspect_all([bad], CACHE)
    assert isinstance(failure, str)
    assert failure.startswith(f"{bad} does not compile")
