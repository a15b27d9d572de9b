"""Latency of a call."""

from __future__ import annotations

import time

import pytest
import torch

from beit_fast.testing import timing


@pytest.mark.parametrize(("repeats", "warmup"), [(9, 4), (1, 0)])
def test_latency_times_each_call_after_the_warmup(repeats: int, warmup: int) -> None:
    calls: list[int] = []
    result = timing.latency(lambda: calls.append(1), repeats=repeats, warmup=warmup)
    assert len(calls) == repeats + warmup
    assert len(result.times) == repeats
    assert min(result.times) <= result.median <= max(result.times)


def test_latency_covers_whole_call() -> None:
    assert 0.01 <= timing.latency(lambda: time.sleep(0.01), repeats=3, warmup=0).median < 1


@pytest.mark.parametrize("wrong", [{"repeats": 0}, {"warmup": -1}])
def test_latency_invalid_counts_raise(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"repeats >= 1 and warmup >= 0, got repeats=.*, warmup="):
        timing.latency(lambda: None, **wrong)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")
def test_latency_on_cuda_is_positive() -> None:
    result = timing.latency(lambda: torch.ones(16 << 20, device="cuda"), "cuda", repeats=5)
    assert 0 < result.median < 1
