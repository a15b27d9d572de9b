"""The committed counts are of the kernels as they are."""

from __future__ import annotations

import itertools
import json
import os
from typing import Any

import pytest

pytest.importorskip("triton", reason="needs Triton")
if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
    pytest.skip("the Triton interpreter and compiler cannot share a process", allow_module_level=True)

from beit_fast.kernels.aot.compile import CAPABILITIES
from beit_fast.kernels.aot.counts import __main__ as command
from beit_fast.kernels.aot.counts.executed import LaunchCounts
from beit_fast.kernels.aot.counts.measure import LaunchRow
from beit_fast.kernels.aot.verify.cases import architecture_of
from beit_fast.kernels.aot.verify.sources import MODULES, source_hash
from beit_fast.kernels.linear_gelu import configs as linear_configs

KERNELS = MODULES.keys() - {"combine_splits", "patch_embed"}
"""What is counted: one call of an operator splits no keys, and nvcc compiles patch_embed."""


@pytest.fixture(scope="module")
def committed() -> dict[str, Any]:
    return json.loads((command.RESULTS / "counts.json").read_text())


def test_committed_counts_are_of_every_kernel_with_its_source_as_it_is(committed: dict[str, Any]) -> None:
    counted = {(row["kernel"], row["capability"]) for row in committed["launches"]}
    assert counted == set(itertools.product(KERNELS, CAPABILITIES))
    stale = sorted(name for name in KERNELS if committed["sources"].get(name) != source_hash(name))
    assert not stale, f"counts of {', '.join(stale)} are of another source: run `make count-kernels`"


def test_committed_counts_have_the_shipped_tile_of_linear_gelu(committed: dict[str, Any]) -> None:
    found = {row["capability"]: tuple(row["tile"]) for row in committed["loops"] if row["kernel"] == "linear_gelu"}
    tiles = linear_configs.TILES
    assert found == {capability: tiles["half", architecture_of(capability)][-1] for capability in CAPABILITIES}


def test_launch_row_names_the_source_of_its_kernel() -> None:
    row = LaunchRow("pack_bias", 80, LaunchCounts(9, 4, 90, 60, []))
    assert row.source == source_hash("pack_bias")
