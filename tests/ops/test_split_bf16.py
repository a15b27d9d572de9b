"""Split-bf16 linear layers: rounding errors against fp64, layouts, special values and opcheck."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck

from beit_fast.ops.cpu_linear import split_bf16

from ..support.oracle import assert_within_budget, relative_error

needs_tiles = pytest.mark.skipif(
    split_bf16.unsupported_reason() is not None, reason=f"{split_bf16.unsupported_reason()}"
)

LAYOUTS = {
    "rows": lambda x: x,
    "slice of wider rows": lambda x: torch.cat([x, x, x], -1)[..., x.shape[-1] : 2 * x.shape[-1]],
    "transposed": lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
    "every second number": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "offset": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
}
PRODUCT_ERROR = {2: 3 * 2**-16, 3: 2**-23}
"""Largest relative error of one product, see `test_linear_of_two_terms_is_within_error_bound`.

With three terms, the sum omits two products of at most 2**-8 * 2**-16 each and a far smaller one.
"""


def make(rows, depth, columns, seed=0):
    """Draw x, weight, bias and residual; results do not grow with depth."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (rows, depth), (columns, depth), (columns,), (rows, columns)
    x, weight, bias, residual = (torch.randn(*shape, generator=generator) for shape in shapes)
    return x, weight / max(1, depth) ** 0.5, bias, residual


def plain(x, weight, bias=None, residual=None, gelu=False):
    """Compute the linear layer in the precision of its arguments."""
    out = F.linear(x, weight, bias)
    out = F.gelu(out) if gelu else out
    return out if residual is None else out + residual


def in_fp64(*tensors):
    return [x if x is None else x.double() for x in tensors]


@needs_tiles
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize(("depth", "columns"), [(768, 2304), (768, 768), (3072, 768), (1000, 33)])
@pytest.mark.parametrize("rows", [1, 197, 300])
def test_linear_of_three_terms_is_as_exact_as_fp32(rows, depth, columns, gelu):
    given = make(rows, depth, columns)
    x, weight, bias, residual = given
    result = split_bf16.linear(x, split_bf16.pack(weight, 3), columns, 3, bias, residual, gelu=gelu)
    assert_within_budget("result", result, plain(*in_fp64(*given), gelu), plain(*given, gelu), 2)


@needs_tiles
@pytest.mark.parametrize(("depth", "columns"), [(768, 2304), (768, 768), (3072, 768), (1000, 33)])
@pytest.mark.parametrize("rows", [1, 197, 300])
def test_linear_of_two_terms_is_within_error_bound(rows, depth, columns):
    """Two bf16 terms give an expected relative error of 2**-18.

    For a in [1, 2), the first term leaves a remainder r1, uniform between -2**-8 and 2**-8. The second term leaves r2,
    uniform within half a unit in the last place of r1. That unit is 2**-16 for the upper half of all r1, 2**-17 for a
    quarter, and so on. The root mean square (RMS) of r2 is then 2**-16 * sqrt(4 / 7 / 12) = 2**-18.2.
    A product a * b omits a times r2 of b, b times r2 of a, and r1 of a times r1 of b. The RMS of each r1 is 2**-8.8.
    Divided by the RMS of a, 2**0.6, each omitted term is 2**-18.8 of the product, and all three are 2**-18.
    Sums of many products have the same ratio; the test allows 2**-17.
    Each omitted term is at most 2**-16 of the product, and all three at most 3 * 2**-16.
    """
    x, weight, _, _ = make(rows, depth, columns)
    result = split_bf16.linear(x, split_bf16.pack(weight, 2), columns, 2)
    error = relative_error(result, F.linear(x.double(), weight.double()))
    assert 2**-20 < error <= 2**-17


