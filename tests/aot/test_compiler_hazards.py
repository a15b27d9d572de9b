"""Faults of Triton releases: the table, the smallest kernels that show them, and the fence of our kernels."""

from __future__ import annotations

import os
from typing import Any

import pytest

triton = pytest.importorskip("triton", reason="needs Triton")
if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
    pytest.skip("the Triton interpreter and compiler cannot share a process", allow_module_level=True)

from beit_fast.kernels.aot import attention_variants, linear_gelu_variants  # noqa: E402
from beit_fast.kernels.aot import compile as aot  # noqa: E402
from beit_fast.kernels.common import compiler_hazards as hazards  # noqa: E402

from .hazard_kernels import (  # noqa: E402
    chained_products,
    compile_to_ptx,
    copied_product,
    overwrites_loads,
    owned_product,
    reads_copies_unfenced,
)

SIGNS = {
    # kernel, capability: what its PTX shows, and the first release of Triton that does not
    (copied_product, 90): (reads_copies_unfenced, "3.7.1"),
    (copied_product, 100): (reads_copies_unfenced, "3.7.1"),
    (owned_product, 90): (reads_copies_unfenced, "3.7.1"),
    (owned_product, 100): (reads_copies_unfenced, "3.9.0"),
    (chained_products, 100): (overwrites_loads, "3.8.0"),
}


@pytest.mark.parametrize(("kernel", "capability"), SIGNS)
def test_smallest_kernel_compiled_shows_the_fault_of_the_table(kernel: Any, capability: int) -> None:
    """Hold for every release of Triton that runs the tests."""
    sign, sound = SIGNS[kernel, capability]
    assert sign(compile_to_ptx(kernel, capability)) == (
        hazards.parse_release(triton.__version__) < hazards.parse_release(sound)
    )


def test_hazards_have_a_smallest_kernel() -> None:
    assert {(hazard.major, hazard.sound) for hazard in hazards.HAZARDS} == {
        (capability // 10, sound) for (_, capability), (_, sound) in SIGNS.items()
    }


@pytest.mark.parametrize("version", [*hazards.EXECUTED, "3.6.3", "3.9.1", "3.10.0", "4.0.0"])
@pytest.mark.parametrize("capability", [80, 86, 89, 90, 120, 121])
def test_compiler_hazards_of_pairs_that_are_never_refused_is_empty(capability: int, version: str) -> None:
    assert hazards.compiler_hazards(capability, version) == []
    assert hazards.is_pipelined("backward_dq", capability, version)


@pytest.mark.parametrize("capability", [100, 103])
def test_compiler_hazards_of_sm100_names_faults_and_the_first_sound_torch(capability: int) -> None:
    (reason,) = hazards.compiler_hazards(capability, "3.7.1")
    assert reason == (
        f"Triton 3.7.1 compiles for compute capability 10.{capability % 10} with a known fault: warps race in tensor "
        "memory; use torch 2.14 or later, which brings Triton 3.8.0"
    )
    (reason,) = hazards.compiler_hazards(capability, "3.6.0")
    assert "without a fence between them and warps race in tensor memory; use torch 2.14 or later" in reason
    for version in ("3.8.0", "3.8.1", "3.9.0", "3.10.0"):
        assert hazards.compiler_hazards(capability, version) == []


@pytest.mark.parametrize("capability", [70, 110, 130])
def test_compiler_hazards_of_unknown_major_number_is_refused(capability: int) -> None:
    (reason,) = hazards.compiler_hazards(capability, "3.9.0")
    assert reason.startswith(f"compute capability {capability // 10}.0 is not supported")


@pytest.mark.parametrize(
    ("version", "needed"),
    [("3.6.0", True), ("3.7.0", True), ("3.7.0+git1", True), ("3.7.1rc1", True), ("3.7.1", False), ("3.7.1+cu", False),
     ("3.7.2", False), ("3.9.0", False), ("3.10", False)],
)  # fmt: skip
def test_needs_copy_fence_on_sm90_until_3_7_1(version: str, needed: bool) -> None:
    assert hazards.needs_copy_fence(90, version) is needed
    assert not any(hazards.needs_copy_fence(capability, version) for capability in (80, 86, 89, 100, 120))


def test_is_pipelined_only_dq_and_dv_alone_of_3_8_on_sm100_are_not() -> None:
    found = {
        (kernel, capability, version)
        for kernel in (*attention_variants.KERNELS, hazards.DV_ALONE)
        for capability in aot.CAPABILITIES
        for version in hazards.EXECUTED
        if not hazards.is_pipelined(kernel, capability, version)
    }
    assert found == {("backward_dq", 100, "3.8.0"), (hazards.DV_ALONE, 100, "3.8.0")}


def test_compiler_hazards_version_without_numbers_raises() -> None:
    with pytest.raises(ValueError, match="Triton's version 'main' is not a version number"):
        hazards.compiler_hazards(100, "main")


def test_torch_with_has_every_sound_release() -> None:
    assert {hazard.sound for hazard in hazards.HAZARDS} <= set(hazards.TORCH_WITH)
    assert set(hazards.TORCH_WITH) <= set(hazards.EXECUTED)


@pytest.mark.parametrize("kernel", ["forward", "backward_dkv", "backward_dq", "backward_dbias", "linear_gelu"])
@pytest.mark.parametrize("version", ["3.7.0", "3.7.1"])
def test_kernels_for_sm90_have_the_fence_that_the_compiler_forgets(
    kernel: str, version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compile with the fence as for an earlier release: it stays between the wait for copies and the product."""
    monkeypatch.setattr(triton, "__version__", version)
    if kernel == "linear_gelu":
        variant: Any = next(iter(linear_gelu_variants.shipped(90)))
    else:
        layout = attention_variants.bias_layouts(90, "bf16")[0]
        variant = attention_variants.shipped(attention_variants.Variant(kernel, 90, bias_layout=layout))
    ptx = aot.compile_variant(variant).ptx
    ours = "fence.proxy.async.shared::cta; mov"
    assert (ours in ptx) is (version == "3.7.0")
    if ours in ptx:
        without = "\n".join(line for line in ptx.splitlines() if line.strip() != "fence.proxy.async.shared::cta;")
        assert not reads_copies_unfenced(without)
