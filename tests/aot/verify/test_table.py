"""What the table of executed cases covers."""

from __future__ import annotations

import functools
import itertools
import os
from typing import NamedTuple

import pytest

pytest.importorskip("triton", reason="needs Triton")
if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
    pytest.skip("the Triton interpreter and compiler cannot share a process", allow_module_level=True)

from beit_fast.kernels.aot.compile import CAPABILITIES
from beit_fast.kernels.aot.verify import loops, table
from beit_fast.kernels.aot.verify.cases import (
    DTYPES,
    AttentionCase,
    LinearCase,
    NormCase,
    architecture_of,
    arithmetic_of,
)
from beit_fast.kernels.aot.verify.loops import Loop, checked_kernels
from beit_fast.kernels.attention import configs
from beit_fast.kernels.linear_gelu import configs as linear_configs
from beit_fast.kernels.residual_norm import configs as norm_configs

REQUIRED_CASES = 1500


def test_table_has_enough_distinct_cases() -> None:
    checked = [entry for case in table.full_table() for entry in checked_kernels(case)]
    assert len(set(checked)) >= REQUIRED_CASES


ARCHITECTURES = sorted(set(map(architecture_of, CAPABILITIES)))


def test_every_row_of_tiles_has_a_dtype_a_gpu_and_a_head_dim_in_the_table() -> None:
    """A row of tiles that serves nothing would be shipped without a case."""
    served = {
        (use.kernel, arithmetic_of(use.dtype), use.dropout, architecture)
        for architecture in ARCHITECTURES
        for use in _shipped_tiles(architecture)
    }
    assert served == set(configs.TILES)
    assert {len(tiles) for tiles in configs.TILES.values()} == {len(configs.HEAD_DIMS)}
    assert set(configs.HEAD_DIMS) == set(table.HEAD_DIMS)
    linear = set(itertools.product(map(arithmetic_of, DTYPES), ARCHITECTURES))
    assert linear == set(linear_configs.TILES)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_table_covers_every_shipped_tile_layout_and_dtype(architecture: str) -> None:
    sharing = [capability for capability in CAPABILITIES if architecture_of(capability) == architecture]
    found = {entry for capability in sharing for entry in _checked_tiles(capability)}
    required = _shipped_tiles(architecture)
    assert required
    assert not required - found


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_table_covers_every_shipped_tile_and_dtype_of_each_gpu(capability: int) -> None:
    found = _checked_tiles(capability)
    required = _shipped_tiles(architecture_of(capability))
    # GPUs that share their tiles share the layouts with dropout.
    assert not {entry for entry in required if not entry.dropout} - found
    assert not {entry._replace(layout=None) for entry in required} - {entry._replace(layout=None) for entry in found}


class TileUse(NamedTuple):
    kernel: str
    tile: tuple[int, ...]
    dropout: bool
    block_d: int
    layout: configs.BiasLayout | None
    dtype: str


def _shipped_tiles(architecture: str) -> set[TileUse]:
    return {
        TileUse(kernel, tuple(tiles[place]), dropout, block_d, layout, dtype)
        for (kernel, arithmetic, dropout, owner), tiles in configs.TILES.items()
        for place, block_d in enumerate(configs.HEAD_DIMS)
        for dtype in DTYPES
        for layout in _layouts(architecture, dtype)
        if owner == architecture
        and arithmetic == arithmetic_of(dtype)
        and (layout != configs.NO_BIAS or kernel != "backward_dbias")
    }


def _checked_tiles(capability: int) -> set[TileUse]:
    architecture = architecture_of(capability)
    return {
        TileUse(
            loop.kernel,
            loop.tile,
            case.dropout,
            configs.padded_head_dim(case.head_dim),
            _layout_of(case, architecture),
            case.dtype,
        )
        for case in table.table(capability)
        if isinstance(case, AttentionCase)
        for loop in loops.loops(case)
        if loop.counts
    }


@functools.cache
def _layouts(architecture: str, dtype: str) -> set[configs.BiasLayout]:
    """Return the layouts of all windows."""
    sizes = (*range(1, 66), 80, 95, 96, 127, 128, 200, 201)
    windows = itertools.product(sizes, sizes)
    return {configs.bias_layout(architecture, DTYPES[dtype].itemsize, window) for window in windows} | {configs.NO_BIAS}


