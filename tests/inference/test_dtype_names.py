"""`optimize_for_inference(dtype=...)` by the name of a dtype."""

import pytest
import torch

from beit_fast import optimize_for_inference

from ..support.models import build


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("bf16", torch.bfloat16),
        ("bfloat16", torch.bfloat16),
        ("torch.bfloat16", torch.bfloat16),
        ("fp16", torch.float16),
        ("half", torch.float16),
        ("fp32", torch.float32),
        ("float64", torch.float64),
    ],
)
def test_optimize_dtype_by_name_equals_dtype(name, dtype):
    optimized = optimize_for_inference(build(), name)
    assert optimized.dtype == dtype
    assert optimized.inference_report().dtype == dtype


@pytest.mark.parametrize("dtype", ["bf61", "int8", "torch", "nn", "", 16, True])
def test_optimize_unknown_dtype_name_raises(dtype):
    with pytest.raises(
        TypeError, match=r"is not supported \(expected a floating-point torch\.dtype, its name, 'fp32', "
    ):
        optimize_for_inference(build(), dtype)
