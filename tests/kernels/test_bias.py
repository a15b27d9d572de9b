"""The packed bias against a gather from the table, in every layout."""

from __future__ import annotations

import math

import pytest
import torch
import triton
import triton.language as tl

from beit_fast.kernels.attention import configs, inputs
from beit_fast.kernels.attention.bias import bias_rows, load_bias_tile, load_cls_bias
from beit_fast.kernels.attention.primitives import row_indices, row_tokens

from ..support.oracle import dense_bias
from .cases import device, make_case

WINDOWS = [(height, width) for height in range(1, 5) for width in range(1, 5)] + [(1, 69), (69, 1), (14, 14), (7, 11)]


@triton.jit
def bias_matrix_kernel(
    packed_bias,
    column_offsets,
    result,  # [tokens, tokens], rows by columns
    patch_count,
    packed_size,
    window_height,
    window_width,
    BLOCK: tl.constexpr,
    BIAS_LAYOUT: tl.constexpr,
):
    rows = row_indices(0, BLOCK, BIAS_LAYOUT)
    tokens = row_tokens(rows, patch_count)
    pointers = bias_rows(packed_bias, 0, rows, patch_count, packed_size, window_height, window_width, BIAS_LAYOUT, 0)
    tile = load_bias_tile(pointers, column_offsets, 0, BLOCK, BIAS_LAYOUT, 0)
    patches = tl.arange(0, BLOCK)
    inside = (rows <= patch_count)[:, None] & (patches < patch_count)[None, :]
    tl.store(result + tokens[:, None] * (patch_count + 1) + patches[None, :] + 1, tile, mask=inside)
    cls_bias = load_cls_bias(packed_bias, 0, rows, patch_count, packed_size)
    tl.store(result + tokens * (patch_count + 1), cls_bias, mask=rows <= patch_count)


def layouts_of(window: tuple[int, int]) -> list[str]:
    return ["plain", "extended"] + (["paired"] if window[1] % 2 == 0 else [])


@pytest.mark.parametrize("flipped", [False, True], ids=["queries-by-keys", "keys-by-queries"])
@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_packed_bias_equals_gather(window: tuple[int, int], flipped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are queries and columns keys, or vice versa (`flipped`).

    Values are divided by the scale.
    """
    tokens = window[0] * window[1] + 1
    case = make_case(window, heads=1, batch=1, head_dim=16)
    call = inputs.prepare(case.query, case.key, case.value, case.table, None, window, 0.5, 0.0, 0)
    expected = dense_bias(case.table, window)[0] * 2
    for layout in layouts_of(window):
        monkeypatch.setattr(configs, "bias_layout", lambda *_, layout=layout: configs.BiasLayout(layout, 0))
        taken = inputs.bias_arguments(call, flipped=flipped)
        assert taken.packed.packed_size % 4 == 0, "vector loads need 16-byte alignment"
        result = torch.full((tokens, tokens), math.nan, device=device())
        bias_matrix_kernel[(1,)](
            taken.packed.packed_bias,
            taken.column_offsets,
            result,
            tokens - 1,
            taken.packed.packed_size,
            *window,
            BLOCK=max(16, triton.next_power_of_2(tokens)),
            BIAS_LAYOUT=layout,
        )
        assert torch.equal(result, expected.T if flipped else expected), layout


@pytest.mark.parametrize("layout", ["plain", "paired"])
def test_packed_bias_vector_loads_aligned_and_in_bounds(layout: str) -> None:
    """Cover all tiles of 64 and 128 columns, partial tiles included."""
    for window in [(height, width) for height in range(1, 9) for width in range(2, 9, 2)] + [
        (14, 14),
        (3, 40),
        (40, 2),
    ]:
        height, width = window
        patches, line = height * width, (2 * height - 1) * width
        size = configs.packed_size(layout, window)
        rows = [
            ((column // 2 if layout == "paired" else column) * line + (height - 1 - row) * width)
            for row in range(height)
            for column in range(width)
        ] + [(width // 2 if layout == "paired" else width) * line]
        entries = 2 if layout == "paired" else 1
        assert all(row * entries * 4 % (16 if layout == "paired" else 8) == 0 for row in rows)
        for block in (64, 128):
            last_column = -(-patches // block) * block - 1
            assert max(rows) * entries + (last_column + 1) * entries <= size + configs.PACKED_MARGIN
