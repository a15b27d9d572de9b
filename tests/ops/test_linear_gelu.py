"""Linear layer with GELU on CPU tensors: values, errors and registrations."""

from __future__ import annotations

import os

import pytest
import torch
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from beit_fast.ops.dispatch import availability
from beit_fast.ops.linear_gelu import lacks_matrix_instructions, linear_gelu
from beit_fast.tuning.selftest import fp32_precision

from ..support.linear_gelu import make_layer, plain

op = torch.ops.beit_fast.linear_gelu.default
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"), reason="tests/kernels has the interpreted kernel"
)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("biased", [False, True])
def test_linear_gelu_matches_two_operations(dtype: torch.dtype, biased: bool) -> None:
    x, weight, bias = make_layer((2, 5), 16, 24, dtype, biased=biased)
    for given in (x, x[:, 1:], x.transpose(0, 1)):
        out = linear_gelu(given, weight, bias)
        assert torch.equal(out, plain(given, weight, bias))
        assert out.is_contiguous()


@pytest.mark.parametrize("rows", [(), (3,), (0, 4), (2, 3, 4)])
def test_linear_gelu_opcheck_passes(rows: tuple[int, ...]) -> None:
    opcheck(op, make_layer(rows, 16, 24))
    opcheck(op, make_layer(rows, 16, 24, biased=False))


def test_linear_gelu_backward_raises() -> None:
    x, weight, bias = make_layer((3,), 16, 24)
    with pytest.raises(RuntimeError, match=r"for inference and has no gradient; train with nn\.Linear"):
        linear_gelu(x, weight.requires_grad_(), bias).sum().backward()
    with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError, match="forward-mode"):
        linear_gelu(torch.autograd.forward_ad.make_dual(x, x), weight.detach(), bias)


GOOD = {"x": {"size": (2, 5, 16)}, "weight": {"size": (24, 16)}, "bias": {"size": (24,)}}
BAD = {
    "inputs": ({"x": {"size": (2, 15)}}, "x has 15 inputs, weight takes 16"),
    "a number": ({"x": {"size": ()}}, "x must be [..., inputs] and weight [outputs, inputs]"),
    "weight rank": ({"weight": {"size": (16,)}}, "x must be [..., inputs] and weight [outputs, inputs]"),
    "bias size": ({"bias": {"size": (16,)}}, "bias must be [outputs] = [24]"),
    "bias rank": ({"bias": {"size": (1, 24)}}, "bias must be [outputs] = [24]"),
    "weight dtype": ({"weight": {"dtype": torch.bfloat16}}, "one floating-point dtype"),
    "bias dtype": ({"bias": {"dtype": torch.float64}}, "one floating-point dtype"),
    "integers": ({name: {"dtype": torch.int64} for name in GOOD}, "one floating-point dtype"),
    "weight device": ({"weight": {"device": "meta"}}, "all tensors must be on one device"),
}


@pytest.mark.parametrize("what", BAD)
def test_linear_gelu_bad_arguments_raise_with_reason(what: str) -> None:
    changes, reason = BAD[what]
    layer = [torch.zeros(**(given | changes.get(name, {}))) for name, given in GOOD.items()]
    with pytest.raises(ValueError, match="beit_fast::linear_gelu cannot serve x ") as error:
        linear_gelu(*layer)
    assert reason in str(error.value)


def test_linear_gelu_bad_arguments_raise_with_every_reason() -> None:
    with pytest.raises(ValueError, match="linear_gelu cannot serve") as error:
        linear_gelu(torch.zeros(2, 15), torch.zeros(24, 16).half(), torch.zeros(16))
    assert str(error.value).count(";") == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_linear_gelu_autocast_casts_all_arguments(dtype: torch.dtype) -> None:
    layer = make_layer((3,), 16, 24)
    with torch.autocast("cpu", dtype=dtype):
        out = linear_gelu(*layer)
        assert torch.equal(out, plain(*layer))
    assert out.dtype == dtype


@pytest.mark.parametrize("in_dims", [(0, None, None), (1, None, None), (None, 0, None), (0, 0, 0), (None, None, 0)])
def test_linear_gelu_vmap_matches_two_operations(in_dims: tuple[int | None, ...]) -> None:
    x, weight, bias = make_layer((4,), 16, 24)
    layer = [
        tensor if dim is None else torch.stack([tensor, -tensor, 2 * tensor], dim)
        for tensor, dim in zip((x, weight, bias), in_dims, strict=True)
    ]
    actual, expected = (torch.vmap(function, in_dims)(*layer) for function in (linear_gelu, plain))
    torch.testing.assert_close(actual, expected)


def test_linear_gelu_compiles_with_any_rows() -> None:
    torch.compiler.reset()
    compiled = torch.compile(linear_gelu, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (3, 5):
        layer = make_layer((rows,), 16, 24)
        assert torch.equal(compiled(*layer), plain(*layer))


def test_linear_gelu_flops_are_those_of_matmul() -> None:
    layer = make_layer((2, 5), 16, 24)
    with FlopCounterMode(display=False) as counter:
        linear_gelu(*layer)
    assert counter.get_total_flops() == 2 * 2 * 5 * 16 * 24


def test_linear_gelu_unsupported_reasons() -> None:
    reasons = availability.linear_gelu_unsupported_reasons(torch.device("cpu"), torch.float64, 2**24)
    assert len(reasons) == 3
    assert "serves cuda tensors, not cpu" in reasons


@pytest.mark.parametrize(
    ("device_type", "dtype", "precision", "lacks"),
    [
        ("cuda", torch.float32, "ieee", True),
        ("cuda", torch.float32, "tf32", False),
        ("cuda", torch.bfloat16, "ieee", False),
        ("cpu", torch.float32, "ieee", False),
    ],
)
def test_lacks_matrix_instructions_of_full_fp32_on_cuda_alone(
    device_type: str, dtype: torch.dtype, precision: str, lacks: bool
) -> None:
    with fp32_precision(precision):
        assert lacks_matrix_instructions(device_type, dtype) is lacks
