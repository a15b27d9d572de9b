"""Launches of Triton kernels on the executor: arguments, grids and refusals."""

from __future__ import annotations

import os
import struct

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton", reason="needs Triton")
if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
    pytest.skip("the Triton interpreter and compiler cannot share a process", allow_module_level=True)

import triton.language as tl  # noqa: E402

from beit_fast.kernels.aot.executor.driver import ExecutorDriver  # noqa: E402
from beit_fast.kernels.aot.executor.errors import AccessError  # noqa: E402
from beit_fast.kernels.aot.executor.launch import Options  # noqa: E402
from beit_fast.kernels.aot.executor.parameters import Argument, scalar_bytes  # noqa: E402
from beit_fast.kernels.aot.executor.schedule import RANDOM, Schedule  # noqa: E402


@triton.jit
def write_arguments(out, pair, flag, small, wide, single, nothing, SIZE: tl.constexpr):
    offsets = tl.arange(0, SIZE)
    place = (tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0) + tl.program_id(0)
    value = tl.load(pair[0] + offsets).to(tl.float32) + pair[1] + small + single + (wide >> 32).to(tl.float32)
    if flag:
        value += 0.5
    if nothing is not None:
        value += 100.0
    tl.store(out + place * SIZE + offsets, value)


@triton.jit
def sum_rows(x, out, stride, SIZE: tl.constexpr):
    row = tl.program_id(0)
    tl.store(out + row, tl.sum(tl.load(x + row * stride + tl.arange(0, SIZE)), axis=0))


@pytest.mark.parametrize("capability", [80, 90])
def test_driver_binds_arguments_of_every_kind(capability: int) -> None:
    base = torch.arange(32, dtype=torch.int16)
    out = torch.zeros(3, 2, 2, 32)
    with ExecutorDriver(capability) as driver:
        write_arguments[(2, 2, 3)](out, (base, 7), True, -3, 5 << 32, 0.25, None, SIZE=32)
    assert torch.equal(out, (base + 7 - 3 + 5 + 0.25 + 0.5).expand(3, 2, 2, 32))
    (launch,) = driver.launches
    assert (launch.kernel, launch.grid) == ("write_arguments", (2, 2, 3))
    assert launch.code.written_parameters == {launch.code.function.parameters[0].name}


@pytest.mark.parametrize(
    "options", [Options(), Options(Schedule(RANDOM, 3)), Options(lanes_together=1)], ids=("lockstep", "random", "alone")
)
def test_driver_executes_a_reduction_over_warps(options: Options) -> None:
    x = torch.randn(5, 512, generator=torch.Generator().manual_seed(0))
    out = torch.empty(5)
    with ExecutorDriver(80, options):
        sum_rows[(5,)](x, out, x.stride(0), SIZE=512)
    torch.testing.assert_close(out, x.sum(1))


def test_driver_finds_an_access_behind_the_last_row() -> None:
    x, out = torch.zeros(5, 512), torch.zeros(5)
    with ExecutorDriver(80), pytest.raises(AccessError, match=r"outside x.*sum_rows|sum_rows.*outside x"):
        sum_rows[(6,)](x, out, 512, SIZE=512)


def test_driver_edits_ptx_before_it_runs() -> None:
    x, out = torch.ones(2, 512), torch.zeros(2)
    with ExecutorDriver(80, edit=lambda ptx: ptx.replace("add.f32", "sub.f32")):
        sum_rows[(2,)](x, out, 512, SIZE=512)
    assert (out.abs() < 512).all()


def test_driver_restores_the_active_driver() -> None:
    before = triton.runtime.driver._active
    with ExecutorDriver(80):
        assert triton.runtime.driver.active.get_current_target().arch == 80
    assert triton.runtime.driver._active is before
    assert torch.empty(3).shape == (3,)


def test_driver_marks_new_tensors_as_uninitialized() -> None:
    out = torch.zeros(1)
    with ExecutorDriver(80) as driver:
        x = torch.empty(1, 512)
        sum_rows[(1,)](x, out, 512, SIZE=512)
    assert x.isnan().all()
    assert out.isnan()
    assert any("uninitialized memory of x" in note.problem for note in driver.launches[0].notes)


@pytest.mark.parametrize(
    ("kind", "value", "expected"),
    [
        ("i1", True, b"\1"),
        ("i8", -2, b"\xfe"),
        ("u8", 200, b"\xc8"),
        ("i16", -2, struct.pack("<h", -2)),
        ("u16", 40000, struct.pack("<H", 40000)),
        ("i32", -5, struct.pack("<i", -5)),
        ("u32", 2**31, struct.pack("<I", 2**31)),
        ("i64", -(2**40), struct.pack("<q", -(2**40))),
        ("u64", 2**63, struct.pack("<Q", 2**63)),
        ("fp16", 1.5, np.float16(1.5).tobytes()),
        ("bf16", 1.5, b"\xc0\x3f"),
        ("fp32", 0.1, struct.pack("<f", 0.1)),
        ("fp64", 0.1, struct.pack("<d", 0.1)),
    ],
)
def test_scalar_is_passed_as_by_the_cuda_launcher(kind: str, value: float, expected: bytes) -> None:
    assert scalar_bytes(Argument("x", kind, value)) == expected


def test_scalar_that_does_not_fit_is_an_error() -> None:
    with pytest.raises(OverflowError):
        scalar_bytes(Argument("x", "i32", 2**31))
    with pytest.raises(NotImplementedError, match="nvTmaDesc"):
        scalar_bytes(Argument("x", "nvTmaDesc", 0))
