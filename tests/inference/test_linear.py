"""Linear layers of an optimized model."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beit_fast.inference import linear
from beit_fast.inference.folding import Affine
from beit_fast.inference.linear import GeluLinear


@pytest.mark.parametrize("lacks", [False, True])
def test_gelu_linear_calls_the_kernel_where_it_has_matrix_instructions(
    lacks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def kernel(*arguments: Any) -> Tensor:
        calls.append(arguments)
        return F.gelu(F.linear(*arguments))

    monkeypatch.setattr(linear, "linear_gelu", kernel)
    monkeypatch.setattr(linear, "lacks_matrix_instructions", lambda device_type, dtype: lacks)
    x, weight, bias = torch.randn(5, 6), torch.randn(7, 6), torch.randn(7)
    out = GeluLinear(Affine(weight, bias), nn.GELU())(x)
    torch.testing.assert_close(out, F.gelu(x @ weight.T + bias))
    assert len(calls) == (not lacks)
