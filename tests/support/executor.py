"""Small PTX kernels for tests of the executor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from beit_fast.kernels.aot.executor import kernel_code, launch
from beit_fast.kernels.aot.executor.dtypes import Array
from beit_fast.kernels.aot.executor.global_memory import GlobalMemory
from beit_fast.kernels.aot.executor.launch import Launch, Options
from beit_fast.kernels.aot.executor.operations import operation_of
from beit_fast.kernels.aot.executor.parameters import Argument, bind
from beit_fast.kernels.aot.executor.parser import parse

MODULE = """
.version 8.7
.target {target}
.extern .shared .align 16 .b8 dynamic[];
.visible .entry kernel(
{parameters}
)
.reqntid {threads}
{{
	.reg .pred %p<9>;
	.reg .b16 %rs<9>;
	.reg .b32 %r<200>;
	.reg .b64 %rd<9>;
{body}
	ret;
}}
"""
THREAD = "mov.u32 %r1, %tid.x; mov.b32 %r9, dynamic; shl.b32 %r2, %r1, 2; add.s32 %r3, %r9, %r2;"
"""Put the thread into %r1 and the address of its word of shared memory into %r3."""
TYPES = {torch.float32: "*fp32", torch.int32: "*i32", torch.int64: "*i64", torch.uint8: "*u8"}


def module(body: str, arguments: Sequence[Any] = (), threads: int = 64, target: str = "sm_80") -> str:
    """Return a module with one kernel; the parameters are p0, p1 and so on."""
    kinds = [".u64 .ptr .global" if isinstance(argument, Tensor) else ".u32" for argument in arguments]
    parameters = ",\n".join(f".param {kind} p{place}" for place, kind in enumerate(kinds))
    return MODULE.format(parameters=parameters, threads=threads, body=body, target=target)


def run_ptx(
    body: str,
    arguments: Sequence[Any] = (),
    threads: int = 64,
    grid: tuple[int, int, int] = (1, 1, 1),
    shared: int = 1024,
    target: str = "sm_80",
    options: Options = Options(),  # noqa: B008  immutable
) -> Launch:
    """Execute the statements of a kernel."""
    code = kernel_code.load(module(body, arguments, threads, target))
    memory = GlobalMemory()
    named = [
        Argument(f"a{place}", TYPES[argument.dtype] if isinstance(argument, Tensor) else "i32", argument)
        for place, argument in enumerate(arguments)
    ]
    return launch.run(code, memory, bind(code, memory, named), grid, (threads, 1, 1), shared, options)


def stored(body: str, threads: int = 32, **options: Any) -> list[int]:
    """Return %r8 of each thread at the end."""
    out = torch.zeros(threads, dtype=torch.int32)
    body += "ld.param.b64 %rd1, [p0]; mov.u32 %r1, %tid.x; mad.wide.u32 %rd2, %r1, 4, %rd1; st.global.b32 [%rd2], %r8;"
    run_ptx(body, [out], threads=threads, **options)
    return [value % 2**32 for value in out.tolist()]


def compute(name: str, *operands: Array) -> Array:
    """Return the result of a scalar instruction for arrays of operands."""
    registers = ", ".join(f"%r{place}" for place in range(len(operands) + 1))
    ptx = module(f"{name} {registers};")
    operation = operation_of(parse(ptx).kernel.instructions[0])
    assert len(operation.operands) == len(operands)
    with np.errstate(all="ignore"):
        result = operation.function(
            *(np.asarray(operand).view(dtype) for operand, dtype in zip(operands, operation.operands, strict=True))
        )
    assert result.dtype.itemsize == operation.result.itemsize
    return result
