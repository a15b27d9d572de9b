"""The kernels of residual and LayerNorm become cubins for every supported GPU, without a GPU, and nothing spills."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="there is nothing to compile without Triton")
if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
    pytest.skip("Triton's interpreter and its compiler cannot share a process", allow_module_level=True)

from beit_fast.kernels.aot import compile as aot
from beit_fast.kernels.aot.residual_norm_variants import FORMS, NormVariant, shipped
from beit_fast.kernels.residual_norm import configs

CACHE = aot.cache_folder(Path(__file__).resolve().parents[2] / "build" / "aot")
LARGEST_SHARED_MEMORY = 16 * 1024
"""Bytes: for sums over the warps of a row, and numbers of half the size changing places. Every GPU has more."""


def complaints(variants: Iterable[NormVariant], workers: int = 1) -> list[str]:
    """Everything that is wrong with what the variants compile to."""
    wrong = []
    for variant, found in aot.inspect_all(variants, CACHE, workers):
        if isinstance(found, str):
            wrong.append(found)
        elif found.spills:
            wrong.append(f"{variant}: spills {found.stack} + {found.local} bytes")
        elif found.shared > LARGEST_SHARED_MEMORY:
            wrong.append(f"{variant}: {found.shared} bytes of shared memory")
    return wrong


@pytest.mark.parametrize("capability", aot.CAPABILITIES)
def test_shipped_kernels_do_not_spill(capability: int) -> None:
    """At the width of base, in bf16, fp32 and under autocast, with and without everything that may be left out."""
    assert not (wrong := complaints(shipped(capability))), "\n".join(wrong)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("size", [1, 32, 1000, 1024, configs.LARGEST_SIZE])
def test_other_widths(size: int, capability: int) -> None:
    """The most demanding form of each kernel; rows that no vector load may assume to be aligned."""
    variants = [
        NormVariant(kernel, capability, size, "bf16", "fp32", "fp32", aligned=size % 16 == 0) for kernel in FORMS
    ]
    assert not (wrong := complaints(variants)), "\n".join(wrong)


@pytest.mark.slow
@pytest.mark.parametrize("size", [192, 1024, 1408, configs.LARGEST_SIZE])
@pytest.mark.parametrize("capability", aot.CAPABILITIES)
def test_every_width_on_every_gpu(capability: int, size: int) -> None:
    assert not (wrong := complaints(shipped(capability, size), workers=2)), "\n".join(wrong)


@pytest.mark.parametrize("capability", [80, 90])
def test_rows_are_read_and_written_by_16_bytes(capability: int) -> None:
    """Whole rows of bf16, as training in bf16 reads them."""
    for kernel in ("forward", "backward"):
        ptx = aot.compile_variant(NormVariant(kernel, capability)).ptx
        assert re.search(r"ld\.global\S*\.v4\.b32", ptx), kernel
        assert re.search(r"st\.global\S*\.v4\.b32", ptx), kernel
        assert "atom." not in ptx, kernel


def test_a_row_of_the_forward_needs_no_shared_memory() -> None:
    """One warp holds it up to 1024 numbers."""
    variants = [NormVariant("forward", 90, size) for size in (768, 1024)]
    assert all(aot.inspect(variant, CACHE).shared == 0 for variant in variants)


def test_a_wrong_argument_is_told() -> None:
    bad = NormVariant("forward", 80, dtype="bf17")
    ((_, failure),) = aot.inspect_all([bad], CACHE)
    assert isinstance(failure, str)
    assert failure.startswith(f"{bad} does not compile")
