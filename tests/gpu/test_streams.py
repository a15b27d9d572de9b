"""Streams, CUDA graphs and a second device.

A long kernel delays one stream, so that work on the wrong stream reads wrong values. The tests do not read a clock.
Bugs elsewhere: pytorch/pytorch#157363, thu-ml/SageAttention#371, triton-lang/triton#2441.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ..kernels.cases import Case, assert_same_bits, bitwise_equal, make_case
from .calls import LONG, attend_and_differentiate, leaves_of


def masked_case(window: tuple[int, int] | None = (7, 9)) -> Case:
    mask = torch.rand(2, 64, generator=torch.Generator().manual_seed(2)) > 0.3
    return make_case(window, torch.bfloat16, tokens=64, heads=3, head_dim=64, key_mask=mask, dropout_p=0.1, seed=7)


def negated(case: Case) -> Case:
    """Negate the values of the case."""
    opposite = case.map_rows(Tensor.neg)
    return opposite if case.table is None else replace(opposite, table=-case.table)


def overwrite(case: Case, leaves: list[Tensor], source: Case) -> None:
    """Copy the values of `source` into `case` and `leaves`, on the current stream."""
    with torch.no_grad():
        for leaf, other in zip(leaves, leaves_of(source), strict=True):
            leaf.copy_(other)
        case.grad_out.copy_(source.grad_out)


def test_attention_side_stream_does_not_wait_for_default_stream() -> None:
    case = masked_case()
    leaves, expected = leaves_of(case), attend_and_differentiate(case)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        attend_and_differentiate(negated(case))  # fills reused memory with wrong values
    torch.cuda.synchronize()
    torch.cuda._sleep(LONG)
    with torch.cuda.stream(side):
        actual = attend_and_differentiate(case, leaves)
        same = [bitwise_equal(left, right) for left, right in zip(actual, expected, strict=True)]
    torch.cuda.synchronize()
    assert all(same)


def test_attention_side_stream_waits_for_its_inputs() -> None:
    case = masked_case()
    other = negated(case)
    leaves, expected = leaves_of(case), attend_and_differentiate(other)
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(LONG)
        overwrite(case, leaves, other)
        actual = attend_and_differentiate(case, leaves)
    torch.cuda.synchronize()
    assert_same_bits(actual, expected)


@pytest.mark.parametrize("window", [(7, 9), None])
def test_attention_captured_graph_uses_new_inputs(window: tuple[int, int] | None) -> None:
    case = masked_case(window)
    leaves = leaves_of(case)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        attend_and_differentiate(case, leaves)  # compiles the kernels, which is not possible during capture
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = attend_and_differentiate(case, leaves)

    for source in (masked_case(window), negated(case), masked_case(window).map_rows(lambda tensor: tensor.flip(1))):
        overwrite(case, leaves, source)
        for result in results:
            result.fill_(float("nan"))
        graph.replay()
        assert_same_bits(results, attend_and_differentiate(source))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_attention_other_device_runs_there() -> None:
    """Triton launches on the current device: triton-lang/triton#2441, state-spaces/mamba#593."""
    case = masked_case()
    expected = attend_and_differentiate(case)
    other = torch.device("cuda", 1 - torch.cuda.current_device())
    moved = replace(case, **{name: tensor.to(other) for name, tensor in case.tensors().items()})
    actual = attend_and_differentiate(moved)
    assert all(tensor.device == other for tensor in actual)
    if torch.cuda.get_device_capability(other) == torch.cuda.get_device_capability():
        assert_same_bits([tensor.to(case.query.device) for tensor in actual], expected)
