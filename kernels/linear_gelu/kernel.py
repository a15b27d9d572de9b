"""A matrix product whose epilogue adds the bias and applies exact GELU. The epilogue is in fp32."""

import triton
import triton.language as tl

from ..common.primitives import fence_copies, matmul

SQRT_HALF = tl.constexpr(0.7071067811865476)


@triton.jit
def exact_gelu(values):
    """Return x * Phi(x) by the error function. This is torch's GELU with approximate="none"."""
    return 0.5 * values * (1.0 + tl.erf(values * SQRT_HALF))


@triton.jit
def half_precision_gelu(values):
    """Return the exact GELU to 16 bits."""
    # The relative error is 6e-6 above -6.
    # max(x, 0) - |x| Phi(-|x|), a third of the instructions of erf. log2 Phi(-|x|) is a polynomial of degree 7 from 0
    # to 6 and keeps falling beyond: ../README.md has its derivation.
    size = tl.abs(values)
    tail = -1.8348242699e-06 * size + 6.1598540924e-05
    tail = tail * size - 9.3052675948e-04
    tail = tail * size + 8.5078980774e-03
    tail = tail * size - 5.3960081190e-02
    tail = tail * size - 4.5846438408e-01
    tail = tail * size - 1.1512510777
    tail = tl.exp2(tail * size - 9.9999529123e-01)
    # x/2 + |x|/2 is max(x, 0) that keeps NaN. The limit keeps inf * 0 out of the product for +inf.
    return 0.5 * values + 0.5 * size - tl.minimum(size, 64.0) * tail


@triton.jit
def grouped_blocks(program, row_blocks, column_blocks, GROUP: tl.constexpr):
    """Return (row block, column block) of a program."""
    # Down GROUP rows of blocks, then right: programs that run together share tiles of x and of the weight in L2.
    group_programs = GROUP * column_blocks
    first = program // group_programs * GROUP
    height = tl.minimum(row_blocks - first, GROUP)
    position = program % group_programs
    return first + position % height, position // height


@triton.jit(do_not_specialize=["row_count"])
def linear_gelu_kernel(
    x,  # [row_count, input_count] fp16, bf16 or fp32, last stride 1
    weight,  # [output_count, input_count], as x
    bias,  # [output_count], as x, or None
    out,  # [row_count, output_count], as x, contiguous; written
    row_stride,  # elements between rows of x
    weight_stride,  # elements between rows of weight
    bias_stride,
    row_count,
    output_count,
    input_count,
    BLOCK_M: tl.constexpr,  # rows of a program
    BLOCK_N: tl.constexpr,  # outputs of a program
    BLOCK_K: tl.constexpr,  # inputs of a step
    GROUP: tl.constexpr,  # rows of blocks that run together
    WHOLE_STEPS: tl.constexpr,  # whether BLOCK_K divides input_count
    PRECISION: tl.constexpr,  # how tl.dot multiplies fp32
    UPCAST: tl.constexpr,
    FENCE: tl.constexpr,  # see compiler_hazards.py
):
    """Compute a [BLOCK_M, BLOCK_N] block of `gelu(x @ weight.T + bias)`. Grid: blocks, see grouped_blocks."""
    row_block, output_block = grouped_blocks(
        tl.program_id(0), tl.cdiv(row_count, BLOCK_M), tl.cdiv(output_count, BLOCK_N), GROUP
    )
    rows = row_block.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    outputs = output_block.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inputs = tl.arange(0, BLOCK_K)
    # Rows and outputs beyond the last read the last again, so that loads in the loop need no mask for them.
    x_pointers = x + tl.minimum(rows, row_count - 1)[:, None] * row_stride + inputs[None, :]
    weight_pointers = weight + tl.minimum(outputs, output_count - 1)[:, None] * weight_stride + inputs[None, :]

    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, input_count, BLOCK_K):
        if WHOLE_STEPS:
            a = tl.load(x_pointers)  # [M, K]
            b = tl.load(weight_pointers)  # [N, K]
        else:
            inside = (inputs < input_count - start)[None, :]
            a = tl.load(x_pointers, mask=inside, other=0.0)
            b = tl.load(weight_pointers, mask=inside, other=0.0)
        fence_copies(FENCE)
        acc += matmul(a, tl.trans(b), PRECISION, UPCAST)
        x_pointers += BLOCK_K
        weight_pointers += BLOCK_K

    if bias is not None:
        acc += tl.load(bias + tl.minimum(outputs, output_count - 1) * bias_stride).to(tl.float32)[None, :]
    # Offsets within the tile are int32, hence fewer than 2**24 outputs; the corner is int64.
    corner = out + row_block.to(tl.int64) * BLOCK_M * output_count + output_block * BLOCK_N
    addresses = corner + tl.arange(0, BLOCK_M)[:, None] * output_count + tl.arange(0, BLOCK_N)[None, :]
    inside = (rows < row_count)[:, None] & (outputs < output_count)[None, :]
    # The polynomial is exact enough for 16 bits, not for fp32.
    acc = exact_gelu(acc) if out.dtype.element_ty == tl.float32 else half_precision_gelu(acc)
    tl.store(addresses, acc.to(out.dtype.element_ty), mask=inside)
