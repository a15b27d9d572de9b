"""Bias layouts, split keys, plans of the table gradient, scales of any sign."""

from __future__ import annotations

import pytest
import torch

from beit_fast.kernels.attention import configs, launch
from beit_fast.kernels.common import gpu

from ..support.cases import GRADIENT_NAMES, Case
from ..support.oracle import BACKWARD_FACTOR, FORWARD_FACTOR, assert_within_budget, attention_oracle
from .cases import check_parity, make_case, run_backward, run_forward


def force_layout(monkeypatch: pytest.MonkeyPatch, layout: str) -> None:
    """Read the bias from `layout`, with vector loads as wide as by default."""
    default = configs.bias_layout

    def forced(architecture: str, element_size: int, window: tuple[int, int]) -> configs.BiasLayout:
        vector = default(architecture, element_size, window).vector
        return configs.BiasLayout(
            layout, {"paired": vector, "plain": min(vector, 1), "extended": min(vector, 1)}[layout]
        )

    monkeypatch.setattr(configs, "bias_layout", forced)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("layout", "window"),
    [
        (layout, window)
        for window in [(1, 2), (2, 1), (1, 7), (4, 6), (6, 5), (7, 10)]
        for layout in ("paired", "plain", "extended")
        if layout != "paired" or window[1] % 2 == 0
    ],
    ids=str,
)
def test_attention_every_bias_layout_matches_oracle(
    layout: str, window: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    force_layout(monkeypatch, layout)
    check_parity(make_case(window, dtype, heads=2, head_dim=16))


@pytest.mark.parametrize("window", [(14, 14), (24, 24), (32, 32), (40, 40), (45, 46)], ids=str)
def test_bias_layout_even_windows_are_paired(window: tuple[int, int]) -> None:
    for architecture in (gpu.SMALL, gpu.SM80, gpu.SM90):
        assert configs.bias_layout(architecture, 2, window) == ("paired", 4)
    assert configs.bias_layout(gpu.SM100, 2, window) == ("plain", 2)
    assert configs.bias_layout(gpu.SM90, 4, window).vector == 0


def test_bias_layout_odd_and_large_windows() -> None:
    assert configs.bias_layout(gpu.SM90, 2, (15, 15)) == ("plain", 1)
    assert configs.bias_layout(gpu.SM90, 2, (128, 128)) == ("extended", 1)
    assert 4 * configs.packed_size("extended", (128, 128)) < configs.LARGEST_PATCH_BYTES


@pytest.fixture
def split(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(configs, "num_splits", lambda *_: request.param)
    return request.param


@pytest.mark.parametrize(
    ("split", "window"), [(2, None), (3, (7, 10)), (2, (9, 15)), (7, (9, 15))], indirect=["split"], ids=str
)
def test_attention_split_keys_match_oracle(split: int, window: tuple[int, int] | None) -> None:
    """Some splits are short; the last of seven has no keys."""
    check_parity(make_case(window, torch.bfloat16, heads=2, head_dim=16, tokens=None if window else 75))


@pytest.mark.parametrize("split", [3], indirect=True)
def test_attention_split_keys_with_key_mask_match_oracle(split: int) -> None:
    """Mask all keys of a split, CLS, and all keys of a sample."""
    mask = torch.ones(3, 136, dtype=torch.bool)
    mask[0, 1:70] = False
    mask[1, 0] = False
    mask[2] = False
    check_parity(make_case((9, 15), batch=3, heads=1, head_dim=16, key_mask=mask))


@pytest.mark.parametrize("split", [2], indirect=True)
def test_attention_split_keys_drop_same_weights(split: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case((7, 10), heads=1, head_dim=16, dropout_p=0.4, seed=5)
    with_splits, _ = run_forward(case)
    monkeypatch.setattr(configs, "num_splits", lambda *_: 1)
    whole, _ = run_forward(case)
    torch.testing.assert_close(with_splits, whole)


@pytest.mark.parametrize(
    ("programs", "patches", "expected"),
    [(108, 1024, 3), (156, 1600, 2), (12, 196, 1), (48, 576, 2), (4, 16384, 8), (264, 1600, 1), (1, 0, 1)],
)
def test_num_splits_small_grids_are_split(programs: int, patches: int, expected: int) -> None:
    """On 132 SMs, each split has at least four steps of 64 keys."""
    assert configs.num_splits(programs, patches, 64, 132) == expected
    assert configs.num_splits(programs, patches, 64, 0) == 1


@pytest.mark.parametrize(
    "plan",
    [
        configs.DbiasPlan(1, 2, 71),
        configs.DbiasPlan(1, 1, 64),
        configs.DbiasPlan(2, 3, 71),
        configs.DbiasPlan(3, 2, 71),
    ],
    ids=lambda plan: "-".join(map(str, plan)),
)
def test_backward_dbias_plans_match_oracle(plan: configs.DbiasPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    """Split by heads, rows and samples; the last split of each is short."""
    monkeypatch.setattr(configs, "plan_backward_dbias", lambda *_: plan)
    check_parity(make_case((7, 10), batch=3, heads=3, head_dim=16))


@pytest.mark.parametrize("table_dtype", [torch.bfloat16, torch.float16], ids=str)
def test_backward_dbias_half_table_sums_in_fp32(table_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = configs.DbiasPlan(3, 1, 64)
    monkeypatch.setattr(configs, "plan_backward_dbias", lambda *_: plan)
    check_parity(make_case((5, 14), batch=3, heads=2, head_dim=16, table_dtype=table_dtype))


@pytest.mark.parametrize("patches", [196, 576, 1024, 1600, 4096, 16384])
@pytest.mark.parametrize("batch", [1, 8, 64])
def test_plan_backward_dbias_scratch_is_bounded(patches: int, batch: int) -> None:
    config = configs.select("backward_dbias", gpu.SM90, 64, "half", False)
    plan = configs.plan_backward_dbias(batch, patches, 12, config, 132)
    size = 4 * plan.num_splits * plan.heads * plan.rows * configs.scratch_stride(patches)
    assert size <= configs.SCRATCH_BYTES <= 2**28
    assert 1 <= plan.num_splits <= batch
    assert plan.rows == patches + 1 or (plan.heads == 1 and plan.rows % config.block_m == 0)


@pytest.mark.parametrize("scale", [-0.3, 0.0, 2.5])
def test_attention_scale_of_any_sign_matches_oracle(scale: float) -> None:
    """The scale is applied after the maximum; the bias is divided by it."""
    case = make_case((5, 6), heads=2, head_dim=16)
    results, reference, eager = (
        run_scaled(case, scale),
        *(oracle(case, scale, dtype) for dtype in (torch.float64, None)),
    )
    for name, actual, expected, same in zip(("out", *GRADIENT_NAMES), results, reference, eager, strict=True):
        assert_within_budget(name, actual, expected, same, FORWARD_FACTOR if name == "out" else BACKWARD_FACTOR)


def run_scaled(case: Case, scale: float) -> list[torch.Tensor]:
    inputs = (case.query, case.key, case.value, case.table, None)
    out, lse = launch.attention_forward(*inputs, case.window, scale, 0.0, 0)
    gradients = launch.attention_backward(
        case.grad_out, *inputs, out, lse, case.window, scale, 0.0, 0, (True, True, True, True)
    )
    return [out, *gradients]


def oracle(case: Case, scale: float, dtype: torch.dtype | None) -> list[torch.Tensor]:
    leaves = [x.to(dtype or x.dtype).requires_grad_() for x in (case.query, case.key, case.value, case.table)]
    out = attention_oracle(*leaves, case.window, scale=scale)
    return [out.detach(), *torch.autograd.grad(out, leaves, case.grad_out.to(out.dtype))]


def test_addressable_far_token_stride_copies() -> None:
    """Offsets in a tile are int32, so large token strides are copied."""
    case = make_case((1, 1), heads=1, head_dim=16, batch=1)
    far = torch.empty(0).new_empty(1, device=case.query.device).as_strided((1, 1, 1, 16), (0, 2**26, 0, 0))
    assert launch.addressable(far).stride(1) < 2**24
    assert launch.addressable(case.query) is case.query


@pytest.mark.parametrize("output_mask", [(True, False, False, True), (False, True, False, False)], ids=str)
def test_backward_output_mask_every_bias_layout_agrees(
    output_mask: tuple[bool, bool, bool, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make_case((4, 6), heads=2, head_dim=16)
    results = []
    for layout in ("paired", "plain", "extended"):
        with monkeypatch.context() as patch:
            force_layout(patch, layout)
            out, lse = run_forward(case)
            results.append(run_backward(case, out, lse, output_mask))
    for other in results[1:]:
        for actual, expected in zip(other, results[0], strict=True):
            torch.testing.assert_close(actual, expected)
