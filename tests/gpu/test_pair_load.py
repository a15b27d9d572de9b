"""Vector loads of the bias against `tl.load` of the same addresses.

Vector loads rely on the register layout of the compiler.
"""

from __future__ import annotations

import pytest
import torch

from beit_fast.kernels.attention import configs
from beit_fast.kernels.common import gpu
from beit_fast.kernels.common.device import architecture_of

from ..kernels.cases import bitwise_equal, make_case, run_backward, run_forward
from ..support.cases import GRADIENT_NAMES

WINDOWS = [(14, 14), (24, 24), (1, 2), (7, 10), (5, 64), (15, 15), (1, 7), (31, 33)]


@pytest.mark.parametrize("head_dim", [16, 32, 64, 80, 128])
@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("layout", ["default", "extended"])
def test_attention_vector_loads_equal_plain_loads(
    layout: str, window: tuple[int, int], head_dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both compile to the same operations, so the results have equal bits."""
    case = make_case(window, torch.bfloat16, batch=2, heads=3, head_dim=head_dim)
    layout_of_window = configs.bias_layout(architecture_of(case.query), 2, window)
    if layout == "extended":
        layout_of_window = configs.BiasLayout("extended", 1)
    assert layout_of_window.vector > 0
    results = []
    for vector in (layout_of_window.vector, 0):
        with monkeypatch.context() as patch:
            patch.setattr(
                configs, "bias_layout", lambda *_, vector=vector: configs.BiasLayout(layout_of_window.name, vector)
            )
            out, lse = run_forward(case)
            results.append((out, lse, *run_backward(case, out, lse)))
    for name, vectors, plain in zip(("out", "lse", *GRADIENT_NAMES), *results, strict=True):
        assert bitwise_equal(vectors, plain), (
            f"{name}: {(vectors.double() - plain.double()).abs().max():.3e} difference"
        )


def test_bias_layout_tested_windows_cover_shipped_vectors() -> None:
    architecture = architecture_of(make_case((2, 2)).query)
    vectors = {configs.bias_layout(architecture, 2, window).vector for window in WINDOWS}
    assert vectors == ({2, 1} if architecture == gpu.SM100 else {4, 1})
