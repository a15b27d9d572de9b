"""The Triton linear layer with GELU on a GPU: sizes, TF32, offsets, `torch.compile`, errors."""

from __future__ import annotations

import pytest
import torch

from beit_fast.ops.linear_gelu import linear_gelu

from ..kernels.cases import DTYPES
from ..support.linear_gelu import check_layer, make_layer
from .calls import need_free_memory


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "inputs", "outputs"),
    [
        ((1, 197), 768, 3072),
        ((8, 197), 768, 3072),
        ((64, 197), 768, 3072),
        ((4, 577), 1024, 4096),
        ((2, 1601), 1024, 4096),
        ((64, 197), 100, 333),
    ],
)
def test_linear_gelu_model_sizes_match_fp64(
    rows: tuple[int, ...], inputs: int, outputs: int, dtype: torch.dtype
) -> None:
    """Cover few rows, with small tiles, to many rows, with large tiles."""
    layer = make_layer(rows, inputs, outputs, dtype, "cuda")
    check_layer(linear_gelu(*layer), *layer)


@pytest.mark.parametrize("rows", [197, 1576, 12608])
def test_linear_gelu_tf32_if_torch_allows_it(rows: int) -> None:
    """The budget is the error of the two operations with TF32."""
    layer = make_layer((rows,), 768, 3072, torch.float32, "cuda")
    exact = linear_gelu(*layer)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        rounded = linear_gelu(*layer)
        check_layer(rounded, *layer)
    finally:
        torch.set_float32_matmul_precision(before)
    assert not torch.equal(exact, rounded)


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_gelu_writes_every_element(dtype: torch.dtype) -> None:
    """Deterministic mode fills new memory with NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        for rows, outputs in ((77, 130), (700, 515), (5000, 258)):
            layer = make_layer((rows,), 96, outputs, dtype, "cuda")
            assert torch.isfinite(linear_gelu(*layer)).all()
    finally:
        torch.use_deterministic_algorithms(False)


def test_linear_gelu_result_above_2_31_elements() -> None:
    """Expand one row to all rows, so that only the result takes memory."""
    x, weight, bias = make_layer((1,), 64, 1024, torch.bfloat16, "cuda")
    rows = 2**21 + 200
    need_free_memory(3 * 2 * rows * 1024)
    result = linear_gelu(x.expand(rows, -1), weight, bias)
    assert result.numel() > 2**31
    expected = linear_gelu(x.expand(5000, -1), weight, bias)[:1]
    assert all(torch.equal(part, expected.expand_as(part)) for part in result.split(2**16))


def test_linear_gelu_compile_fullgraph_with_dynamic_rows() -> None:
    torch.compiler.reset()
    compiled = torch.compile(linear_gelu, fullgraph=True, dynamic=True)
    for rows in (3, 197, 5000):
        layer = make_layer((rows,), 96, 64, torch.bfloat16, "cuda")
        assert torch.equal(compiled(*layer), linear_gelu(*layer))


def test_linear_gelu_rows_of_one_class_compile_once() -> None:
    from beit_fast.kernels.linear_gelu.kernel import linear_gelu_kernel

    def compiled() -> int:
        return len(linear_gelu_kernel.device_caches[torch.cuda.current_device()][0])

    linear_gelu(*make_layer((200,), 96, 64, torch.float16, "cuda"))
    before = compiled()
    for rows in (1, 16, 33, 640):
        linear_gelu(*make_layer((rows,), 96, 64, torch.float16, "cuda"))
    assert compiled() == before


def test_linear_gelu_unsupported_inputs_raise() -> None:
    x, weight, bias = make_layer((3,), 16, 24, torch.float64, "cuda")
    with pytest.raises(ValueError, match="expected float16, bfloat16 or float32"):
        linear_gelu(x, weight, bias)
    x, weight, bias = make_layer((3,), 16, 24, torch.float32, "cuda")
    with pytest.raises(ValueError, match="all tensors must be on one device"):
        linear_gelu(x, weight.cpu(), bias)