def _layout_of(case: AttentionCase, architecture: str) -> configs.BiasLayout:
    """Return the layout in which the launcher has the bias of the case read."""
    if case.layout == "none":
        return configs.NO_BIAS
    window = (96, 96) if case.layout == "extended" else case.window
    return configs.bias_layout(architecture, DTYPES[case.dtype].itemsize, window)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_table_covers_masks_splits_and_head_dims(capability: int) -> None:
    cases = [case for case in table.table(capability) if isinstance(case, AttentionCase)]
    assert {case.head_dim for case in cases} == {8, 16, 24, 32, 40, 64, 72, 80, 96, 128}
    for kernel in ("forward", "backward_dkv", "backward_dq", "backward_dbias"):
        of_kernel = [case for case in cases if any(loop.kernel == kernel and loop.counts for loop in loops.loops(case))]
        assert {case.dtype for case in of_kernel if case.key_mask} == set(DTYPES)
        if kernel in ("forward", "backward_dbias"):
            assert {case.dtype for case in of_kernel if case.split} == set(DTYPES)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_table_covers_options_that_meet(capability: int) -> None:
    cases = [case for case in table.table(capability) if isinstance(case, AttentionCase)]
    split = [case for case in cases if case.split and case.backward]
    assert {configs.padded_head_dim(case.head_dim) for case in split} == set(configs.HEAD_DIMS)
    assert {(case.key_mask, case.dropout) for case in split} >= {(True, False), (False, True)}
    assert any(case.key_mask and case.dropout for case in cases)
    alone = {case.gradients: loops.loops(case) for case in cases if case.gradients != "all"}
    assert set(alone) == {"dk", "dv"}
    for found in alone.values():
        assert [loop.kernel for loop in found if loop.counts] == ["forward", "backward_dkv"]
    assert {case.dtype for case in cases if case.heads == 2} >= {"bf16", "tf32", "fp32"}


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_table_covers_sizes_that_16_does_not_divide(capability: int) -> None:
    cases = table.table(capability)
    linear = {(case.dtype, case.rows > 4096) for case in cases if isinstance(case, LinearCase) and case.outputs % 16}
    assert linear == set(itertools.product(DTYPES, (False, True)))
    unaligned = {(case.dtype, case.row_dtype) for case in cases if isinstance(case, NormCase) and case.size % 8}
    assert unaligned == {("bf16", "bf16"), ("fp16", "fp16"), ("fp32", "fp32"), ("bf16", "fp32")}


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_table_has_a_window_that_needs_the_extended_layout(capability: int) -> None:
    case = next(
        case for case in table.table(capability) if isinstance(case, AttentionCase) and case.window == table.WIDE
    )
    size = DTYPES[case.dtype].itemsize
    assert configs.bias_layout(architecture_of(capability), size, case.window).name == case.layout == "extended"
    assert {loop.kernel for loop in loops.loops(case) if loop.counts} >= {"forward", "backward_dq", "backward_dbias"}


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_table_covers_every_linear_tile(capability: int) -> None:
    architecture = architecture_of(capability)
    tiles = {
        (dtype, tuple(tile)) for dtype in DTYPES for tile in linear_configs.TILES[arithmetic_of(dtype), architecture]
    }
    cases = [case for case in table.table(capability) if isinstance(case, LinearCase)]
    assert tiles == {(case.dtype, loop.tile) for case in cases for loop in loops.loops(case) if loop.counts}


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_table_covers_every_number_of_warps_of_residual_norm(capability: int) -> None:
    cases = [case for case in table.table(capability) if isinstance(case, NormCase)]
    sizes = range(1, norm_configs.LARGEST_SIZE + 1)
    assert {norm_configs.backward_warps(case.size) for case in cases} == set(map(norm_configs.backward_warps, sizes))
    assert {norm_configs.forward_warps(case.size) for case in cases} == set(map(norm_configs.forward_warps, sizes))
    assert {loop.kernel for case in cases for loop in loops.loops(case) if loop.counts} == {
        "residual_norm_backward",
        "sum_partials",
    }


def test_checked_kernels_without_a_second_step_or_a_tail_are_empty() -> None:
    case = AttentionCase(80, "bf16", 64, "none", (8, 16))
    assert loops.loops(case)[0].whole_steps == 2
    assert checked_kernels(case) == []  # 128 patches are whole tiles everywhere
    short = AttentionCase(80, "bf16", 64, "none", (3, 5))
    assert checked_kernels(short) == []


def test_loops_of_a_split_forward_are_those_of_its_last_split() -> None:
    case = table.attention_case(90, "bf16", 64, "paired", split=True, backward=False)
    forward, combine = loops.loops(case)
    assert combine.whole_steps >= 2
    assert forward.whole_steps * combine.whole_steps * 64 < case.patch_count


def test_quick_cases_cover_every_kernel_and_layout() -> None:
    for capability in CAPABILITIES:
        cases = table.quick_cases(capability)
        found = {case.layout for case in cases if isinstance(case, AttentionCase) and case.dtype in ("bf16", "fp16")}
        assert found == set(table.layouts(capability, "bf16"))
        kernels = {loop.kernel for case in cases for loop in loops.loops(case)}
        assert kernels == {
            *("forward", "combine_splits", "backward_dkv", "backward_dq", "backward_dbias"),
            *("linear_gelu", "residual_norm_backward", "sum_partials"),
        }
        assert set(cases) <= set(table.table(capability))


def test_cases_of_sm_100_enter_the_loop_behind_the_first_product() -> None:
    two_steps = AttentionCase(100, "bf16", 32, "none", (12, 14), batch=3)
    assert [loop.kernel for loop in loops.loops(two_steps) if loop.counts] == []
    assert all(loop.whole_steps >= 3 for loop in loops.loops(table.quick_cases(100)[0]))


def test_loop_counts_two_whole_steps_and_a_tail() -> None:
    assert Loop("forward", (), 2, True).counts
    assert not Loop("forward", (), 1, True).counts
    assert not Loop("forward", (), 2, False).counts


def test_cases_of_a_refused_pair_are_the_quick_ones_and_those_without_a_product() -> None:
    refused = table.cases_of(100, "3.6.0")
    assert set(table.quick_cases(100)) <= set(refused)
    assert {type(case) for case in set(refused) - set(table.quick_cases(100))} == {NormCase}
    assert table.cases_of(100, "3.9.0") == table.table(100)
    assert table.cases_of(80, "3.6.0") == table.table(80)
