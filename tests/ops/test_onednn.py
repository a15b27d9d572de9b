"""Packed linear layers of oneDNN: parity, errors and the startup check."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from beit_fast.cli import info
from beit_fast.ops.cpu_linear import onednn

from ..support.oracle import assert_within_budget, relative_error

SIZES = [(1, 768, 768), (197, 768, 2304), (788, 96, 33), (5, 7, 3), (300, 1, 1)]


def require(dtype: torch.dtype = torch.float32) -> None:
    reason = onednn.unsupported_reason("cpu", dtype)
    if reason is not None:
        pytest.skip(reason)


@pytest.fixture
def fresh_check():
    """Clear the cached check before and after a test that breaks an operator."""
    onednn._check.cache_clear()
    onednn._operators.cache_clear()
    yield
    onednn._check.cache_clear()
    onednn._operators.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", ["none", "gelu", "add"])
@pytest.mark.parametrize(("rows", "inner", "columns"), SIZES)
def test_packed_linear_is_as_exact_as_plain_linear(rows, inner, columns, form, dtype):
    require(dtype)
    x, weight, bias = torch.randn(rows, inner), torch.randn(columns, inner) / inner**0.5, torch.randn(columns)
    x, weight, bias, residual = (t.to(dtype) for t in (x, weight, bias, torch.randn(rows, columns)))

    def plain(kind):
        out = F.linear(x.to(kind), weight.to(kind), bias.to(kind))
        return {"none": lambda: out, "gelu": lambda: F.gelu(out), "add": lambda: out + residual.to(kind)}[form]()

    packed = onednn.pack(weight, rows)
    if form == "add":
        actual = onednn.packed_linear_add(x, packed, bias, residual)
    else:
        actual = onednn.packed_linear(x, packed, bias, form)
    assert actual.dtype == dtype
    assert_within_budget(form, actual, plain(torch.float64), plain(dtype), 2)


def test_packed_linear_accepts_any_rows_and_strides():
    require()
    weight = torch.randn(24, 40).t()  # [40, 24], not contiguous
    packed = onednn.pack(weight, 197)
    strided = [torch.randn(24, 9).t(), torch.randn(2, 5, 2, 24)[:, :, 1], torch.randn(1, 24).expand(6, 24)]
    for x in [*strided, *(torch.randn(shape) for shape in ((24,), (0, 24), (2, 0, 24), (1, 24), (3, 197, 24)))]:
        actual = onednn.packed_linear(x, packed, None)
        assert actual.shape == (*x.shape[:-1], 40)
        assert actual.is_contiguous()
        assert relative_error(actual, F.linear(x.double(), weight.double())) < 1e-6
    x, residual = torch.randn(2, 3, 24), torch.randn(2, 40, 3).transpose(1, 2)
    before = residual.clone()
    actual = onednn.packed_linear_add(x, packed, None, residual)
    assert relative_error(actual, F.linear(x.double(), weight.double()) + residual) < 1e-6
    assert torch.equal(residual, before)


def test_pack_copies_the_weight():
    require()
    for size in (1, 16, 64):
        weight, x = torch.ones(size, size), torch.ones(4, size)
        packed = onednn.pack(weight, 4)
        weight.zero_()
        assert torch.equal(onednn.packed_linear(x, packed, None), torch.full((4, size), float(size)))


def test_packed_linear_with_bad_arguments_raises_one_error():
    require()
    packed = onednn.pack(torch.randn(8, 4), 3)
    with pytest.raises(ValueError, match=r"\[8, 4\] cannot serve: x is \[3, 5\], not \[3, 4\]; bias is torch.float64"):
        onednn.packed_linear(torch.randn(3, 5), packed, torch.zeros(8, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"residual is \[1, 8\], not \[3, 8\]"):
        onednn.packed_linear_add(torch.randn(3, 4), packed, None, torch.randn(1, 8))
    with pytest.raises(ValueError, match=r"activation='relu' is not supported \(expected 'none' or 'gelu'\)"):
        onednn.packed_linear(torch.randn(3, 4), packed, None, "relu")
    with pytest.raises(ValueError, match=r"not empty, not of shape \[0, 4\]"):
        onednn.pack(torch.randn(0, 4), 3)
    with pytest.raises(RuntimeError, match="no derivative"):
        onednn.packed_linear(torch.randn(3, 4, requires_grad=True), packed, None)


@pytest.mark.filterwarnings("ignore:TF32 acceleration on top of oneDNN")  # a warning of `flags` about Intel GPUs
def test_unsupported_reason_names_device_dtype_and_switch():
    require()
    assert onednn.unsupported_reason("cuda", torch.float32) == "oneDNN serves cpu tensors, not cuda"
    assert "torch.float64 is not supported (expected float32" in onednn.unsupported_reason("cpu", torch.float64)
    with torch.backends.mkldnn.flags(enabled=False):
        assert "enabled is False" in onednn.unsupported_reason("cpu", torch.float32)
    with FlopCounterMode(display=False):
        assert "mode that intercepts" in onednn.unsupported_reason("cpu", torch.float32)
    assert onednn.unsupported_reason(torch.device("cpu"), torch.float32) is None


def test_check_is_independent_of_context(fresh_check):
    require()
    for surrounding in (torch.autocast("cpu"), torch.device("meta"), torch.inference_mode()):
        onednn._check.cache_clear()
        state = torch.get_rng_state()
        with surrounding:
            assert onednn.unsupported_reason("cpu", torch.float32) is None
        assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("broken", ["absent", "raises", "wrong", "NaN", "tanh"])
def test_failed_check_is_reported_by_info(fresh_check, monkeypatch, broken):
    require()
    onednn._check.cache_clear()
    pack, linear, add = onednn._operators()

    def replacement(x, packed, bias, name, scalars, algorithm):
        if broken == "raises":
            raise RuntimeError("could not create a primitive\nand more lines")
        algorithm = "tanh" if broken == "tanh" and name == "gelu" else algorithm
        out = linear(x, packed, bias, name, scalars, algorithm)
        return {"wrong": out.flip(-1), "NaN": out * float("nan")}.get(broken, out)

    def operators():
        if broken == "absent":
            raise AttributeError("'_OpNamespace' 'mkldnn' object has no attribute '_linear_pointwise'")
        return pack, replacement, add

    monkeypatch.setattr(onednn, "_operators", operators)
    reason = onednn.unsupported_reason("cpu", torch.float32)
    expected = {
        "absent": "no attribute '_linear_pointwise'",
        "raises": "cannot run in torch.float32: could not create a primitive",
        "tanh": "wrong in torch.float32: a linear with GELU",
    }
    assert reason.endswith(expected.get(broken, "wrong in torch.float32: a linear, a linear with GELU"))
    assert f"packed linear layers: no: {reason}" in info.format_facts(info.gather_facts()).splitlines()
    monkeypatch.undo()


def test_info_reports_packed_linears():
    require()
    assert "packed linear layers: oneDNN" in info.format_facts(info.gather_facts()).splitlines()
