"""Device functions and constants that the kernels of every folder use."""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def split_program_id(program, inner_count, block_count):
    """Split a program id into (inner, block, outer), inner fastest."""
    inner = program % inner_count
    block = (program // inner_count) % block_count
    outer = program // (inner_count * block_count)
    # int64, because inner and outer are multiplied by strides that may pass 2**31.
    return inner.to(tl.int64), block, outer.to(tl.int64)


@triton.jit
def fence_copies(FENCE: tl.constexpr):
    """Order asynchronous copies to shared memory before the matrix products that follow."""
    # Only for releases of Triton that omit this fence: see compiler_hazards.py. The compiler keeps the order of
    # assembly with side effects, so that the fence stays between the wait for the copies and the product.
    if FENCE:
        tl.inline_asm_elementwise(
            "fence.proxy.async.shared::cta; mov.b32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1
        )


@triton.jit
def matmul(a, b, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """Return `a @ b`, summed in fp32."""
    # Triton's interpreter multiplies the bit patterns of bf16 as integers.
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision=PRECISION)
