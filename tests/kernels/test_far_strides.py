"""Offsets above 32 bits, which can overflow silently.

Bugs elsewhere: fla-org/flash-linear-attention#1080, linkedin/Liger-Kernel#1335.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ..support.cases import Case
from .cases import assert_same_results, device, make_case


@pytest.mark.parametrize("dimension", [0, 1, 2])
def test_attention_far_stride_of_size_one_dimension(dimension: int) -> None:
    """Use a stride above 32 bits, which no element needs."""
    sizes = {0: {"batch": 1}, 1: {"tokens": 1}, 2: {"heads": 1}}[dimension]
    case = make_case(None if dimension == 1 else (3, 4), **sizes)

    def far(tensor: Tensor) -> Tensor:
        strides = list(tensor.stride())
        strides[dimension] = 2**33 + 8
        return tensor.as_strided(tensor.shape, strides)

    assert_same_results(case, case.map_rows(far))


def address_space(elements: int, dtype: torch.dtype, folder: Path) -> Tensor:
    """Allocate `elements` elements.

    On the CPU they are a sparse file, in which only pages that are touched take memory.
    """
    size = elements * dtype.itemsize
    if device().type == "cpu":
        file = folder / "sparse"
        storage = torch.from_file(str(file), shared=True, size=elements, dtype=dtype)
        file.unlink()  # the mapping remains valid
        return storage
    free, _ = torch.cuda.mem_get_info()
    if free < size + 2**30:
        pytest.skip(f"needs more than {size / 2**30:.1f} GiB of device memory ({free / 2**30:.1f} GiB are free)")
    return torch.empty(elements, dtype=dtype, device=device())


def far_apart(case: Case, dimension: int, folder: Path) -> Case:
    """Copy the case with offsets above 2^31 elements along `dimension`.

    Query, key, value and incoming gradient share one storage: they are the slices of rows `[4, D]`. 2^31 unused
    elements precede them, so that an offset that wraps around stays in bounds.
    """
    sizes = case.query.shape
    head_dim = sizes[-1]
    strides = [sizes[1] * sizes[2] * 4 * head_dim, sizes[2] * 4 * head_dim, 4 * head_dim, 1]
    strides[dimension] = 2**31 // (sizes[dimension] - 1) + 8
    elements = 4 * head_dim + sum((size - 1) * stride for size, stride in zip(sizes[:3], strides, strict=False))
    storage = address_space(2**31 + elements, case.query.dtype, folder)[2**31 :]
    starts = iter(range(0, 4 * head_dim, head_dim))
    return case.map_rows(lambda tensor: storage[next(starts) :].as_strided(sizes, strides).copy_(tensor))


@pytest.fixture
def new_memory_unfilled(new_memory_is_nan: None) -> Iterator[None]:
    """Do not fill new memory with NaN: that would touch gigabytes."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    yield
    torch.utils.deterministic.fill_uninitialized_memory = True


@pytest.mark.usefixtures("new_memory_unfilled")
@pytest.mark.parametrize(
    ("dimension", "batch"),
    [
        pytest.param(0, 2, id="the stride of the batch"),
        pytest.param(0, 3, id="the stride of the batch times an index"),
        pytest.param(1, 3, id="the stride of the tokens times an index"),
        pytest.param(2, 3, id="the stride of the heads times an index"),
    ],
)
def test_attention_offsets_above_2_31_elements_same_bits(dimension: int, batch: int, tmp_path: Path) -> None:
    case = make_case((2, 4), torch.float16, batch=batch, heads=3, head_dim=16)
    far = far_apart(case, dimension, tmp_path)
    assert (max(far.query.stride()) > 2**31) == (batch == 2)
    assert far.query[-1, -1, -1].storage_offset() - far.query.storage_offset() > 2**31
    assert_same_results(case, far)