@st.composite
def drawn_calls(draw):
    sizes = st.integers(1, 40) | st.sampled_from([63, 64, 65, 96, 127, 130])
    depth = draw(sizes | st.sampled_from([895, 896, 897, 928, 1800]))
    return {
        "given": make(draw(sizes | st.just(270)), depth, draw(sizes), seed=draw(st.integers(0, 2**31))),
        "terms": draw(st.sampled_from([2, 3])),
        "layouts": draw(st.tuples(st.sampled_from(list(LAYOUTS)), st.sampled_from(list(LAYOUTS)))),
        "transposed": draw(st.booleans()),
        "absent": draw(st.sets(st.sampled_from(["bias", "residual"]))),
        "gelu": draw(st.booleans()),
    }


@needs_tiles
@given(drawn_calls())
@settings(max_examples=200, deadline=None)
def test_linear_drawn_calls_are_within_error_bound(call):
    """Bound each error by the omitted products and the rounding of fp32 sums.

    The slope of GELU is at most 1.13, and its own error at most 4 units in the last place.
    """
    x, weight, bias, residual = call["given"]
    bias = None if "bias" in call["absent"] else bias
    residual = None if "residual" in call["absent"] else residual
    x_view, weight_view = LAYOUTS[call["layouts"][0]](x), LAYOUTS[call["layouts"][1]](weight)
    packed = split_bf16.pack(
        weight_view.t() if call["transposed"] else weight_view, call["terms"], transposed=call["transposed"]
    )
    result = split_bf16.linear(x_view, packed, len(weight), call["terms"], bias, residual, gelu=call["gelu"])

    exact = in_fp64(x, weight, bias, residual)
    sums = plain(*(y if y is None else y.abs() for y in exact))
    eps = torch.finfo(torch.float32).eps
    allowed = 1.13 * (PRODUCT_ERROR[call["terms"]] + (x.shape[1] + 4) * eps) * sums + 4 * eps * sums
    assert ((result.double() - plain(*exact, call["gelu"])).abs() <= allowed).all()
    assert result.is_contiguous()


@needs_tiles
def test_linear_gelu_over_whole_range_is_as_exact_as_fp32():
    """A weight of 1 isolates the error of GELU."""
    x = torch.cat(
        [torch.linspace(-30, 30, 200_001), torch.randn(50_000) * 1e-3, torch.tensor([0.0, -0.0, 1e30, -1e30])]
    )
    result = split_bf16.linear(x[:, None], split_bf16.pack(torch.ones(1, 1), 3), 1, 3, gelu=True)[:, 0]
    exact = F.gelu(x.double())
    error, usual = (result.double() - exact).abs(), (F.gelu(x).double() - exact).abs()
    eps = torch.finfo(torch.float32).eps
    above = (x > -1) & (x != 0)
    assert (error / exact.abs())[above].max() <= 2 * (usual / exact.abs())[above].max() + 4 * eps
    assert (error == 0)[x == 0].all()
    assert (error <= eps)[x <= -1].all()
    assert (error <= 2**-16 * eps)[x <= -5.5].all()
    assert relative_error(result[:-2], exact[:-2]) <= relative_error(F.gelu(x)[:-2], exact[:-2]) * 2
    assert (
        split_bf16.linear(torch.tensor([[torch.nan]]), split_bf16.pack(torch.ones(1, 1), 3), 1, 3, gelu=True)
        .isnan()
        .all()
    )


@needs_tiles
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("terms", [2, 3])
def test_linear_of_any_layout_returns_same_bits(terms, layout):
    x, weight, bias, residual = make(3 * 67, 72, 40)
    packed = split_bf16.pack(weight, terms)
    expected = split_bf16.linear(x, packed, 40, terms, bias, residual)
    assert torch.equal(split_bf16.pack(LAYOUTS[layout](weight), terms), packed)
    assert torch.equal(split_bf16.pack(LAYOUTS[layout](weight.t()), terms, transposed=True), packed)
    assert torch.equal(
        split_bf16.linear(LAYOUTS[layout](x), packed, 40, terms, bias, LAYOUTS[layout](residual)), expected
    )
    result = split_bf16.linear(LAYOUTS[layout](x.view(3, 67, 72)), packed, 40, terms, bias, residual.view(3, 67, 40))
    assert torch.equal(result.flatten(0, 1), expected)
    uneven = LAYOUTS[layout](x.view(3, 67, 72))[:, 1:]
    assert torch.equal(
        split_bf16.linear(uneven, packed, 40, terms), split_bf16.linear(uneven.clone(), packed, 40, terms)
    )


