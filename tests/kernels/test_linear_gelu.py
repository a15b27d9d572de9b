"""The linear layer with exact GELU by the Triton kernel, against fp64."""

from __future__ import annotations

import itertools

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import opcheck

from beit_fast.kernels.common.gpu import ARCHITECTURES, SHARED_MEMORY_LIMIT
from beit_fast.kernels.linear_gelu import configs, launch
from beit_fast.kernels.linear_gelu.kernel import grouped_blocks, half_precision_gelu
from beit_fast.ops.linear_gelu import linear_gelu

from ..support.linear_gelu import check_layer, make_layer
from .cases import DTYPES, HALF_DTYPES, bitwise_equal, device
from .layouts import at_offset, padded_rows

SHAPES = [
    ((1,), 16, 16),
    ((33,), 96, 64),
    ((2, 37), 48, 129),
    ((3, 1, 5), 1, 1),
    ((), 31, 7),
    ((65,), 70, 200),
    ((4, 8), 64, 128),
]


def run(*layer: Tensor | None) -> Tensor:
    """Run the operator, and check that its inputs do not change."""
    before = [None if tensor is None else tensor.clone() for tensor in layer]
    result = linear_gelu(*layer)
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(layer, before, strict=True))
    return result


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "inputs", "outputs"), SHAPES, ids=str)
def test_linear_gelu_matches_fp64(
    rows: tuple[int, ...], inputs: int, outputs: int, dtype: torch.dtype, biased: bool
) -> None:
    layer = make_layer(rows, inputs, outputs, dtype, device(), biased=biased)
    check_layer(run(*layer), *layer)


@pytest.mark.parametrize("rows", range(28, 36))
def test_linear_gelu_rows_around_tile_match_fp64(rows: int) -> None:
    layer = make_layer((rows,), 40, 70, torch.float32, device())
    check_layer(run(*layer), *layer)


STRIDED = {
    "every second row": lambda x: x.repeat_interleave(2, 0)[::2],
    "every second element": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "transposed": lambda x: x.t().contiguous().t(),
    "rows with a tail": lambda x: padded_rows(x, 0, 16),
    "odd row stride": lambda x: padded_rows(x, 3, 2),
    "odd address": lambda x: at_offset(x, 1),
}


@pytest.mark.parametrize("layout", STRIDED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_gelu_strided_inputs_same_bits(dtype: torch.dtype, layout: str) -> None:
    x, weight, bias = make_layer((37,), 48, 70, dtype, device())
    expected = run(x, weight, bias)
    spread = torch.stack([bias, bias], 1)[:, 0]
    assert bitwise_equal(run(STRIDED[layout](x), weight, bias), expected)
    assert bitwise_equal(run(x, STRIDED[layout](weight), spread), expected)


def test_linear_gelu_slice_of_tokens_same_bits() -> None:
    """`[B, N, E]` without CLS is not a matrix of evenly spaced rows."""
    x, weight, bias = make_layer((3, 9), 32, 48, torch.float32, device())
    assert bitwise_equal(run(x[:, 1:], weight, bias), run(x[:, 1:].contiguous(), weight, bias))


def test_linear_gelu_stride_zero_rows_same_bits() -> None:
    """Expand one row to all rows."""
    x, weight, bias = make_layer((1,), 32, 48, torch.float32, device())
    assert bitwise_equal(run(x.expand(40, -1), weight, bias), run(x, weight, bias).expand(40, -1).contiguous())


@pytest.mark.parametrize("rows", [(0,), (2, 0)])
def test_linear_gelu_without_rows_returns_empty(rows: tuple[int, ...]) -> None:
    layer = make_layer(rows, 32, 48, torch.bfloat16, device())
    assert run(*layer).shape == (*rows, 48)


def test_linear_gelu_without_outputs_or_inputs() -> None:
    assert run(*make_layer((3,), 32, 0, torch.float32, device())).shape == (3, 0)
    layer = make_layer((3,), 0, 32, torch.float32, device())
    check_layer(run(*layer), *layer)


def test_linear_gelu_far_row_stride_same_bits() -> None:
    """Use a stride above 32 bits in a dimension of size one.

    Bug elsewhere: fla-org/flash-linear-attention#1080.
    """
    x, weight, bias = make_layer((1,), 32, 48, torch.float32, device())
    far = x.as_strided(x.shape, (2**40, 1))
    assert bitwise_equal(run(far, weight, bias), run(x, weight, bias))


@triton.jit
def corner_kernel(result, row_block, output_count, BLOCK_M: tl.constexpr):
    base = result + row_block.to(tl.int64) * BLOCK_M * output_count
    tl.store(result, base.to(tl.int64) - result.to(tl.int64))


def test_tile_offset_does_not_wrap_at_32_bits() -> None:
    result = torch.zeros(1, dtype=torch.int64, device=device())
    corner_kernel[(1,)](result, 2**17, 2**16, BLOCK_M=128)
    assert result.item() == 8 * 2**17 * 128 * 2**16


@triton.jit
def gelu_kernel(values, result, count, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < count
    tl.store(result + offsets, half_precision_gelu(tl.load(values + offsets, mask=inside)), mask=inside)


def half_gelu(values: Tensor) -> Tensor:
    result = torch.empty_like(values)
    gelu_kernel[(triton.cdiv(values.numel(), 256),)](values, result, values.numel(), BLOCK=256)
    return result


def test_half_precision_gelu_matches_exact_gelu() -> None:
    """The error is far below half an fp16 ulp (2.4e-4, relative).

    Below -6 the magnitude of the result is less than 6e-9.
    """
    values = torch.linspace(-10, 60, 70_001, dtype=torch.float64)
    values = values[values != 0].float().to(device())
    exact = values.double() * torch.special.ndtr(values.double())
    error = (half_gelu(values).double() - exact).abs()
    inside = values >= -6
    assert (error[inside] / exact[inside].abs()).max() < 1e-5
    assert error[~inside].max() < 1e-11


@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
def test_half_precision_gelu_edge_values() -> None:
    edges = torch.tensor([0.0, -0.0, 1e-30, -1e-30, 65504, -65504, 1e30, -1e30, torch.inf], device=device())
    expected = torch.tensor([0.0, 0.0, 5e-31, -5e-31, 65504, 0, 1e30, 0, torch.inf], device=device())
    torch.testing.assert_close(half_gelu(edges), expected, rtol=1e-5, atol=0)
    assert half_gelu(torch.tensor([torch.nan, -torch.inf], device=device())).isnan().all()


@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_linear_gelu_nan_in_one_row_stays_in_it(dtype: torch.dtype) -> None:
    x, weight, bias = make_layer((40,), 32, 48, dtype, device())
    clean = run(x, weight, bias)
    x[7] = float("nan")
    dirty = linear_gelu(x, weight, bias)
    others = [row for row in range(40) if row != 7]
    assert dirty[7].isnan().all()
    assert bitwise_equal(dirty[others], clean[others])


@triton.jit
def blocks_kernel(result, row_blocks, column_blocks, GROUP: tl.constexpr):
    program = tl.program_id(0)
    row, column = grouped_blocks(program, row_blocks, column_blocks, GROUP)
    tl.store(result + program, row * column_blocks + column)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 5), (8, 4), (17, 3), (25, 1), (1, 9)])
