"""The interpreted kernels, forward and backward, against the fp64 oracle."""

from __future__ import annotations

import pytest
import torch

from beit_fast.kernels.attention import configs, launch

from ..support.oracle import assert_within_budget, dense_bias, philox_keep
from .cases import BACKWARD_FACTOR, FORWARD_FACTOR, Case, check_parity, make_case, run_backward, run_forward

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HEAD_DIMS = (32, 64, 80, 96, 128, 8, 24, 40)


def window_of(tokens: int) -> tuple[int, int]:
    """A window of `tokens - 1` patches; which of the possible ones changes with `tokens`."""
    patches = tokens - 1
    heights = [height for height in range(1, patches + 1) if patches % height == 0]
    height = heights[tokens % len(heights)]
    return height, patches // height


@pytest.mark.parametrize("tokens", range(2, 71))
def test_every_length_up_to_70(tokens: int) -> None:
    batch, heads = ((2, 1), (1, 2))[tokens % 2]
    head_dim = HEAD_DIMS[tokens % len(HEAD_DIMS)]
    check_parity(
        make_case(window_of(tokens), DTYPES[tokens % len(DTYPES)], batch=batch, heads=heads, head_dim=head_dim)
    )


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_every_head_dimension_in_every_dtype(head_dim: int, dtype: torch.dtype) -> None:
    check_parity(make_case((4, 9), dtype, batch=3, heads=2, head_dim=head_dim))


def test_the_native_window_of_a_224_pixel_image() -> None:
    check_parity(make_case((14, 14), torch.bfloat16, batch=1, heads=1, head_dim=64))


@pytest.mark.parametrize("window", [(1, 1), (1, 40), (40, 1), (3, 13), (13, 3), (7, 7)])
def test_batch_and_heads_together(window: tuple[int, int]) -> None:
    check_parity(make_case(window, torch.float32, batch=3, heads=2))


@pytest.mark.parametrize("tokens", [2, 17, 33, 50])
@pytest.mark.parametrize("dtype", DTYPES)
def test_without_a_table(tokens: int, dtype: torch.dtype) -> None:
    check_parity(make_case(None, dtype, tokens=tokens, head_dim=24))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_single_token_attends_to_itself(dtype: torch.dtype) -> None:
    """The scores' gradient is a difference of equal numbers; its rounding is measured against those."""
    case = make_case(None, dtype, tokens=1, head_dim=24)
    out, lse = run_forward(case)
    dq, dk, dv, _ = run_backward(case, out, lse)
    assert_within_budget("out", out, case.value, case.value, FORWARD_FACTOR)
    assert_within_budget("dv", dv, case.grad_out, case.grad_out, BACKWARD_FACTOR)
    weight_gradient = case.grad_out.double().norm() * case.value.double().norm()
    rounding = 4 * torch.finfo(torch.float32).eps * weight_gradient * case.scale
    assert dq.double().norm() <= rounding * case.key.double().norm()
    assert dk.double().norm() <= rounding * case.query.double().norm()


@pytest.mark.parametrize("table_dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_table_keeps_its_dtype(table_dtype: torch.dtype) -> None:
    check_parity(make_case((3, 4), torch.float32, table_dtype=table_dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_log_sum_exp(dtype: torch.dtype) -> None:
    case = make_case((5, 7), dtype)
    lse = run_forward(case)[1]

    def expected(precision: torch.dtype) -> torch.Tensor:
        query, key = case.query.to(precision), case.key.to(precision)
        assert case.table is not None
        scores = torch.einsum("bihd,bjhd->bhij", query, key) * case.scale
        return (scores + dense_bias(case.table, case.window).to(precision)).logsumexp(-1)

    assert lse.dtype == torch.float32
    assert_within_budget("lse", lse, expected(torch.float64), expected(torch.float32), 2)


def masked_case(dtype: torch.dtype, head_dim: int = 40) -> Case:
    """Sample 0 attends everywhere, sample 1 to some keys, sample 2 to none."""
    case = make_case((5, 8), dtype, batch=3, head_dim=head_dim)
    case.key_mask = torch.rand(3, 41, generator=torch.Generator().manual_seed(5)) > 0.5
    case.key_mask[0] = True
    case.key_mask[2] = False
    return case


@pytest.mark.parametrize("dtype", DTYPES)
def test_key_mask(dtype: torch.dtype) -> None:
    check_parity(masked_case(dtype))


def test_a_sample_without_keys_gets_zeros_and_minus_infinity() -> None:
    case = masked_case(torch.float32)
    out, lse = run_forward(case)
    dq, dk, dv, _ = run_backward(case, out, lse)
    assert torch.isfinite(lse[:2]).all()
    assert (lse[2] == float("-inf")).all()
    for tensor in (out, dq, dk, dv):
        assert torch.count_nonzero(tensor[2]) == 0


def test_a_batch_without_any_key_has_zero_gradients() -> None:
    case = make_case((3, 3), torch.bfloat16, key_mask=torch.zeros(2, 10, dtype=torch.bool))
    out, lse = run_forward(case)
    for tensor in (out, *run_backward(case, out, lse)):
        assert torch.equal(tensor, torch.zeros_like(tensor))


@pytest.mark.parametrize("dropout_p", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("seed", [0, 1, 16, 2**31, 2**32 + 5, 2**63 - 1])
def test_dropout_keeps_exactly_the_elements_philox_says(seed: int, dropout_p: float) -> None:
    tokens = 24
    case = make_case(None, tokens=tokens, head_dim=tokens, dropout_p=dropout_p, seed=seed)
    case.query = torch.zeros_like(case.query)
    case.value = torch.eye(tokens)[None, :, None, :].expand_as(case.value).contiguous()
    weights = run_forward(case)[0].permute(0, 2, 1, 3)  # [B, H, N, N]
    keep = philox_keep(seed, dropout_p, 2, 2, tokens)
    assert torch.equal(weights != 0, keep)
    torch.testing.assert_close(weights, keep / (tokens * (1 - dropout_p)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_dropout_gradients(dtype: torch.dtype) -> None:
    case = make_case((5, 7), dtype, dropout_p=0.3, seed=7 * 2**32 + 2**31 + 9)
    check_parity(case, keep=philox_keep(case.seed, case.dropout_p, 2, 2, 36))


def test_dropout_with_a_key_mask() -> None:
    case = masked_case(torch.float32)
    case.dropout_p, case.seed = 0.2, 11
    check_parity(case, keep=philox_keep(11, 0.2, 3, 2, 41))


def test_dropping_everything_gives_zeros() -> None:
    case = make_case((3, 3), dropout_p=1.0)
    out, lse = run_forward(case)
    for tensor in (out, *run_backward(case, out, lse)):
        assert torch.equal(tensor, torch.zeros_like(tensor))


@pytest.mark.parametrize("architecture", list(configs.SHARED_MEMORY_LIMIT))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_tiles_that_gpus_use(architecture: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    def config_of_gpu(kernel: str, query: torch.Tensor) -> configs.TileConfig:
        block_d = configs.padded_head_dim(query.shape[-1])
        return configs.select(kernel, architecture, block_d, query.element_size())

    monkeypatch.setattr(launch, "_config", config_of_gpu)
    check_parity(make_case((10, 15), dtype, batch=2, heads=1, head_dim=64))