@needs_tiles
def test_linear_expanded_and_single_rows_return_same_bits():
    x, weight, bias, _ = make(1, 72, 40)
    packed = split_bf16.pack(weight, 3)
    row = split_bf16.linear(x, packed, 40, 3, bias[:1].expand(40))
    assert torch.equal(split_bf16.linear(x[0], packed, 40, 3, bias[:1].expand(40)), row[0])
    assert torch.equal(
        split_bf16.linear(x.expand(50, 72), packed, 40, 3, bias[:1].expand(40), row.expand(50, 40)),
        2 * row.expand(50, 40),
    )
    far = x.as_strided((1, 72), (2**62, 1))  # one row, whose stride is never used
    assert torch.equal(
        split_bf16.linear(far, packed, 40, 3, bias[:1].expand(40), row.as_strided((1, 40), (2**62, 1))), 2 * row
    )
    assert torch.equal(split_bf16.pack(far, 3), split_bf16.pack(x, 3))


@needs_tiles
@pytest.mark.parametrize("terms", [2, 3])
@pytest.mark.parametrize(("rows", "depth"), [(37, 1000), (270, 96), (700, 64), (1100, 1000)])
def test_linear_bits_are_independent_of_threads_and_rows(rows, depth, terms):
    x, weight, bias, residual = make(rows, depth, 100)
    packed = split_bf16.pack(weight, terms)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        try:
            assert torch.equal(split_bf16.pack(weight, terms), packed)
            results.append(split_bf16.linear(x, packed, 100, terms, bias, residual, gelu=True))
        finally:
            torch.set_num_threads(1)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    few = split_bf16.linear(x[-21:], packed, 100, terms, bias, residual[-21:], gelu=True)
    assert torch.equal(few, results[0][-21:])
    columns = split_bf16.linear(
        x, split_bf16.pack(weight[64:], terms), 36, terms, bias[64:], residual[:, 64:], gelu=True
    )
    assert torch.equal(columns, results[0][:, 64:])


@needs_tiles
@pytest.mark.parametrize("terms", [2, 3])
def test_linear_of_empty_tensors_returns_empty(terms):
    x, weight, bias, residual = make(5, 40, 33)
    assert split_bf16.linear(x[:0], split_bf16.pack(weight, terms), 33, terms, bias).shape == (0, 33)
    assert split_bf16.linear(x, split_bf16.pack(weight[:0], terms), 0, terms, bias[:0]).shape == (5, 0)
    nothing = split_bf16.linear(x[:, :0], split_bf16.pack(weight[:, :0], terms), 33, terms, bias, residual)
    assert torch.equal(nothing, bias + residual)
    assert split_bf16.linear(torch.empty(2, 0, 40), split_bf16.pack(weight, terms), 33, terms).shape == (2, 0, 33)


@needs_tiles
@pytest.mark.parametrize("terms", [2, 3])
def test_linear_writes_every_number(terms):
    """Deterministic mode fills new memory with NaN."""
    given = make(37, 50, 45)
    torch.use_deterministic_algorithms(True)
    try:
        result = split_bf16.linear(given[0], split_bf16.pack(given[1], terms), 45, terms)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.isfinite(result).all()


@needs_tiles
@pytest.mark.parametrize("terms", [2, 3])
@pytest.mark.parametrize("bits", [0x7FC00000, 0x7F800001, 0x7FFFFFFF, -1, -0x3FFFFF])
def test_linear_with_nan_keeps_it_in_row_or_column(bits, terms):
    x, weight, _, _ = make(40, 70, 50)
    clean = split_bf16.linear(x, split_bf16.pack(weight, terms), 50, terms)
    nan = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    x[17, 33] = nan
    weight[35, 69] = nan
    result = split_bf16.linear(x, split_bf16.pack(weight, terms), 50, terms, gelu=False)
    expected = torch.zeros(40, 50, dtype=torch.bool)
    expected[17] = expected[:, 35] = True
    assert torch.equal(result.isnan(), expected)
    assert torch.equal(result[~expected], clean[~expected])


