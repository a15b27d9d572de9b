"""Timing of single attention kernels, on Triton's interpreter and by a fake clock."""

from __future__ import annotations

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("runs kernels in Triton's interpreter: set TRITON_INTERPRET=1", allow_module_level=True)

from beit_fast.kernels.attention import launch
from beit_fast.tuning.tune_jobs import Shape
from benchmarks import bench_attention_parts
from benchmarks.harness.session import Session
from benchmarks.report.terminal import tables

SHAPE = Shape((2, 3), 1, torch.float32, heads=1, head_dim=16)


class TickingClock:
    """A clock that advances by a second at every reading."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now

    def plan(self, step: object) -> tuple[int, int]:
        return 1, 1


def test_time_parts_adds_a_row_for_each_kernel_with_and_without_bias() -> None:
    session = Session({})
    bench_attention_parts.time_parts(SHAPE, torch.device("cpu"), TickingClock(), session, rounds=2)
    parts = {(row["part"], row["biased"]): row for row in session.rows}
    backward = {"backward_dkv", "backward_dq", "backward"}
    assert {part for part, biased in parts if not biased} == {"forward", *backward}
    assert {part for part, biased in parts if biased} == {"forward", "backward_dbias", *backward}
    assert all(row["median"] == 1.0 for row in session.rows)
    assert parts["backward_dkv", True]["errors"].keys() == {"dk", "dv"}
    assert parts["backward", False]["errors"].keys() == {"dq", "dk", "dv"}
    (lines,) = tables(session.rows).values()
    assert len(lines) == 1 + len(session.rows)


def test_time_parts_wrong_kernel_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    original = launch.attention_backward

    def wrong(*arguments: object) -> list[torch.Tensor]:
        return [1.1 * gradient for gradient in original(*arguments)]

    monkeypatch.setattr(launch, "attention_backward", wrong)
    session = Session({})
    with pytest.raises(ValueError, match=r"backward_dkv of .* is wrong and not timed: dk"):
        bench_attention_parts.time_parts(SHAPE, torch.device("cpu"), TickingClock(), session, rounds=1)
    assert session.rows == []
