"""Small cases of attention and patch embedding for compute-sanitizer.

Run as a script with the names of the cases. Sizes are not multiples of a block and rows are not aligned. With
`PYTORCH_NO_CUDA_MEMORY_CACHING=1` each tensor has an allocation of its own, so that an access one element outside a
tensor is detected.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

import beit_fast
from beit_fast import native

CASES: dict[str, dict[str, Any]] = {
    "one row": {"window": (1, 6), "dtype": torch.float16},
    "odd width": {"window": (3, 5), "dtype": torch.bfloat16, "masked": True},
    "even width": {"window": (5, 8), "dtype": torch.bfloat16, "head_dim": 64, "dropout_p": 0.2},
    "several blocks": {"window": (9, 15), "dtype": torch.float16, "head_dim": 24},
    "single precision": {"window": (4, 4), "dtype": torch.float32, "head_dim": 8, "masked": True},
    "no table": {"window": None, "tokens": 67, "dtype": torch.bfloat16, "head_dim": 80},
    "one token": {"window": None, "tokens": 1, "dtype": torch.float32},
    "rows at odd addresses": {"window": (4, 7), "dtype": torch.float16, "padding": 3},
    "no image": {"window": (3, 4), "dtype": torch.float16, "batch": 0},
}

PATCH_CASES: dict[str, dict[str, Any]] = {
    "pixels by vectors": {"image": (32, 48), "patch": (16, 16), "dtype": torch.bfloat16},
    "bytes by vectors": {"image": (33, 49), "patch": (8, 8), "dtype": torch.float16, "is_bytes": True},
    "single pixels": {"image": (29, 31), "patch": (5, 7), "dtype": torch.bfloat16, "embed": 37},
    "single bytes in fp32": {"image": (29, 31), "patch": (3, 3), "dtype": torch.float32, "embed": 9, "is_bytes": True},
    "fp32 channels last": {"image": (40, 24), "patch": (8, 8), "dtype": torch.float32, "channels_last": True},
    "several tiles of patches": {"image": (80, 96), "patch": (4, 4), "dtype": torch.bfloat16, "embed": 200},
}
"""Cases of the CUDA library, if it is built."""


def run(
    window: tuple[int, int] | None,
    dtype: torch.dtype,
    batch: int = 2,
    heads: int = 3,
    head_dim: int = 16,
    tokens: int = 0,
    masked: bool = False,
    dropout_p: float = 0.0,
    padding: int = 0,
) -> list[Tensor]:
    """Return out and the gradients of its inputs."""
    table = None
    if window is not None:
        tokens = window[0] * window[1] + 1
        rows = (2 * window[0] - 1) * (2 * window[1] - 1) + 3
        table = torch.randn(rows, heads, device="cuda", requires_grad=True)
    shape = (batch, tokens, heads, head_dim + padding)
    leaves = [torch.randn(shape, device="cuda", dtype=dtype, requires_grad=True) for _ in range(3)]
    query, key, value = (leaf[..., padding:] for leaf in leaves)
    key_mask = torch.rand(batch, tokens, device="cuda") > 0.3 if masked else None
    out = beit_fast.rel_pos_attention(query, key, value, table, window, key_mask, dropout_p=dropout_p, seed=3)
    leaves = leaves if table is None else [*leaves, table]
    return [out.detach(), *torch.autograd.grad(out, leaves, torch.randn_like(out))]


def embed_patches(
    image: tuple[int, int],
    patch: tuple[int, int],
    dtype: torch.dtype,
    embed: int = 72,
    is_bytes: bool = False,
    channels_last: bool = False,
) -> list[Tensor]:
    """Embed patches with all options and return the tokens."""
    assert native.load("_C_cuda"), native.unsupported_reason("_C_cuda")
    shape, patches = (3, 3, *image), (image[0] // patch[0]) * (image[1] // patch[1])
    pixels = torch.randint(0, 256, shape, device="cuda").to(torch.uint8 if is_bytes else dtype)
    pixels = pixels.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    weight = torch.randn(embed, 3, *patch, device="cuda", dtype=dtype)
    bias, cls, mask_token = torch.randn(3, embed, device="cuda", dtype=dtype).clone().unbind()
    mask = torch.rand(3, patches, device="cuda") > 0.5
    positions = torch.randn(1, 1 + patches, embed, device="cuda", dtype=dtype)
    mean, std = [120.0, 110.0, 100.0], [60.0, 55.0, 50.0]
    return [beit_fast.patch_embed(pixels, weight, bias, cls, mask, mask_token, positions, mean, std)]


def main(names: list[str]) -> None:
    torch.manual_seed(0)
    for name in names:
        results = run(**CASES[name]) if name in CASES else embed_patches(**PATCH_CASES[name])
        torch.cuda.synchronize()
        assert all(torch.isfinite(tensor).all() for tensor in results), name
        print(f"ran: {name}")


if __name__ == "__main__":
    main(sys.argv[1:])
