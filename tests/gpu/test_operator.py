"""Attention operators on CUDA: opcheck, autocast, `torch.compile`, errors."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

import beit_fast

from ..kernels.cases import assert_same_bits, make_case
from .calls import attend, attend_and_differentiate, leaves_of

attention_op = torch.ops.beit_fast.rel_pos_attention.default
backward_op = torch.ops.beit_fast.rel_pos_attention_backward.default


@pytest.mark.parametrize("masked", [False, True])
def test_attention_opcheck_passes(masked: bool) -> None:
    case = make_case((2, 3), head_dim=16)
    key_mask = torch.rand(case.query.shape[:2], device=case.query.device) > 0.3 if masked else None
    q, k, v, table = leaves_of(case)
    opcheck(attention_op, (q, k, v, table, key_mask, case.window, case.scale, 0.1, 4))
    opcheck(attention_op, (q, k, v, None, key_mask, (1, 1), case.scale))


@pytest.mark.parametrize("wanted", [[True] * 4, [False, False, False, True], [True, False, True, False]])
def test_attention_backward_opcheck_passes(wanted: list[bool]) -> None:
    case = make_case((2, 3), head_dim=16)
    inputs = (case.query, case.key, case.value, case.table, None)
    out, lse = attention_op(*inputs, case.window, case.scale)
    opcheck(backward_op, (case.grad_out, *inputs, out, lse, case.window, case.scale, 0.0, 0, wanted))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_attention_autocast_casts_projections_and_not_table(dtype: torch.dtype) -> None:
    case = make_case((5, 7))
    leaves = leaves_of(case)
    with torch.autocast("cuda", dtype=dtype):
        out = attend(case, leaves)
    assert out.dtype == dtype
    low = [*(leaf.detach().to(dtype) for leaf in leaves[:3]), leaves[3].detach()]
    assert torch.equal(out, attend(case, low))
    gradients = torch.autograd.grad(out, leaves, case.grad_out.to(dtype))
    assert [gradient.dtype for gradient in gradients] == [torch.float32] * 4


@pytest.mark.parametrize("window", [(7, 9), None])
def test_attention_compile_fullgraph_with_dynamic_batch(window: tuple[int, int] | None) -> None:
    torch.compiler.reset()
    compiled = torch.compile(beit_fast.rel_pos_attention, fullgraph=True)
    stance = "default"
    for batch in (4, 7, 2):
        case = make_case(window, torch.bfloat16, batch=batch, tokens=64, head_dim=64)
        leaves = leaves_of(case)
        for leaf in leaves[:3]:
            torch._dynamo.mark_dynamic(leaf, 0)
        with torch.compiler.set_stance(stance):
            actual = attend_and_differentiate(case, leaves, compiled)
        assert_same_bits(actual, attend_and_differentiate(case))
        stance = "fail_on_recompile"


def test_attention_tensors_on_two_devices_raise() -> None:
    case = make_case((2, 3))
    assert case.table is not None
    with pytest.raises(ValueError, match="all tensors must be on one device") as error:
        beit_fast.rel_pos_attention(case.query, case.key, case.value, case.table.cpu(), case.window)
    assert "on cuda" in str(error.value)
    assert "on cpu" in str(error.value)
