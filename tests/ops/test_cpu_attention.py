"""Native CPU attention: image sizes, threads, memory and large logits.

tests/kernels has the checks that all attention kernels share.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import beit_fast
from beit_fast import native
from beit_fast.position_bias import table_rows, token_count

from ..support.benchmarks import import_benchmarks
from ..support.oracle import assert_within_budget, attention_oracle

import_benchmarks()

from benchmarks.harness import memory  # noqa: E402  needs the package above

pytestmark = pytest.mark.skipif(
    not native.is_loaded("_C"), reason=f"no native library: {native.unsupported_reason('_C')}"
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FORWARD_FACTOR, BACKWARD_FACTOR = 2, 3


def draw(
    window: tuple[int, int],
    dtype: torch.dtype,
    *,
    batch: int = 1,
    heads: int = 2,
    head_dim: int = 64,
    masked: bool = False,
) -> dict[str, Tensor | None]:
    """Draw N(0, 1) inputs from a fixed seed."""
    generator = torch.Generator().manual_seed(17)
    tokens = token_count(window)
    shape = (batch, tokens, heads, head_dim)
    rows = {name: torch.randn(shape, generator=generator).to(dtype) for name in ("q", "k", "v", "grad_out")}
    table_dtype = torch.promote_types(dtype, torch.float32)
    table = torch.randn(table_rows(window), heads, generator=generator).to(table_dtype)
    key_mask = torch.rand(batch, tokens, generator=generator) > 0.3 if masked else None
    return {**rows, "table": table, "key_mask": key_mask}


def compute(inputs: dict, window: tuple[int, int], scale: float | None = None) -> list[Tensor]:
    """Return out, dq, dk, dv and dtable of the operator."""
    leaves = [inputs[name].detach().requires_grad_() for name in ("q", "k", "v", "table")]
    out = beit_fast.rel_pos_attention(*leaves, window, inputs["key_mask"], scale)
    return [out.detach(), *torch.autograd.grad(out, leaves, inputs["grad_out"])]


def oracle(inputs: dict, window: tuple[int, int], dtype: torch.dtype, scale: float | None = None) -> list[Tensor]:
    """Return the same tensors by dense attention in `dtype`."""
    leaves = [inputs[name].detach().to(dtype).requires_grad_() for name in ("q", "k", "v")]
    table = inputs["table"].detach().to(torch.promote_types(dtype, torch.float32)).requires_grad_()
    out = attention_oracle(*leaves, table, window, inputs["key_mask"], scale)
    return [out.detach(), *torch.autograd.grad(out, [*leaves, table], inputs["grad_out"].to(dtype))]


def check(inputs: dict, window: tuple[int, int], scale: float | None = None) -> None:
    """Check results against the error budget of dense attention in the same dtype."""
    dtype = inputs["q"].dtype
    actual = compute(inputs, window, scale)
    expected, eager = (oracle(inputs, window, precision, scale) for precision in (torch.float64, dtype))
    names = ("out", "dq", "dk", "dv", "dtable")
    for name, ours, exact, same in zip(names, actual, expected, eager, strict=True):
        factor = FORWARD_FACTOR if name == "out" else BACKWARD_FACTOR
        assert_within_budget(name, ours, exact, same, factor, dtype)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [(14, 14), (24, 24), (10, 40)])
def test_attention_of_image_sizes_matches_oracle(window: tuple[int, int], dtype: torch.dtype, masked: bool) -> None:
    check(draw(window, dtype, batch=2 if window == (14, 14) else 1, masked=masked), window)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [(32, 32), (40, 40), (48, 36)])
def test_attention_of_large_images_matches_oracle(window: tuple[int, int], dtype: torch.dtype) -> None:
    check(draw(window, dtype), window)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("head_dim", [1, 3, 20, 33, 100, 130, 200])
def test_attention_of_odd_head_dimensions_matches_oracle(head_dim: int, dtype: torch.dtype) -> None:
    check(draw((5, 6), dtype, batch=2, head_dim=head_dim), (5, 6))


@pytest.mark.parametrize("head_dim", [24, 72, 128])
def test_attention_of_many_tokens_matches_oracle(head_dim: int) -> None:
    """From 257 tokens, the fp32 backward uses tiles if the CPU has them."""
    check(draw((12, 23), torch.float32, head_dim=head_dim, masked=True), (12, 23))


@pytest.mark.parametrize("window", [(14, 14), (24, 24), (32, 18)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_on_two_threads_returns_same_bits(window: tuple[int, int], dtype: torch.dtype) -> None:
    inputs = draw(window, dtype, heads=3, masked=window == (32, 18))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = compute(inputs, window)
        torch.set_num_threads(2)
        together = compute(inputs, window)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(left, right) for left, right in zip(alone, together, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("growth", [0.0, 300.0, -300.0])
def test_attention_of_growing_logits_matches_oracle(dtype: torch.dtype, growth: float) -> None:
    """Sums are rescaled if logits exceed the first logits by 2^60."""
    window = (9, 12)
    inputs = draw(window, dtype)
    ramp = torch.linspace(0, growth, table_rows(window) - 3)[:, None]
    inputs["table"][:-3] += ramp
    out = beit_fast.rel_pos_attention(inputs["q"], inputs["k"], inputs["v"], inputs["table"], window)
    exact, eager = (
        attention_oracle(*(inputs[x].to(precision) for x in ("q", "k", "v", "table")), window)
        for precision in (torch.float64, dtype)
    )
    assert_within_budget("out", out, exact, eager, FORWARD_FACTOR, dtype)
    assert out.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_with_first_keys_masked_matches_oracle(dtype: torch.dtype) -> None:
    """Keys 1 to 80 are masked, and all logits are far below 0."""
    window = (11, 11)
    inputs = draw(window, dtype)
    inputs["key_mask"] = (torch.arange(122) == 0) | (torch.arange(122) > 80)
    inputs["key_mask"] = inputs["key_mask"][None].clone()
    inputs["table"] -= 900
    check(inputs, window)


@pytest.mark.parametrize("scale", [-0.25, 0.0, 0.7])
def test_attention_of_any_scale_matches_oracle(scale: float) -> None:
    check(draw((6, 7), torch.float32, batch=2), (6, 7), scale)


@pytest.mark.skipif(memory.memory_unsupported_reason() is not None, reason=str(memory.memory_unsupported_reason()))
def test_attention_memory_is_below_one_matrix() -> None:
    window, heads = (40, 40), 12
    inputs = draw(window, torch.float32, heads=heads)
    one_matrix = token_count(window) ** 2 * 4
    arguments = (inputs["q"], inputs["k"], inputs["v"], inputs["table"], window)
    beit_fast.rel_pos_attention(*arguments)
    results = inputs["q"].nbytes + heads * token_count(window) * 4
    assert memory.peak_memory(lambda: beit_fast.rel_pos_attention(*arguments)) - results < one_matrix / 2
    compute(inputs, window)
    assert memory.peak_memory(lambda: compute(inputs, window)) < heads * one_matrix / 2
