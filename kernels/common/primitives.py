"""Device functions and constants that kernels of every folder use."""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def split_program_id(program, inner_count, block_count):
    """(inner, block, outer) of a number in a one-dimensional grid, inner fastest; inner and outer int64."""
    inner = program % inner_count
    block = (program // inner_count) % block_count
    outer = program // (inner_count * block_count)
    return inner.to(tl.int64), block, outer.to(tl.int64)


@triton.jit
def matmul(a, b, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """fp32 `a @ b`. UPCAST is for the interpreter, which multiplies bf16 as integers."""
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision=PRECISION)
