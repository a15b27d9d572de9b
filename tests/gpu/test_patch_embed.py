"""Patch embedding by the CUDA kernel on a GPU.

tests/csrc/test_cuda_emulation.py runs the same source without a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import beit_fast
from beit_fast import native

from ..support.patch_embedding import LAYOUTS, check_gradients, check_tokens, make_inputs
from .calls import need_free_memory

if _reason := native.unsupported_reason("_C_cuda"):
    pytest.skip(f"the CUDA library is not available: {_reason}", allow_module_level=True)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PIXEL_DTYPES = (torch.uint8, *DTYPES)


@pytest.fixture(autouse=True)
def _disable_tf32_convolutions() -> Iterator[None]:
    """Disable TF32 in the convolutions of the reference.

    cuDNN uses TF32 by default, and its error would be too large a budget.
    """
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.fixture
def allow_tf32() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


def test_native_load_cuda_library() -> None:
    assert native.load("_C_cuda"), native.unsupported_reason("_C_cuda")


def inputs(image: tuple[int, int] = (48, 64), patch: tuple[int, int] = (16, 16), **options: Any) -> dict[str, Any]:
    return make_inputs(image, patch, device="cuda", **options)


def check(arguments: dict[str, Any]) -> Tensor:
    """Return the tokens, compared with fp64."""
    tokens = beit_fast.patch_embed(**arguments)
    check_tokens(tokens, arguments)
    return tokens


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pixel_dtype", PIXEL_DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_patch_embed_dtypes_and_layouts_match_fp64(dtype: torch.dtype, pixel_dtype: torch.dtype, layout: str) -> None:
    arguments = inputs(dtype=dtype, pixel_dtype=pixel_dtype, layout=layout, embed=72)
    check(arguments)
    check(arguments | {"mean": None, "std": None})


@pytest.mark.parametrize(
    ("size", "patch", "embed", "batch"),
    [
        (224, 16, 768, 1),
        (224, 16, 768, 32),
        (384, 16, 1024, 4),
        (640, 16, 768, 2),
        (224, 14, 1024, 4),
        (512, 32, 768, 8),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_patch_embed_model_sizes_match_fp64(size: int, patch: int, embed: int, batch: int, dtype: torch.dtype) -> None:
    """Cover few blocks, with small tiles, to many blocks, with large tiles."""
    for pixel_dtype in (dtype, torch.uint8):
        check(inputs((size, size), (patch, patch), embed=embed, batch=batch, dtype=dtype, pixel_dtype=pixel_dtype))


@pytest.mark.parametrize("patch", [(1, 1), (2, 3), (7, 7), (8, 4), (14, 14), (5, 30)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_patch_embed_patch_sizes_and_channels_match_fp64(patch: tuple[int, int], dtype: torch.dtype) -> None:
    for channels, embed in ((1, 1), (3, 37), (5, 200)):
        check(inputs((61, 67), patch, channels=channels, embed=embed, dtype=dtype))


@pytest.mark.parametrize("absent", [("bias",), ("cls",), ("mask", "mask_token"), ("pos",), ("mean",), ("std",)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_patch_embed_optional_inputs_match_fp64(absent: tuple[str, ...], dtype: torch.dtype) -> None:
    check(inputs(dtype=dtype, absent=absent))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_patch_embed_fp32_tokens_from_half_weights(dtype: torch.dtype) -> None:
    assert check(inputs(dtype=dtype, token_dtype=torch.float32)).dtype == torch.float32


@pytest.mark.parametrize("batch", [2, 64])
def test_patch_embed_tf32_if_torch_allows_it(batch: int, allow_tf32: None) -> None:
    """The budget is the error of the fallback with TF32."""
    arguments = inputs((224, 224), embed=768, batch=batch)
    tokens = beit_fast.patch_embed(**arguments)
    torch.backends.cudnn.allow_tf32 = True
    check_tokens(tokens, arguments)
    torch.set_float32_matmul_precision("highest")
    assert not torch.equal(tokens, beit_fast.patch_embed(**arguments))


@pytest.mark.parametrize("dtype", DTYPES)
def test_patch_embed_gradients_match_fp64(dtype: torch.dtype) -> None:
    check_gradients(beit_fast.patch_embed, inputs(dtype=dtype, embed=72))


def test_patch_embed_autocast_uses_half_weights() -> None:
    arguments = inputs()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        tokens = beit_fast.patch_embed(**arguments)
    half = {name: arguments[name].bfloat16() for name in ("pixels", "weight", "bias")}
    assert torch.equal(tokens, beit_fast.patch_embed(**(arguments | half)))


def test_patch_embed_compile_fullgraph_same_bits() -> None:
    torch.compiler.reset()
    compiled = torch.compile(beit_fast.patch_embed, fullgraph=True)
    for batch in (2, 3, 5):
        arguments = inputs(batch=batch, dtype=torch.bfloat16, pixel_dtype=torch.uint8)
        assert torch.equal(compiled(**arguments), beit_fast.patch_embed(**arguments))


@pytest.mark.parametrize("dtype", DTYPES)
def test_patch_embed_image_independent_of_batch(dtype: torch.dtype) -> None:
    """Small and large tiles add in the same order."""
    arguments = inputs((224, 224), batch=64, embed=768, dtype=dtype, absent=("mask", "mask_token"))
    together = beit_fast.patch_embed(**arguments)
    alone = beit_fast.patch_embed(**(arguments | {"pixels": arguments["pixels"][63:]}))
    assert torch.equal(together[63:], alone)


@pytest.mark.parametrize("embed", [40, 37])
def test_patch_embed_writes_every_element(embed: int) -> None:
    """Deterministic mode fills new memory with NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        tokens = [beit_fast.patch_embed(**inputs((50, 70), embed=embed, batch=batch)) for batch in (1, 40)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.isfinite(part).all() for part in tokens)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_patch_embed_unsupported_inputs_run_fallback(dtype: torch.dtype) -> None:
    """fp64, and normalization of more channels than the kernel supports."""
    check(inputs((8, 8), (4, 4), dtype=dtype, channels=3 if dtype == torch.float64 else 130))


