"""CUDA patch embedding on an emulator of 128 threads, without a GPU.

The emulator checks every access to global memory, and that each byte of the result is written once.
A missing barrier or wait gives wrong numbers. Speed and the code of nvcc are not tested here.
"""

from __future__ import annotations

import ctypes
import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ..support import cuda_emulation
from ..support.cuda_emulation import LARGE, SMALL, embed, load, reads_vectors
from ..support.oracle import assert_within_budget
from ..support.patch_embedding import LAYOUTS, check_tokens, convolution, in_precision, make_inputs

if cuda_emulation.compiler() is None:
    pytest.skip("a C++ compiler for the emulator was not found", allow_module_level=True)

TILES = {"large": LARGE, "small": SMALL}
HALVES = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *HALVES)
PIXEL_DTYPES = (torch.uint8, *DTYPES)
OPTIONAL = ("bias", "cls", "mask", "pos", "mean")


def check(arguments: dict[str, Any], **options: Any) -> Tensor:
    """Return the tokens after a check against fp64."""
    tokens = embed(arguments, **options)
    check_tokens(tokens, arguments)
    return tokens


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pixel_dtype", PIXEL_DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_kernel_aligned_pixels_are_read_by_vectors(
    tile: str, dtype: torch.dtype, pixel_dtype: torch.dtype, layout: str
) -> None:
    arguments = make_inputs((24, 48), (4, 8), pixel_dtype=pixel_dtype, dtype=dtype, layout=layout)
    check(arguments, num_sms=TILES[tile])
    assert reads_vectors()
    check(arguments | {"mean": None, "std": None}, num_sms=TILES[tile])


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pixel_dtype", PIXEL_DTYPES)
def test_kernel_odd_patches_are_read_one_by_one(tile: str, dtype: torch.dtype, pixel_dtype: torch.dtype) -> None:
    """Rows, a depth of 45 and 37 columns are not aligned."""
    arguments = make_inputs((11, 17), (3, 5), embed=37, pixel_dtype=pixel_dtype, dtype=dtype)
    check(arguments, num_sms=TILES[tile])
    assert not reads_vectors()


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pixel_dtype", [torch.uint8, torch.bfloat16, torch.float32])
def test_kernel_both_ways_to_read_return_same_bits(tile: str, dtype: torch.dtype, pixel_dtype: torch.dtype) -> None:
    arguments = make_inputs((16, 32), (8, 16), pixel_dtype=pixel_dtype, dtype=dtype)
    by_vectors = embed(arguments, TILES[tile])
    assert reads_vectors()
    one_by_one = embed(arguments | {"pixels": make_unaligned(arguments["pixels"])}, TILES[tile])
    assert not reads_vectors()
    assert torch.equal(by_vectors, one_by_one)


def make_unaligned(pixels: Tensor) -> Tensor:
    """Copy pixels to an address that is offset by one element."""
    return pixels.new_zeros(pixels.numel() + 1)[1:].view(pixels.shape).copy_(pixels)


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernel_several_tiles_and_steps_match_convolution(tile: str, dtype: torch.dtype) -> None:
    """These sizes have partial tiles and fill the pipeline."""
    check(make_inputs((80, 80), (8, 8), batch=3, embed=200, dtype=dtype), num_sms=TILES[tile])


@pytest.mark.parametrize("patch", [(1, 1), (2, 2), (4, 4), (7, 3), (16, 16), (14, 14)])
@pytest.mark.parametrize("channels", [1, 2, 5])
def test_kernel_patch_sizes_match_convolution(patch: tuple[int, int], channels: int) -> None:
    """Depths range from one number to more steps than pipeline stages."""
    for tile, dtype in itertools.product(TILES.values(), (torch.bfloat16, torch.float32)):
        check(make_inputs((29, 31), patch, channels=channels, embed=24, dtype=dtype, batch=1), num_sms=tile)


@pytest.mark.parametrize("count", range(len(OPTIONAL) + 1))
def test_kernel_every_set_of_options_matches_convolution(count: int) -> None:
    for absent in itertools.combinations(OPTIONAL, count):
        absent += ("mask_token",) if "mask" in absent else ()
        absent += ("std",) if "mean" in absent else ()
        check(make_inputs((8, 16), (4, 4), absent=absent, dtype=torch.bfloat16, token_dtype=torch.float32))


@pytest.mark.parametrize(("dtype", "token_dtype"), list(itertools.permutations(DTYPES, 2)))
def test_kernel_mixed_dtypes_return_widest(dtype: torch.dtype, token_dtype: torch.dtype) -> None:
    for embed_size in (40, 37):
        tokens = check(make_inputs((8, 16), (4, 4), embed=embed_size, dtype=dtype, token_dtype=token_dtype))
        assert tokens.dtype == torch.float32


