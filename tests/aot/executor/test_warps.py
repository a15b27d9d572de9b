"""Shuffles, votes, reductions and elections."""

from __future__ import annotations

import pytest

from beit_fast.kernels.aot.executor.errors import UnsupportedInstructionError

from ...support.executor import stored

LANE = "mov.u32 %r1, %laneid;"


@pytest.mark.parametrize(
    ("operands", "expected"),
    [
        ("bfly.b32 %r8, %r1, 5, 31", [lane ^ 5 for lane in range(32)]),
        ("idx.b32 %r8, %r1, 7, 31", [7] * 32),
        ("up.b32 %r8, %r1, 3, 0", [max(lane - 3, lane if lane < 3 else 0) for lane in range(32)]),
        ("down.b32 %r8, %r1, 3, 31", [lane + 3 if lane < 29 else lane for lane in range(32)]),
        (
            "bfly.b32 %r8, %r1, 16, 0x101f",
            [lane ^ 16 if lane ^ 16 <= 31 and lane >= 16 else lane for lane in range(32)],
        ),
        ("idx.b32 %r8, %r1, 2, 0x181f", [lane // 8 * 8 + 2 for lane in range(32)]),
    ],
)
def test_shuffle_reads_the_lane_of_the_ptx_isa(operands: str, expected: list[int]) -> None:
    assert stored(LANE + f"shfl.sync.{operands}, -1;") == expected


def test_shuffle_predicate_says_whether_the_lane_is_in_range() -> None:
    body = LANE + "shfl.sync.down.b32 %r2|%p1, %r1, 3, 31, 0xffffffff; selp.b32 %r8, 1, 0, %p1;"
    assert stored(body) == [int(lane < 29) for lane in range(32)]


def test_shuffle_with_a_lane_for_each_thread() -> None:
    body = LANE + "sub.s32 %r2, 31, %r1; shfl.sync.idx.b32 %r8, %r1, %r2, 31, -1;"
    assert stored(body) == [31 - lane for lane in range(32)]


@pytest.mark.parametrize(
    ("name", "expected"),
    [("add.s32", sum(range(32))), ("max.u32", 31), ("min.s32", 0), ("xor.b32", 0), ("or.b32", 31)],
)
def test_reduction_over_a_warp(name: str, expected: int) -> None:
    assert stored(LANE + f"redux.sync.{name} %r8, %r1, 0xffffffff;", threads=64) == [expected] * 64


def test_vote_and_election() -> None:
    body = LANE + "setp.lt.u32 %p1, %r1, 3;"
    assert set(stored(body + "vote.sync.ballot.b32 %r8, %p1, -1;")) == {7}
    assert set(stored(body + "vote.sync.any.pred %p2, %p1, -1; selp.b32 %r8, 1, 0, %p2;")) == {1}
    assert set(stored(body + "vote.sync.all.pred %p2, %p1, -1; selp.b32 %r8, 1, 0, %p2;")) == {0}
    elected = stored(LANE + "elect.sync %r2|%p1, -1; selp.b32 %r8, 1, 0, %p1;", threads=64)
    assert [thread for thread, value in enumerate(elected) if value] == [0, 32]


def test_some_members_of_a_warp_are_not_supported() -> None:
    with pytest.raises(UnsupportedInstructionError, match="members"):
        stored(LANE + "shfl.sync.bfly.b32 %r8, %r1, 5, 31, 0xffff;")


def test_special_registers_of_three_dimensions() -> None:
    names = ("tid.x", "ntid.x", "ctaid.x", "nctaid.x", "ctaid.y", "nctaid.z")
    for name, expected in zip(names, ([*range(32)], [32] * 32, [0] * 32, [1] * 32, [0] * 32, [1] * 32), strict=True):
        assert stored(f"mov.u32 %r8, %{name};") == expected
