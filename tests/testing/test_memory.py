"""Peak memory of a call on a CUDA device."""

from __future__ import annotations

import pytest
import torch

from beit_fast.testing import peak_memory

MIB = 1 << 20


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_peak_memory_of_another_device_raises_before_the_call(device: str) -> None:
    calls: list[int] = []
    with pytest.raises(ValueError, match=f"device type '{device}' is not supported \\(expected cuda\\)"):
        peak_memory(lambda: calls.append(1), device)
    assert calls == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")
def test_peak_memory_on_cuda_is_exact() -> None:
    assert peak_memory(lambda: torch.ones(64 * MIB // 4, device="cuda"), "cuda") == 64 * MIB
