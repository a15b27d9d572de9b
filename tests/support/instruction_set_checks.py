"""Checks of the native CPU kernels on the instruction set of `BEIT_FAST_CPU_ISA`.

Run all of them with `python -m tests.support.instruction_set_checks`.
The cases cover every path through loads, tails and tiles.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from hypothesis import given, settings

from beit_fast import native

from ..kernels import test_parity as parity
from ..kernels.cases import DTYPES, check_parity, make_case
from ..ops import test_cpu_attention as attention
from ..ops import test_patch_embed as patch_embed
from .cases import check_operator
from .patch_embedding import LAYOUTS, make_inputs


def check_attention() -> None:
    """Check windows, masks, dropout, head dimensions, threads and large logits."""
    for dtype, window in itertools.product(DTYPES, [(1, 1), (1, 40), (13, 3), (14, 14)]):
        check_parity(make_case(window, dtype, batch=3, heads=2, dropout_p=0.2 if window == (13, 3) else 0.0))
        check_parity(make_case(window, dtype, key_mask=torch.rand(2, window[0] * window[1] + 1) > 0.3))
    for dtype, head_dim in itertools.product((*DTYPES, torch.float64), [1, 3, 24, 33, 72, 128, 130]):
        check_operator(attention.make_case((5, 6), dtype, batch=2, head_dim=head_dim, some_keys=True))
    for dtype in DTYPES:
        parity.test_attention_single_token_attends_to_itself(dtype)
        parity.test_attention_key_mask_with_one_key_returns_its_value(dtype, 40)
        check_operator(attention.make_case((24, 24), dtype))
        attention.test_attention_of_growing_logits_matches_oracle(dtype, 300.0)
        attention.test_attention_of_growing_logits_matches_oracle(dtype, -300.0)
        attention.test_attention_with_first_keys_masked_matches_oracle(dtype)
        attention.test_attention_on_two_threads_returns_same_bits((14, 14), dtype)
    attention.test_attention_of_many_tokens_matches_oracle(72)


def check_patch_embed() -> None:
    """Check layouts, dtypes, output channels, long sums and drawn inputs."""
    for dtype, pixel_dtype in itertools.product(patch_embed.DTYPES, [torch.uint8, torch.float32, None]):
        patch_embed.test_patch_embed_beit_patches_match_convolution(dtype, pixel_dtype, "operator")
    for layout in LAYOUTS:
        patch_embed.assert_right(make_inputs((35, 50), (7, 4), embed=40, pixel_dtype=torch.uint8, layout=layout))
    for embed in (1, 15, 17, 33, 64):
        patch_embed.test_patch_embed_output_channels_match_convolution(embed)
    for depth, dtype in itertools.product((255, 257, 3072), (torch.float32, torch.bfloat16)):
        patch_embed.test_patch_embed_long_sums_match_convolution(depth, dtype)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        patch_embed.test_patch_embed_many_patches_match_convolution((5, 7), 33, dtype, None)
    check_drawn_inputs()


@given(patch_embed.drawn_inputs())
@settings(max_examples=60, deadline=None, derandomize=True, database=None)
def check_drawn_inputs(arguments: dict[str, Any]) -> None:
    patch_embed.assert_right(arguments)


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills new memory with NaN
    check_attention()
    check_patch_embed()
    print(f"checked {native.instruction_sets()[0]}")


if __name__ == "__main__":
    main()