@given(
    image=st.tuples(st.integers(1, 30), st.integers(1, 30)),
    patch=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    batch=st.integers(1, 3),
    channels=st.integers(1, 4),
    embed_size=st.integers(1, 70),
    dtype=st.sampled_from(DTYPES),
    pixel_dtype=st.sampled_from(PIXEL_DTYPES),
    layout=st.sampled_from(LAYOUTS),
    absent=st.sets(st.sampled_from(["bias", "cls", "pos", "mean", "std"])),
    tile=st.sampled_from(list(TILES.values())),
    seed=st.integers(0, 9),
)
@settings(max_examples=100, deadline=None, derandomize=True)
def test_kernel_drawn_shapes_match_convolution(
    image, patch, batch, channels, embed_size, dtype, pixel_dtype, layout, absent, tile, seed
):
    image = tuple(max(pair) for pair in zip(image, patch, strict=True))
    options = {"batch": batch, "channels": channels, "embed": embed_size, "dtype": dtype, "pixel_dtype": pixel_dtype}
    arguments = make_inputs(image, patch, layout=layout, absent=tuple(absent), seed=seed, **options)
    check(arguments, num_sms=tile, seed=seed, copies_end_early=bool(seed % 2))


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernel_any_order_of_threads_and_copies_returns_same_bits(tile: str, dtype: torch.dtype) -> None:
    arguments = make_inputs((16, 48), (8, 16), dtype=dtype, pixel_dtype=torch.uint8)
    expected = embed(arguments, TILES[tile])
    for seed, early in itertools.product(range(1, 4), (False, True)):
        assert torch.equal(embed(arguments, TILES[tile], seed=seed, copies_end_early=early), expected)


@pytest.mark.parametrize("tile", TILES)
def test_kernel_tf32_rounds_both_operands(tile: str) -> None:
    """The reference is a convolution of operands rounded to TF32."""
    arguments = make_inputs((16, 48), (8, 16))
    tokens = embed(arguments, TILES[tile], allow_tf32=True)
    reference = convolution(**in_precision(arguments, torch.float64))
    pixels = arguments["pixels"] - torch.tensor(arguments["mean"])[:, None, None]
    pixels = pixels * (1 / torch.tensor(arguments["std"]))[:, None, None]
    rounded = {"pixels": to_tf32(pixels).double(), "weight": to_tf32(arguments["weight"]).double()}
    expected = convolution(**in_precision(arguments, torch.float64) | rounded | {"mean": None, "std": None})
    assert_within_budget("tokens", tokens, expected, expected.float(), 2)
    assert not torch.equal(tokens, embed(arguments, TILES[tile]))
    assert_within_budget("tokens", tokens, reference, expected, 2, torch.float32)


def to_tf32(numbers: Tensor) -> Tensor:
    """Round to 10 bits of mantissa, ties away from zero."""
    return ((numbers.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def test_kernel_nonfinite_pixels_stay_in_their_patch() -> None:
    arguments = make_inputs((8, 16), (4, 8), absent=("mask", "mask_token"))
    expected = embed(arguments)
    arguments["pixels"][0, 1, 5, 9] = float("nan")  # patch 3
    arguments["pixels"][1, 2, 0, 0] = float("inf")  # patch 0
    tokens = embed(arguments)
    bad = torch.zeros(2, 5, dtype=torch.bool)
    bad[0, 4] = bad[1, 1] = True
    assert torch.equal(tokens.isfinite().all(-1), ~bad)
    assert torch.equal(tokens[~bad], expected[~bad])


def test_kernel_leaves_inputs_unchanged() -> None:
    arguments = make_inputs((11, 17), (3, 5), embed=37)
    before = {name: value.clone() for name, value in arguments.items() if isinstance(value, Tensor)}
    embed(arguments)
    assert all(torch.equal(arguments[name], value) for name, value in before.items())


@pytest.mark.parametrize("sizes", [{"batch": 0}, {"embed": 0}])
def test_kernel_empty_sizes_return_empty(sizes: dict[str, int]) -> None:
    arguments = make_inputs((8, 8), (4, 4), **sizes)
    tokens = embed(arguments)
    assert tokens.shape == (arguments["pixels"].shape[0], 5, arguments["weight"].shape[0])
    assert tokens.numel() == 0


def test_kernel_strided_weights_return_same_bits() -> None:
    """Weights are channels-last, a slice, unaligned, or transposed."""
    arguments = make_inputs((16, 32), (4, 8), layout="channels_last", dtype=torch.bfloat16)
    expected = embed(arguments)
    weight = arguments["weight"]
    for other in (weight.contiguous(memory_format=torch.channels_last), torch.cat([weight] * 2, 1)[:, :3],
                  make_unaligned(weight), weight.transpose(2, 3).contiguous().transpose(2, 3)):  # fmt: skip
        assert torch.equal(embed(arguments | {"weight": other}), expected)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"pixels": torch.zeros(2, 4, 8, 8)}, "expected pixels and weight with as many channels"),
        ({"pixels": torch.zeros(2, 3, 8, 3)}, "expected an image of at least one patch"),
        ({"pixels": torch.zeros(3, 8, 8)}, r"expected pixels \[B, C, H, W\]"),
        (
            {"pixels": torch.zeros(2, 3, 8, 8, dtype=torch.int32)},
            "expected pixels in uint8",
        ),
        (
            {"weight": torch.zeros(40, 3, 4, 4, dtype=torch.float64)},
            "expected weight, tokens and positions in float16",
        ),
        ({"pos": torch.zeros(1, 4, 40)}, "expected pos"),
        ({"mask": torch.zeros(2, 3, dtype=torch.bool)}, "expected mask"),
    ],
)
def test_operator_bad_arguments_raise_with_reason(changes: dict[str, Any], reason: str) -> None:
    load()
    with pytest.raises(ValueError, match=reason):
        torch.ops.beit_fast._patch_embed_cuda(*(make_inputs((8, 8), (4, 4)) | changes).values(), False)


