"""Latency of a call."""

from __future__ import annotations

import pytest
import torch

from beit_fast.testing import timing


def test_latency_calls_warmup_and_repeats_and_orders_its_numbers() -> None:
    calls: list[int] = []
    result = timing.latency(lambda: calls.append(1), repeats=9, warmup=4)
    assert len(calls) == 13
    assert len(result.times) == 9
    first, third = result.quartiles
    assert min(result.times) <= first <= result.median <= third <= max(result.times)


def test_latency_of_one_repeat_is_that_time() -> None:
    result = timing.latency(lambda: None, repeats=1, warmup=0)
    assert result.quartiles == (result.median, result.median)
    assert result.times == (result.median,)


@pytest.mark.parametrize("wrong", [{"repeats": 0}, {"warmup": -1}])
def test_latency_refuses_what_it_cannot_measure(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"repeats >= 1 and warmup >= 0, got repeats=.*, warmup="):
        timing.latency(lambda: None, **wrong)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")
def test_latency_on_cuda_is_positive() -> None:
    result = timing.latency(lambda: torch.ones(16 << 20, device="cuda"), "cuda", repeats=5)
    assert 0 < result.median < 1
