"""All kernels of one GPU, launched in the executor."""

from __future__ import annotations

import os

import pytest

triton = pytest.importorskip("triton", reason="needs Triton")
if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
    pytest.skip("the Triton interpreter and compiler cannot share a process", allow_module_level=True)

from beit_fast.kernels.aot.attention_variants import PRODUCTS  # noqa: E402
from beit_fast.kernels.aot.counts import fp32  # noqa: E402
from beit_fast.kernels.aot.counts.measure import HEAD_DIM, measure  # noqa: E402
from beit_fast.kernels.aot.verify.sources import MODULES  # noqa: E402

COUNTED_WITH = "3.7.1"


@pytest.mark.skipif(triton.__version__ != COUNTED_WITH, reason=f"results are those of Triton {COUNTED_WITH}")
def test_measure_counts_every_kernel() -> None:
    loops, launches = measure(80)
    assert {row.kernel for row in launches} == set(MODULES) - {"combine_splits", "patch_embed"}
    assert {row.kernel for row in loops} == {*PRODUCTS, "linear_gelu"}
    for row in loops:
        # 64 x 64 x 64 multiply-adds are 128 products of 16 x 8 x 16, by four schedulers.
        products = 4096 * HEAD_DIM * PRODUCTS[row.kernel] if row.kernel in PRODUCTS else 4096 * row.tile[2]
        assert row.executed.pipes["matrix"] == products / (16 * 8 * 16) / 4
        assert row.executed.conflicts == []
        assert row.executed.ideal_sectors <= row.executed.sectors < 1.1 * row.executed.ideal_sectors
        assert row.machine.bound(2) <= row.machine.bound(1)
    conflicts = {row.kernel for row in launches if row.counts.conflicts}
    assert conflicts <= {"sum_partials", "dtable_patches"}


def test_fp32_rows_count_multiply_adds_of_ieee_products_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fp32, "count_attention", lambda dtype: None)
    by_precision = {row.precision: row for row in fp32.fp32_rows(80)}
    assert set(by_precision) == set(fp32.PRECISIONS)
    assert by_precision["tf32"].multiply_adds < by_precision["ieee"].multiply_adds / 100
    # 128 rows x 128 outputs x 384 inputs, 32 lanes of a warp.
    assert by_precision["ieee"].multiply_adds == pytest.approx(128 * 128 * 384 / 32, rel=0.02)
    assert by_precision["tf32"].counts.conflicts == []
