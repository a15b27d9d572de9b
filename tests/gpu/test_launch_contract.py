"""Every launch on a GPU: streams, CUDA graphs, synchronization, repetition, devices, strides.

A long kernel delays one stream, so that work on the wrong stream reads wrong values. The tests do not read a clock.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import beit_fast
from beit_fast.ops.linear_gelu import linear_gelu
from beit_fast.ops.residual_norm import residual_add, residual_norm

from ..kernels.cases import DTYPES, assert_same_bits, bitwise_equal, make_case
from ..support.cases import Case
from ..support.linear_gelu import make_layer
from ..support.oracle import relative_error
from ..support.patch_embedding import make_inputs
from ..support.residual_norm import EPS, LEAVES, residual_case
from .calls import LONG, attend_and_differentiate, forbid_synchronization, needs_cuda_library

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Operator:
    """An operator with its sizes, as a function of tensors."""

    name: str
    draw: Callable[[torch.dtype], Inputs]
    """Draw inputs, and gradients of the outputs, on the current device."""
    call: Callable[[Inputs], list[Tensor]]
    """Run forward, and backward if it has kernels.

    The results are new tensors without a graph.
    """
    marks: tuple[pytest.MarkDecorator, ...] = ()


def as_leaves(inputs: Inputs, *names: str) -> Inputs:
    """Return aliases that require gradients: nothing is copied, and strides stay."""
    return {name: inputs[name].detach().requires_grad_() for name in names}


def attention(name: str, window: tuple[int, int] | None, *, masked: bool = True, **sizes: int) -> Operator:
    """Attention with dropout; without a table if `window` is None."""

    def draw(dtype: torch.dtype) -> Inputs:
        mask = torch.rand(2, 64, generator=torch.Generator().manual_seed(2)) > 0.3 if masked else None
        return make_case(window, dtype, head_dim=64, heads=3, key_mask=mask, **sizes).tensors()

    def call(inputs: Inputs) -> list[Tensor]:
        case = Case(**({"table": None} | inputs), window=window or (1, 1), dropout_p=0.1, seed=7)
        names = ("query", "key", "value", "table")
        leaves = as_leaves(inputs, *(name for name in names if name in inputs))
        return attend_and_differentiate(case, list(leaves.values()))

    return Operator(name, draw, call)


def norm_of_residual(name: str, *shape: int) -> Operator:
    def draw(dtype: torch.dtype) -> Inputs:
        return residual_case(*shape, dtype=dtype, device="cuda").tensors()

    def call(inputs: Inputs) -> list[Tensor]:
        leaves = as_leaves(inputs, *LEAVES)
        outputs = residual_norm(**leaves, drop_path_scale=inputs["drop_path_scale"], eps=EPS)
        incoming = (inputs["grad_sum"], inputs["grad_normalized"])
        return [*(x.detach() for x in outputs), *torch.autograd.grad(outputs, list(leaves.values()), incoming)]

    return Operator(name, draw, call)


def sum_of_residual(name: str, *shape: int) -> Operator:
    """Omit the gradient of residual: it is the incoming gradient itself."""

    def draw(dtype: torch.dtype) -> Inputs:
        without = ("weight", "bias", "grad_normalized")
        return residual_case(*shape, dtype=dtype, device="cuda", without=without).tensors()

    def call(inputs: Inputs) -> list[Tensor]:
        leaves = as_leaves(inputs, "branch", "scale")
        total = residual_add(inputs["residual"], **leaves, drop_path_scale=inputs["drop_path_scale"])
        return [total.detach(), *torch.autograd.grad(total, list(leaves.values()), inputs["grad_sum"])]

    return Operator(name, draw, call)


def layer_with_gelu(name: str, rows: tuple[int, ...], inputs: int, outputs: int) -> Operator:
    """Forward only, because the operator is for inference."""

    def draw(dtype: torch.dtype) -> Inputs:
        return dict(zip(("x", "weight", "bias"), make_layer(rows, inputs, outputs, dtype, "cuda"), strict=True))

    return Operator(name, draw, lambda layer: [linear_gelu(**layer)])


def patches(name: str, image: tuple[int, int], patch: tuple[int, int], **options: Any) -> Operator:
    """Forward only, because the backward is PyTorch operations.

    They copy the standard deviations to the device, which synchronizes.
    """
    of_bytes = options.get("pixel_dtype") == torch.uint8
    mean, std = ([100.0, 109.0, 118.0], [60.0, 67.0, 74.0]) if of_bytes else ([0.0, 0.1, 0.2], [0.6, 0.7, 0.8])

    def draw(dtype: torch.dtype) -> Inputs:
        arguments = make_inputs(image, patch, dtype=dtype, device="cuda", **options)
        return {key: value for key, value in arguments.items() if isinstance(value, Tensor)}

    def call(inputs: Inputs) -> list[Tensor]:
        return [beit_fast.patch_embed(**inputs, mean=mean, std=std)]

    return Operator(name, draw, call, (needs_cuda_library,))


OPERATORS = (
    attention("attention with table", (7, 9)),
    attention("attention without table", None, tokens=64),
    norm_of_residual("residual_norm", 4, 197, 768),
    sum_of_residual("residual_add", 4, 197, 768),
    layer_with_gelu("linear_gelu", (4, 197), 768, 3072),
    layer_with_gelu("linear_gelu that pads inputs", (50,), 97, 64),
    patches("patch_embed", (48, 64), (16, 16)),
    patches("patch_embed of bytes", (48, 64), (16, 16), pixel_dtype=torch.uint8),
    patches("patch_embed that pads weights", (48, 64), (5, 7), pixel_dtype=torch.uint8),
)
LARGE_OPERATORS = (
    attention("attention with table", (24, 24), masked=False, batch=4),
    norm_of_residual("residual_norm", 32, 577, 768),
    sum_of_residual("residual_add", 32, 577, 768),
    layer_with_gelu("linear_gelu of 77 rows", (77,), 96, 130),
    layer_with_gelu("linear_gelu of 700 rows", (700,), 96, 515),
    layer_with_gelu("linear_gelu of 5000 rows", (5000,), 96, 258),
    patches("patch_embed", (224, 224), (16, 16), batch=64, embed=768),
)
"""Most of them fill a GPU, so that blocks run in any order."""


def for_each(operators: tuple[Operator, ...]) -> pytest.MarkDecorator:
    params = [pytest.param(operator, id=operator.name, marks=operator.marks) for operator in operators]
    return pytest.mark.parametrize("operator", params)


def changed(inputs: Inputs, function: Callable[[Tensor], Tensor]) -> Inputs:
    return {name: function(tensor) for name, tensor in inputs.items()}


def backwards(tensor: Tensor) -> Tensor:
    """Copy the elements in reverse order."""
    return tensor.flatten().flip(0).view(tensor.shape)


def negated(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.bool else -tensor


def spread(tensor: Tensor) -> Tensor:
    """Copy to every second row of a larger tensor.

    A single row is copied to every second element.
    """
    dim = tensor.ndim - 1 if tensor.shape[:-1].numel() > 1 else tensor.ndim
    return torch.stack([backwards(tensor), tensor], dim).select(dim, 1)


def overwrite(inputs: Inputs, source: Inputs) -> None:
    """Copy the values of `source` into `inputs`, on the current stream."""
    for name, tensor in inputs.items():
        tensor.copy_(source[name])


@for_each(OPERATORS)
def test_launch_on_side_stream_does_not_wait_for_default_stream(operator: Operator) -> None:
    inputs = operator.draw(torch.bfloat16)
    expected = operator.call(inputs)
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        operator.call(changed(inputs, backwards))  # fills reused memory with wrong values
    torch.cuda.synchronize()
    torch.cuda._sleep(LONG)
    with torch.cuda.stream(side):
        actual = operator.call(inputs)
        same = [bitwise_equal(left, right) for left, right in zip(actual, expected, strict=True)]
    torch.cuda.synchronize()
    assert all(same)


@for_each(OPERATORS)
def test_launch_on_side_stream_waits_for_its_inputs(operator: Operator) -> None:
    """Bugs elsewhere: pytorch/pytorch#157363, thu-ml/SageAttention#371."""
    inputs = operator.draw(torch.bfloat16)
    other = changed(inputs, backwards)
    expected = operator.call(other)
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(LONG)
        overwrite(inputs, other)
        actual = operator.call(inputs)
    torch.cuda.synchronize()
    assert_same_bits(actual, expected)