def test_patch_embed_empty_batch_returns_empty() -> None:
    arguments = inputs(batch=2)
    tokens = beit_fast.patch_embed(**(arguments | {"pixels": arguments["pixels"][:0], "mask": arguments["mask"][:0]}))
    assert tokens.shape == (0, 13, 40)


def test_patch_embed_tensors_on_two_devices_raise() -> None:
    arguments = inputs()
    with pytest.raises(ValueError, match="all tensors must be on one device"):
        beit_fast.patch_embed(**(arguments | {"weight": arguments["weight"].cpu()}))
    with pytest.raises(ValueError, match="all tensors must be on one device"):
        torch.ops.beit_fast._patch_embed_cuda(*(arguments | {"bias": arguments["bias"].cpu()}).values(), False)


def test_patch_embed_pixels_above_2_31_bytes() -> None:
    image = 3 * 224 * 224
    batch = 2**31 // image + 2
    need_free_memory(2 * batch * image)
    arguments = inputs((224, 224), batch=1, embed=8, pixel_dtype=torch.uint8, absent=("mask", "mask_token"))
    pixels = torch.zeros(batch, 3, 224, 224, dtype=torch.uint8, device="cuda")
    pixels[-1] = arguments["pixels"][0]
    tokens = beit_fast.patch_embed(**(arguments | {"pixels": pixels}))
    assert torch.equal(tokens[-1:], beit_fast.patch_embed(**arguments))
    assert torch.equal(tokens[0], tokens[-2])


def test_patch_embed_tokens_above_2_31_elements() -> None:
    """Expand one image to a batch, so that only the result takes memory."""
    arguments = inputs((64, 64), batch=1, embed=1024, dtype=torch.bfloat16, absent=("mask", "mask_token"))
    batch = 2**31 // (17 * 1024) + 2
    need_free_memory(3 * 2 * batch * 17 * 1024)
    tokens = beit_fast.patch_embed(**(arguments | {"pixels": arguments["pixels"].expand(batch, -1, -1, -1)}))
    expected = beit_fast.patch_embed(**arguments)
    assert tokens.numel() > 2**31
    assert all(torch.equal(part, expected.expand_as(part)) for part in tokens.split(1024))


def test_patch_embed_above_65535_row_tiles_matches_fp64() -> None:
    arguments = inputs((64, 64), (1, 1), channels=1, batch=2100, embed=8, dtype=torch.float16)
    check(arguments)