def test_kernel_too_many_channels_raise() -> None:
    check(make_inputs((2, 2), (1, 1), channels=128))
    arguments = make_inputs((2, 2), (1, 1), channels=129)
    with pytest.raises(ValueError, match="expected at most 128 channels with mean and std"):
        embed(arguments)
    check(arguments | {"mean": None, "std": None})


def test_quotient_matches_integer_division() -> None:
    divide = load().quotient
    largest = 2**31 - 1
    divisors = [*range(1, 70), 196, 255, 577, 1000, 65535, 65536, 65537, 2**30 - 1, 2**30, 2**30 + 1, largest]
    for divisor in divisors:
        multiples = [divisor * n for n in (1, 2, 3, 1000, largest // divisor) if divisor * n <= largest]
        numbers = {0, 1, 2, 12345, largest - 1, largest, *multiples, *(n - 1 for n in multiples)}
        assert all(divide(n, divisor) == n // divisor for n in numbers), divisor


@given(
    patch=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    grid=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    channels=st.integers(1, 4),
    strides=st.tuples(*[st.integers(0, 2**40)] * 4),
    image=st.integers(0, 2**20),
)
@settings(max_examples=100, deadline=None)
def test_pixel_offset_of_large_strides_matches_integers(patch, grid, channels, strides, image):
    """Strides of expanded or huge tensors, with offsets beyond 2**31 and 2**32."""
    sizes = (image + 1, channels, grid[0] * patch[0], grid[1] * patch[1])
    last = channels > 1 and strides[1] < strides[3]

    def as_array(values: tuple[int, ...]) -> Any:
        return (ctypes.c_int64 * len(values))(*values)

    arrays = (as_array(sizes), as_array(strides), as_array(patch))
    order = [range(patch[0]), range(patch[1]), range(channels)] if last else [range(channels), *map(range, patch)]
    depths = list(itertools.product(*order))
    for number, k in itertools.product(range(grid[0] * grid[1]), range(len(depths))):
        row, column, channel = depths[k] if last else (depths[k][1], depths[k][2], depths[k][0])
        row, column = row + number // grid[1] * patch[0], column + number % grid[1] * patch[1]
        place = sum(n * stride for n, stride in zip((image, channel, row, column), strides, strict=True))
        assert load().pixel_offset(*arrays, image, number, k) == place


def banks(places: list[int]) -> set[int]:
    """Return the shared memory banks of 16 bytes at each place."""
    return {(place // 4 + word) % 32 for place in places for word in range(4)}


def test_place_of_eight_rows_covers_all_banks() -> None:
    place, column = load().place_of, load().column_of
    for chunk, first in itertools.product(range(4), range(0, 128, 8)):
        assert len(banks([place(False, first + row, chunk) for row in range(8)])) == 32
    for chunk, product, first in itertools.product(range(4), range(4), range(0, 128, 32)):
        assert len(banks([place(True, first + column(product, n), chunk) for n in range(8)])) == 32


def test_place_of_and_column_of_never_repeat() -> None:
    for of_weights in (False, True):
        places = {load().place_of(of_weights, row, chunk) for row in range(128) for chunk in range(4)}
        assert places == set(range(0, 128 * 64, 16))
    columns = [[load().column_of(product, n) for n in range(8)] for product in range(4)]
    assert sorted(itertools.chain(*columns)) == list(range(32))
    for thread in range(4):
        own = [columns[product][2 * thread + n] for product in range(4) for n in range(2)]
        assert own == list(range(8 * thread, 8 * thread + 8))