@needs_tiles
@pytest.mark.parametrize("terms", [2, 3])
def test_linear_of_infinities_returns_nan(terms):
    for number in (torch.inf, -torch.inf, torch.finfo(torch.float32).max):
        x, weight, _, _ = make(4, 40, 6)
        x[2, 5] = number
        result = split_bf16.linear(x, split_bf16.pack(weight, terms), 6, terms)
        assert result[2].isnan().all()
        assert torch.isfinite(result[[0, 1, 3]]).all()


@needs_tiles
@pytest.mark.parametrize("terms", [2, 3])
def test_linear_at_ends_of_range_loses_last_bits(terms):
    """Inputs up to 3.396e38 are accurate.

    They lose last bits below 2**-110, and are 0 below 2**-126.
    """
    one = split_bf16.pack(torch.ones(1, 1), terms)
    accuracy = {2: 2**-16, 3: 0.0}[terms]
    numbers = torch.tensor([3.396e38, -3.396e38, 1.2345678e-32, 1.2345678]).double()
    result = split_bf16.linear(numbers.float()[:, None], one, 1, terms)[:, 0].double()
    assert ((result - numbers.float()).abs() <= accuracy * numbers.abs()).all()
    assert split_bf16.linear(torch.tensor([[2.0**-127]]), one, 1, terms).item() == 0.0
    small = torch.tensor([[1.2345678e-37]])
    assert split_bf16.linear(small, one, 1, terms).item() == pytest.approx(small.item(), rel=2**-7)
    large = torch.tensor([[1e30]])
    assert not torch.isfinite(split_bf16.linear(large, split_bf16.pack(large, terms), 1, terms))


@needs_tiles
@pytest.mark.parametrize("terms", [2, 3])
def test_split_bf16_opcheck_passes(terms):
    x, weight, bias, residual = make(37, 50, 45)
    for transposed in (False, True):
        opcheck(split_bf16.pack_op, (weight.t() if transposed else weight, transposed, terms))
    packed = split_bf16.pack(weight, terms)
    opcheck(split_bf16.linear_op, (x, packed, 45, terms, None, None, False))
    opcheck(split_bf16.linear_op, (x.view(1, 37, 50), packed, 45, terms, bias, residual.view(1, 37, 45), True))


@needs_tiles
def test_linear_gradients_are_within_budget():
    """dX = dY W and dW = dY^T X are packed without a transposed copy."""
    x, weight, _, grad = make(130, 70, 90)
    wanted = [grad.double() @ weight.double(), grad.double().t() @ x.double()]
    eager = [grad @ weight, grad.t() @ x]
    results = [
        split_bf16.linear(grad, split_bf16.pack(weight, 3, transposed=True), 70, 3),
        split_bf16.linear(grad.t(), split_bf16.pack(x, 3, transposed=True), 70, 3),
    ]
    for name, result, exact, usual in zip(("dX", "dW"), results, wanted, eager, strict=True):
        assert_within_budget(name, result, exact, usual, 2)


@needs_tiles
@pytest.mark.parametrize("terms", [2, 3])
@pytest.mark.parametrize("transposed", [False, True])
def test_matmul_returns_bits_of_packed_linear(terms, transposed):
    """Sizes grow and shrink, so that cached memory is replaced and reused."""
    for rows, depth, columns in ((5, 40, 33), (3, 7, 2), (70, 96, 100), (0, 8, 4), (4, 0, 4), (6, 9, 0)):
        x = torch.randn(2, rows, depth)
        matrix = torch.randn(depth, columns).t() if transposed else torch.randn(columns, depth)
        bias = torch.randn(columns)
        expected = split_bf16.linear(x, split_bf16.pack(matrix, terms), columns, terms, bias)
        assert torch.equal(split_bf16.matmul(x, matrix, terms, bias), expected)
        opcheck(split_bf16.matmul_op, (x, matrix, terms, bias))
