"""The cases of patch embedding, which nvcc compiles: its results do not depend on Triton."""

from __future__ import annotations

import itertools

from .cases import DTYPES, Case, PatchCase
from .loops import PATCH_TILES

PATCH_CAPABILITIES = (80, 90)
PIXELS = ("uint8", "bf16", "fp16", "fp32")
ABSENT = {
    "everything": (),
    "no mean and std": ("mean", "std"),
    "no mask and CLS": ("mask", "mask_token", "cls"),
    "no positions": ("pos",),
    "no bias": ("bias",),
    "no std": ("std",),
    "no mean": ("mean",),
}
"""Arguments that are not passed, by form."""
READS = (
    # Rows of 8 pixels of a channel, of 24 numbers of all channels, and pixels one by one.
    ("contiguous", (56, 72), (7, 8), 152),
    ("channels_last", (56, 72), (7, 8), 152),
    ("cropped", (58, 83), (7, 9), 149),
    ("transposed", (56, 72), (7, 8), 152),
)
"""Layout, image, patch and columns by the way in which pixels are read."""


def patch_cases(capability: int) -> list[Case]:
    """Return every dtype of weight and pixels in every tile and read; the first one is the quick one."""
    if capability not in PATCH_CAPABILITIES:
        return []
    cases: list[Case] = []
    combinations = itertools.product(READS, PIXELS, DTYPES, PATCH_TILES)
    for number, ((layout, image, patch, columns), pixels, dtype, tile) in enumerate(combinations):
        form = list(ABSENT)[number % len(ABSENT)]
        tokens = "fp32" if number % 5 == 4 else dtype
        cases.append(PatchCase(capability, dtype, pixels, tokens, tile, image, patch, columns, layout, form))
    return cases