@for_each(OPERATORS)
def test_launch_in_captured_graph_uses_new_inputs(operator: Operator) -> None:
    inputs = operator.draw(torch.bfloat16)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        operator.call(inputs)  # compiles kernels or loads the library, which is not possible during capture
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = operator.call(inputs)

    drawn = operator.draw(torch.bfloat16)
    for source in (drawn, changed(drawn, negated), changed(drawn, backwards)):
        overwrite(inputs, source)
        for result in results:
            result.fill_(float("nan"))
        graph.replay()
        assert_same_bits(results, operator.call(source))


@for_each(OPERATORS)
def test_launch_does_not_synchronize(operator: Operator) -> None:
    """Compiled kernels read no value back and copy none from pageable memory."""
    inputs = operator.draw(torch.bfloat16)
    expected = operator.call(inputs)
    with forbid_synchronization():
        actual = operator.call(inputs)
    assert_same_bits(actual, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@for_each(LARGE_OPERATORS)
def test_launch_repeated_returns_same_bits(operator: Operator, dtype: torch.dtype) -> None:
    inputs = operator.draw(dtype)
    assert_same_bits(operator.call(inputs), operator.call(inputs))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@for_each(OPERATORS)
def test_launch_on_other_device_runs_there(operator: Operator) -> None:
    """Triton launches on the current device: triton-lang/triton#2441, state-spaces/mamba#593."""
    inputs = operator.draw(torch.bfloat16)
    expected = operator.call(inputs)
    current = torch.cuda.current_device()
    other = torch.device("cuda", 1 - current)
    actual = operator.call(changed(inputs, lambda tensor: tensor.to(other)))
    assert torch.cuda.current_device() == current
    assert all(tensor.device == other for tensor in actual)
    returned = [tensor.to(expected[0].device) for tensor in actual]
    if torch.cuda.get_device_name(other) == torch.cuda.get_device_name():
        assert_same_bits(returned, expected)
    else:
        assert all(relative_error(left, right) < 2**-6 for left, right in zip(returned, expected, strict=True))


@for_each(OPERATORS)
def test_launch_with_strided_inputs_returns_same_bits(operator: Operator) -> None:
    inputs = operator.draw(torch.bfloat16)
    strided = changed(inputs, spread)
    assert not any(tensor.is_contiguous() for tensor in strided.values())
    assert_same_bits(operator.call(strided), operator.call(inputs))
