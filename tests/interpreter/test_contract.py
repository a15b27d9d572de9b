"""What the launcher promises besides numbers: masks of outputs, empty batches, determinism, precision."""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch

from beit_fast.kernels.attention import configs, launch

from .cases import bitwise_equal, make_case, run_backward, run_forward


@pytest.mark.parametrize("output_mask", list(itertools.product([False, True], repeat=4)))
def test_only_the_gradients_asked_for_come_back(output_mask: tuple[bool, bool, bool, bool]) -> None:
    """Only the table may want a gradient: that was an illegal access in pytorch/pytorch#148476."""
    case = make_case((3, 4), torch.bfloat16, heads=2, head_dim=16)
    out, lse = run_forward(case)
    everything = run_backward(case, out, lse)
    some = run_backward(case, out, lse, output_mask)
    for wanted, partial, full in zip(output_mask, some, everything, strict=True):
        assert partial.dtype == full.dtype
        if wanted:
            assert bitwise_equal(partial, full)
        else:
            assert partial.shape == (0,)


@pytest.mark.parametrize(
    ("output_mask", "expected"),
    [
        ((True, False, False, False), {"delta", "query_gradient"}),
        ((False, True, False, False), {"delta", "key_value_gradient"}),
        ((False, False, True, False), {"key_value_gradient"}),
        (
            (False, False, False, True),
            {"delta", "bias_gradient", "patch_rows_gradient", "cls_rows_gradient"},
        ),
        ((False, False, False, False), set()),
    ],
)
def test_kernels_that_nobody_needs_are_not_launched(
    output_mask: tuple[bool, bool, bool, bool], expected: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make_case((2, 2))
    out, lse = run_forward(case)
    launched: set[str] = set()

    class Recorder:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid: tuple[int, ...]):
            launched.add(self.name)
            return lambda *arguments, **named: None

    for name in [name for name in vars(launch.backward) if name.endswith("_kernel")]:
        monkeypatch.setattr(launch.backward, name, Recorder(name.removesuffix("_kernel")))
    run_backward(case, out, lse, output_mask)
    assert launched == expected


@pytest.mark.parametrize("window", [(3, 4), None])
def test_empty_batch(window: tuple[int, int] | None) -> None:
    """Dao-AILab/flash-attention#1159, pytorch/pytorch#133780."""
    case = make_case(window, torch.float16, batch=0, heads=2, head_dim=16, tokens=13)
    out, lse = run_forward(case)
    assert out.shape == (0, 13, 2, 16)
    assert lse.shape == (0, 2, 13)
    dq, dk, dv, dtable = run_backward(case, out, lse)
    assert dq.shape == dk.shape == dv.shape == out.shape
    if case.table is None:
        assert dtable.shape == (0,)
    else:
        assert torch.equal(dtable, torch.zeros_like(case.table))


def test_empty_batch_without_the_table_gradient() -> None:
    case = make_case((3, 4), batch=0)
    out, lse = run_forward(case)
    assert run_backward(case, out, lse, (True, True, True, False))[3].shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_runs_agree_bit_for_bit(dtype: torch.dtype) -> None:
    case = make_case((5, 7), dtype, dropout_p=0.25, seed=3)
    first_out, first_lse = run_forward(case)
    second_out, second_lse = run_forward(case)
    assert bitwise_equal(first_out, second_out)
    assert bitwise_equal(first_lse, second_lse)
    first = run_backward(case, first_out, first_lse)
    second = run_backward(case, second_out, second_lse)
    assert all(bitwise_equal(left, right) for left, right in zip(first, second, strict=True))


def test_a_sample_does_not_depend_on_its_neighbours() -> None:
    case = make_case((4, 4), torch.float32, batch=3)
    out, _ = run_forward(case)
    alone = make_case((4, 4), torch.float32, batch=3)
    alone.query, alone.key, alone.value = (x[1:2] for x in (case.query, case.key, case.value))
    assert bitwise_equal(run_forward(alone)[0], out[1:2])


@pytest.mark.parametrize("heads_at_a_time", [1, 2])
def test_the_scratch_may_hold_some_heads_only(heads_at_a_time: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case((3, 4), torch.float32, heads=3)
    out, lse = run_forward(case)
    expected = run_backward(case, out, lse)[3]
    monkeypatch.setattr(launch, "BIAS_SCRATCH_BYTES", heads_at_a_time * 4 * 13 * 13)
    assert bitwise_equal(run_backward(case, out, lse)[3], expected)


def test_one_head_is_the_least_a_scratch_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case((3, 4), torch.float32, heads=2)
    out, lse = run_forward(case)
    expected = run_backward(case, out, lse)[3]
    monkeypatch.setattr(launch, "BIAS_SCRATCH_BYTES", 1)
    assert bitwise_equal(run_backward(case, out, lse)[3], expected)


@pytest.mark.parametrize(
    ("setting", "dtype", "precision"),
    [
        ("highest", torch.float32, "ieee"),
        ("high", torch.float32, "tf32"),
        ("high", torch.bfloat16, "ieee"),
    ],
)
def test_fp32_products_follow_torch(setting: str, dtype: torch.dtype, precision: str) -> None:
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(setting)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert launch._dot_precision(torch.empty(1, dtype=dtype)) == precision
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("seed", [0, 1, 2**31 - 1, 2**31, 2**32 - 1])
def test_seed_words_are_signed_32_bit_integers(seed: int) -> None:
    word = launch._signed_word(seed)
    assert -(2**31) <= word < 2**31
    assert word % 2**32 == seed


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0)])
def test_there_is_a_tile_for_every_kernel_and_head_dimension(capability: tuple[int, int]) -> None:
    architecture = configs.architecture_class(*capability)
    kernels = ("forward", "key_value_gradient", "query_gradient", "bias_gradient")
    for kernel, head_dim, element_size in itertools.product(kernels, range(8, 129, 8), (2, 4)):
        block_d = configs.padded_head_dim(head_dim)
        assert block_d >= max(16, head_dim)
        config = configs.select(kernel, architecture, block_d, element_size)
        assert min(config.block_m, config.block_n) >= 16
