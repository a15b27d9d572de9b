"""Patch embedding from the PTX of nvcc, against fp64."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="needs Triton")
if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
    pytest.skip("the Triton interpreter and compiler cannot share a process", allow_module_level=True)

from beit_fast.kernels.aot.executor.launch import Launch, Options
from beit_fast.kernels.aot.executor.launchers import on_gpu
from beit_fast.kernels.aot.executor.schedule import RANDOM, Schedule
from beit_fast.kernels.aot.verify import patch_embed

from ...support.nvcc import needs_nvcc
from ...support.oracle import assert_within_budget
from ...support.patch_embedding import convolution, in_precision, make_inputs

pytestmark = [pytest.mark.slow, needs_nvcc]
CASES = {
    "half, vectors": {"image": (24, 48), "patch": (4, 8), "dtype": torch.bfloat16},
    "half, bytes, one by one": {
        "image": (11, 17), "patch": (3, 5), "embed": 37, "pixel_dtype": torch.uint8, "dtype": torch.float16
    },
    "half, channels last, absent tokens": {
        "image": (16, 32), "patch": (8, 16), "dtype": torch.float16, "layout": "channels_last",
        "absent": ("cls", "mask_token", "mask", "mean", "std"),
    },
    "single": {"image": (16, 24), "patch": (8, 8), "dtype": torch.float32, "layout": "cropped"},
}  # fmt: skip


def embed(
    arguments: dict[str, Any], capability: int, tile: str, options: Options, allow_tf32: bool = False
) -> tuple[Tensor, Launch]:
    with on_gpu(capability, 1, options) as driver:
        tokens = patch_embed.launch(arguments, tile, allow_tf32=allow_tf32)
    return tokens, driver.launches[-1]


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("tile", ["large", "small"])
@pytest.mark.parametrize("name", CASES)
def test_patch_embed_equals_fp64_in_every_order(name: str, tile: str, capability: int) -> None:
    arguments = make_inputs(**CASES[name])
    tokens, launch = embed(arguments, capability, tile, Options(collect=True))
    reference, eager = convolution(**in_precision(arguments, torch.float64)), convolution(**arguments)
    coarsest = max(tokens.dtype, arguments["weight"].dtype, key=lambda dtype: torch.finfo(dtype).eps)
    assert_within_budget("tokens", tokens, reference, eager, 2, coarsest)
    assert not launch.hazards
    again, launch = embed(arguments, capability, tile, Options(Schedule(RANDOM, 1), collect=True))
    assert torch.equal(tokens, again)
    assert not launch.hazards


def test_patch_embed_in_tf32_equals_fp64() -> None:
    arguments = make_inputs((16, 24), (8, 8))
    tokens, _ = embed(arguments, 80, "small", Options(), allow_tf32=True)
    reference = convolution(**in_precision(arguments, torch.float64))
    rounded = {
        name: value.half().float() if name in ("pixels", "weight") else value for name, value in arguments.items()
    }
    assert_within_budget("tokens", tokens, reference, convolution(**rounded), 2)
