"""fp32 linear layers on the tiles of a CPU, which multiply bf16: each number as the sum of two or three bf16 parts.

`_pack_parts` lays out the right operand of a product once, and `_linear_parts` multiplies by it; `_matmul_parts` does
both for one product. Three parts hold every bit of fp32, and the six products of parts that matter give its accuracy;
two parts and three products give an error of at most 2**-17, what `torch.set_float32_matmul_precision("high")` stands
for. The operators are private: they have no gradient, and are there only where `refusal()` is None. Elsewhere a call
raises one ValueError that says why.

Exponents are fp32's, with three differences. A part below 2**-126 counts as 0, and so does such a result: numbers lose
their last bits from 2**-110 downwards. An infinity among the operands gives NaN. So does a number of 3.3961e38 or
more, which is none in bf16, and a result that grows out of fp32 may be NaN too. NaN stays NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ... import native
from .. import attention
from ..validation import raise_problems, shapes_differ

SCHEMAS = (
    "_pack_parts(Tensor matrix, bool transposed, int parts) -> Tensor",
    "_linear_parts(Tensor x, Tensor packed, SymInt out_features, int parts, Tensor? bias=None, "
    "Tensor? residual=None, bool gelu=False) -> Tensor",
    "_matmul_parts(Tensor x, Tensor matrix, int parts, Tensor? bias=None) -> Tensor",
)
for _schema in SCHEMAS:
    attention.library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))

pack_parts_op = torch.ops.beit_fast._pack_parts.default
linear_parts_op = torch.ops.beit_fast._linear_parts.default
matmul_parts_op = torch.ops.beit_fast._matmul_parts.default

_SIDE, _DEPTH = 32, 32  # columns of a panel, numbers that one step sums over
_STEP_BYTES = 2 * _SIDE * _DEPTH  # of one part


def refusal() -> str | None:
    """Why the operators serve nothing in this process; None where they do."""
    reason = native.refusal("_C")
    if reason is not None or not native.is_loaded("_C"):
        return reason or f"{native.file_name('_C')} is not loaded"
    answer = native.ask("beit_fast_parts_refusal")
    if answer is None:
        return f"{native.file_name('_C')} was built before it had linear layers in parts; build it again"
    return answer or None


def parts_for_precision() -> int:
    """How many parts `torch.get_float32_matmul_precision()` asks for: 3 for `"highest"`, the default, else 2."""
    return 3 if torch.get_float32_matmul_precision() == "highest" else 2


def pack_parts(matrix: Tensor, parts: int, *, transposed: bool = False) -> Tensor:
    """Lay out the right operand of a product in fp32 for `linear_parts`, in `parts` (2 or 3) parts.

    `matrix` is `[N, K]` as the weight of a linear layer, or `[K, N]` where `transposed`; any strides. The result is
    opaque bytes `[ceil(N / 32), bytes]`, half as large again as the matrix in three parts and as large in two.
    """
    return pack_parts_op(matrix, transposed, parts)


def linear_parts(
    x: Tensor,
    packed: Tensor,
    out_features: int,
    parts: int,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    gelu: bool = False,
) -> Tensor:
    """`act(x @ matrix.T + bias) + residual` for the `[N, K]` matrix that was packed in as many parts; act: GELU (erf).

    `x` is `[..., K]` in fp32. Rows of any stride are read in place, and so is a transposed view of a matrix; other
    layouts of more than two dimensions may be copied. `bias` is `[N]`, `residual` and the result `[..., N]`. The bits
    of a result depend on nothing but its row of `x` and its column of the matrix.
    """
    return linear_parts_op(x, packed, out_features, parts, bias, residual, gelu)


def matmul_parts(x: Tensor, matrix: Tensor, parts: int, bias: Tensor | None = None) -> Tensor:
    """`x @ matrix.T + bias` for a `[N, K]` matrix of any strides that is laid out for this product alone.

    The layout's memory, half as much again as the matrix's in three parts, is kept by the thread for its next product.
    """
    return matmul_parts_op(x, matrix, parts, bias)


def _matrix_problems(matrix: Tensor, parts: int) -> list[str]:
    """What is wrong with the arguments of `_pack_parts`; csrc/cpu/linear/operator.cpp says the same."""
    problems = [] if matrix.ndim == 2 else ["matrix must be [N, K], or [K, N] where it is transposed"]
    if matrix.dtype != torch.float32:
        problems.append("matrix must be float32")
    return problems if parts in (2, 3) else [*problems, f"parts is {parts}, not 2 or 3"]


def _linear_problems(
    x: Tensor, packed: Tensor, out_features: int, parts: int, bias: Tensor | None, residual: Tensor | None
) -> list[str]:
    """What is wrong with the arguments of `_linear_parts`. Symbolic sizes are left to run time."""
    problems = [] if x.ndim else ["x must be [..., K]"]
    for name, tensor in (("x", x), ("bias", bias), ("residual", residual)):
        if tensor is not None and tensor.dtype != torch.float32:
            problems.append(f"{name} must be float32")
    if isinstance(out_features, int) and out_features < 0:
        problems.append("out_features must not be negative")
    if parts not in (2, 3):
        problems.append(f"parts is {parts}, not 2 or 3")
    if x.ndim:
        panels, step_bytes = _packed_shape(max(0, out_features), x.shape[-1], parts)
        if packed.dtype != torch.uint8 or shapes_differ(packed, [panels, step_bytes]):
            problems.append(
                f"packed must be what _pack_parts makes of [{out_features}, {x.shape[-1]}] in {parts} parts, "
                f"uint8 [{panels}, {step_bytes}]"
            )
        if residual is not None and shapes_differ(residual, [*x.shape[:-1], out_features]):
            problems.append(f"residual must be [..., N] = {[*x.shape[:-1], out_features]}")
    if bias is not None and shapes_differ(bias, [out_features]):
        problems.append(f"bias must be [N] = [{out_features}]")
    if any(tensor is not None and tensor.device != x.device for tensor in (packed, bias, residual)):
        problems.append("all tensors must be on one device")
    return problems


def _matmul_problems(x: Tensor, matrix: Tensor, parts: int, bias: Tensor | None) -> list[str]:
    """What is wrong with the arguments of `_matmul_parts`."""
    problems = [] if x.ndim else ["x must be [..., K]"]
    for name, tensor in (("x", x), ("bias", bias)):
        if tensor is not None and tensor.dtype != torch.float32:
            problems.append(f"{name} must be float32")
    problems += _matrix_problems(matrix, parts)
    if not problems and shapes_differ(matrix, [matrix.shape[0], x.shape[-1]]):
        problems.append(f"matrix must be [N, K] with K = {x.shape[-1]}")
    if not problems and bias is not None and shapes_differ(bias, [matrix.shape[0]]):
        problems.append(f"bias must be [N] = [{matrix.shape[0]}]")
    if any(tensor is not None and tensor.device != x.device for tensor in (matrix, bias)):
        problems.append("all tensors must be on one device")
    return problems


def _packed_shape(rows: int, depth: int, parts: int) -> tuple[int, int]:
    return (rows + _SIDE - 1) // _SIDE, (depth + _DEPTH - 1) // _DEPTH * parts * _STEP_BYTES


def _refuse_pack(matrix: Tensor, transposed: bool, parts: int) -> Tensor:
    raise_problems("_pack_parts", [*_matrix_problems(matrix, parts), *_refusals(matrix)], matrix=matrix)


def _refuse_linear(
    x: Tensor,
    packed: Tensor,
    out_features: int,
    parts: int,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    gelu: bool = False,
) -> Tensor:
    problems = [*_linear_problems(x, packed, out_features, parts, bias, residual), *_refusals(x)]
    raise_problems("_linear_parts", problems, x=x, packed=packed, bias=bias, residual=residual)


def _refuse_matmul(x: Tensor, matrix: Tensor, parts: int, bias: Tensor | None = None) -> Tensor:
    problems = [*_matmul_problems(x, matrix, parts, bias), *_refusals(x)]
    raise_problems("_matmul_parts", problems, x=x, matrix=matrix, bias=bias)


def _refusals(tensor: Tensor) -> list[str]:
    device = [] if tensor.device.type == "cpu" else [f"serves cpu tensors, not {tensor.device.type}"]
    reason = refusal()
    return device if reason is None else [*device, reason]


# Under CPU the native library has its kernels; this serves every device that has none.
attention.library.impl("_pack_parts", _refuse_pack, "CompositeExplicitAutograd")
attention.library.impl("_linear_parts", _refuse_linear, "CompositeExplicitAutograd")
attention.library.impl("_matmul_parts", _refuse_matmul, "CompositeExplicitAutograd")


@torch.library.register_fake("beit_fast::_pack_parts", lib=attention.library)
def _pack_fake(matrix: Tensor, transposed: bool, parts: int) -> Tensor:
    problems = _matrix_problems(matrix, parts)
    if problems:
        raise_problems("_pack_parts", problems, matrix=matrix)
    rows, depth = matrix.shape[::-1] if transposed else matrix.shape
    return matrix.new_empty(_packed_shape(rows, depth, parts), dtype=torch.uint8)


@torch.library.register_fake("beit_fast::_linear_parts", lib=attention.library)
def _linear_fake(
    x: Tensor,
    packed: Tensor,
    out_features: int,
    parts: int,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    gelu: bool = False,
) -> Tensor:
    problems = _linear_problems(x, packed, out_features, parts, bias, residual)
    if problems:
        raise_problems("_linear_parts", problems, x=x, packed=packed, bias=bias, residual=residual)
    return x.new_empty(*x.shape[:-1], out_features)


@torch.library.register_fake("beit_fast::_matmul_parts", lib=attention.library)
def _matmul_fake(x: Tensor, matrix: Tensor, parts: int, bias: Tensor | None = None) -> Tensor:
    problems = _matmul_problems(x, matrix, parts, bias)
    if problems:
        raise_problems("_matmul_parts", problems, x=x, matrix=matrix, bias=bias)
    return x.new_empty(*x.shape[:-1], matrix.shape[0])