def test_grouped_blocks_visit_every_block_once(rows: int, columns: int) -> None:
    result = torch.full((rows * columns,), -1, device=device())
    blocks_kernel[(rows * columns,)](result, rows, columns, GROUP=8)
    assert result.sort().values.tolist() == list(range(rows * columns))
    group = result[: 8 * columns] // columns
    assert group.max() < 8


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.skipif(
    device().type == "cuda", reason="other tests run the tiles of this GPU; tiles of other GPUs may not fit"
)
def test_linear_gelu_gpu_tiles_match_fp64(
    architecture: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "architecture_of", lambda tensor: architecture)
    for rows in (150, 700, 4200) if dtype == torch.float32 else (150,):
        layer = make_layer((rows,), 80, 144, dtype, device())
        check_layer(run(*layer), *layer)


def test_select_every_architecture_returns_tile() -> None:
    arithmetics = ("half", "tf32", "ieee")
    assert set(configs.TILES) == set(itertools.product(arithmetics, ARCHITECTURES))
    assert set(SHARED_MEMORY_LIMIT) == set(ARCHITECTURES)
    assert [configs.row_class(rows) for rows in (1, 197, 640, 641, 4096, 4097, 2**31)] == [
        *("few",) * 3,
        *("some",) * 2,
        *("many",) * 2,
    ]
    for (multiplies, architecture), tiles in configs.TILES.items():
        assert [configs.select(architecture, multiplies, rows, 64) for rows in (1, 1000, 10_000)] == list(tiles)
        assert configs.select(architecture, multiplies, 10_000, 65) == tiles[1]


def test_linear_gelu_above_65535_row_tiles_uses_first_grid_dimension(monkeypatch: pytest.MonkeyPatch) -> None:
    grids = []

    class Recorder:
        def __getitem__(self, grid: tuple[int, ...]):
            grids.append(grid)
            return lambda *positional, **named: None

    monkeypatch.setattr(launch, "linear_gelu_kernel", Recorder())
    x = torch.zeros(1, 16, device=device()).expand(128 * 70_000, 16)
    linear_gelu(x, torch.zeros(8, 16, device=device()))
    assert len(grids[0]) == 1
    assert grids[0][0] >= 70_000


@pytest.mark.parametrize(("setting", "precision"), [("highest", "ieee"), ("high", "tf32")])
def test_linear_gelu_fp32_precision_follows_torch_setting(
    setting: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched = {}

    class Recorder:
        def __getitem__(self, grid: tuple[int, ...]):
            return lambda *positional, **named: launched.update(named)

    monkeypatch.setattr(launch, "linear_gelu_kernel", Recorder())
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(setting)
        linear_gelu(*make_layer((3,), 16, 16, torch.float32, device()))
    finally:
        torch.set_float32_matmul_precision(before)
    assert launched["PRECISION"] == precision


def test_linear_gelu_opcheck_passes() -> None:
    op = torch.ops.beit_fast.linear_gelu.default
    opcheck(op, make_layer((2, 5), 16, 24, torch.float32, device()))
    opcheck(op, make_layer((0,), 16, 24, torch.float32, device(), biased=False))


def test_linear_gelu_unsupported_inputs_raise_every_reason() -> None:
    x, weight, bias = make_layer((3,), 16, 24, torch.float64, device())
    with pytest.raises(ValueError, match=r"x has 16 inputs, weight takes 15; .*expected float16, bfloat16 or float32"):
        linear_gelu(x, weight[:, :15], bias)
    rows = torch.zeros(1, 1, device=device()).expand(2**24, 1)
    with pytest.raises(ValueError, match="16777216 outputs are more than 16777215"):
        linear_gelu(torch.zeros(0, 1, device=device()), rows)
