"""fp32 linear layers on a CPU's bf16 tiles: each number is the sum of two or three bf16 terms.

`bf16x3` holds every bit of fp32, and the six significant products of terms give its accuracy. `bf16x2` has three
products and an error of at most 2**-17, which is what `torch.set_float32_matmul_precision("high")` allows. `pack` lays
out the right operand of a product once and `linear` multiplies by it; `matmul` does both for one product. The operators
are private and have no gradient. They serve if `unsupported_reason()` is None; otherwise a call raises one ValueError
with the reason.

Exponents are those of fp32, with three differences. A term below 2**-126 counts as 0, and so does such a result:
numbers lose their last bits from 2**-110 downwards. An infinity among the operands gives NaN. So does a number of
3.3961e38 or more, which overflows bf16, and a result that overflows fp32 may be NaN too. NaN stays NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import native
from ..library import Kernel, call_op, register_op
from ..validation import shapes_differ

_SIDE, _DEPTH = 32, 32  # columns of a panel, numbers that one step sums over
_STEP_BYTES = 2 * _SIDE * _DEPTH  # of one term


def unsupported_reason() -> str | None:
    """Return the reason why the operators cannot serve in this process; None if they can."""
    reason = native.unsupported_reason("_C")
    if reason is not None or not native.is_loaded("_C"):
        return reason or f"{native.file_name('_C')} is not loaded"
    answer = native.ask("beit_fast_split_bf16_unsupported")
    if answer is None:
        return f"{native.file_name('_C')} was built before it had split-bf16 linear layers; build it again"
    return answer or None


def terms_for_precision() -> int:
    """bf16 terms per number for `torch.get_float32_matmul_precision()`: 3 for `"highest"`, the default, else 2."""
    return 3 if torch.get_float32_matmul_precision() == "highest" else 2


def pack(matrix: Tensor, terms: int, *, transposed: bool = False) -> Tensor:
    """Lay out the right operand of an fp32 product for `linear`.

    Args:
        matrix: `[N, K]` as the weight of a linear layer, or `[K, N]` if `transposed`; any strides.
        terms: bf16 terms per number, 2 or 3.
        transposed: whether `matrix` is `[K, N]`.

    Returns:
        Opaque bytes `[ceil(N / 32), bytes]`: 1.5 times the matrix's size for three terms, its size for two.
    """
    arguments = _PackArguments(matrix, transposed, terms)
    return call_op(pack_op, "_pack_split_bf16", arguments, _with_unsupported(_pack_errors))


def linear(
    x: Tensor,
    packed: Tensor,
    out_features: int,
    terms: int,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    gelu: bool = False,
) -> Tensor:
    """Compute `act(x @ matrix.T + bias) + residual` with a packed matrix.

    The `[N, K]` matrix was packed with the same `terms`.

    Args:
        x: fp32 `[..., K]`. Rows of any stride and a transposed view of a matrix are read in place; other layouts of
            more than two dimensions may be copied.
        packed: result of `pack`.
        out_features: N.
        terms: bf16 terms per number.
        bias: `[N]`, or None.
        residual: `[..., N]`, or None.
        gelu: whether act is GELU with erf; otherwise act is the identity.

    Returns:
        `[..., N]`. The bits of a number depend only on its row of `x` and its column of the matrix.
    """
    arguments = _LinearArguments(x, packed, out_features, terms, bias, residual, gelu)
    return call_op(linear_op, "_linear_split_bf16", arguments, _with_unsupported(_linear_errors))


def matmul(x: Tensor, matrix: Tensor, terms: int, bias: Tensor | None = None) -> Tensor:
    """Compute `x @ matrix.T + bias` with a temporary packed matrix.

    The matrix is `[N, K]` with any strides and is packed for this product alone. The thread keeps the memory of the
    packed matrix for its next product: 1.5 times the matrix's for three terms.
    """
    arguments = _MatmulArguments(x, matrix, terms, bias)
    return call_op(matmul_op, "_matmul_split_bf16", arguments, _with_unsupported(_matmul_errors))


class _PackArguments(NamedTuple):
    matrix: Tensor
    transposed: bool
    terms: int


class _LinearArguments(NamedTuple):
    x: Tensor
    packed: Tensor
    out_features: int
    terms: int
    bias: Tensor | None = None
    residual: Tensor | None = None
    gelu: bool = False


class _MatmulArguments(NamedTuple):
    x: Tensor
    matrix: Tensor
    terms: int
    bias: Tensor | None = None


def _pack_errors(arguments: _PackArguments) -> list[str]:
    return _matrix_errors(arguments.matrix, arguments.terms)


def _matrix_errors(matrix: Tensor, terms: int) -> list[str]:
    """Return the errors of a right operand."""
    errors = [] if matrix.ndim == 2 else ["matrix must be [N, K], or [K, N] where it is transposed"]
    if matrix.dtype != torch.float32:
        errors.append("matrix must be float32")
    return errors if terms in (2, 3) else [*errors, f"terms is {terms}, not 2 or 3"]


def _linear_errors(arguments: _LinearArguments) -> list[str]:
    """Return the errors of the arguments of `linear`. Symbolic sizes are checked at run time."""
    x, packed, out_features, terms, bias, residual, _ = arguments
    errors = [] if x.ndim else ["x must be [..., K]"]
    for name, tensor in (("x", x), ("bias", bias), ("residual", residual)):
        if tensor is not None and tensor.dtype != torch.float32:
            errors.append(f"{name} must be float32")
    if isinstance(out_features, int) and out_features < 0:
        errors.append("out_features must not be negative")
    if terms not in (2, 3):
        errors.append(f"terms is {terms}, not 2 or 3")
    if x.ndim:
        panels, step_bytes = _packed_shape(max(0, out_features), x.shape[-1], terms)
        if packed.dtype != torch.uint8 or shapes_differ(packed, [panels, step_bytes]):
            errors.append(
                f"packed must be what _pack_split_bf16 returns for [{out_features}, {x.shape[-1]}] and {terms} terms, "
                f"uint8 [{panels}, {step_bytes}]"
            )
        if residual is not None and shapes_differ(residual, [*x.shape[:-1], out_features]):
            errors.append(f"residual must be [..., N] = {[*x.shape[:-1], out_features]}")
    if bias is not None and shapes_differ(bias, [out_features]):
        errors.append(f"bias must be [N] = [{out_features}]")
    if any(tensor is not None and tensor.device != x.device for tensor in (packed, bias, residual)):
        errors.append("all tensors must be on one device")
    return errors


def _matmul_errors(arguments: _MatmulArguments) -> list[str]:
    x, matrix, terms, bias = arguments
    errors = [] if x.ndim else ["x must be [..., K]"]
    for name, tensor in (("x", x), ("bias", bias)):
        if tensor is not None and tensor.dtype != torch.float32:
            errors.append(f"{name} must be float32")
    errors += _matrix_errors(matrix, terms)
    if not errors and shapes_differ(matrix, [matrix.shape[0], x.shape[-1]]):
        errors.append(f"matrix must be [N, K] with K = {x.shape[-1]}")
    if not errors and bias is not None and shapes_differ(bias, [matrix.shape[0]]):
        errors.append(f"bias must be [N] = [{matrix.shape[0]}]")
    if any(tensor is not None and tensor.device != x.device for tensor in (matrix, bias)):
        errors.append("all tensors must be on one device")
    return errors


def _packed_shape(rows: int, depth: int, terms: int) -> tuple[int, int]:
    return (rows + _SIDE - 1) // _SIDE, (depth + _DEPTH - 1) // _DEPTH * terms * _STEP_BYTES


def _fake_pack(arguments: _PackArguments) -> Tensor:
    matrix, transposed, terms = arguments
    rows, depth = matrix.shape[::-1] if transposed else matrix.shape
    return matrix.new_empty(_packed_shape(rows, depth, terms), dtype=torch.uint8)


def _fake_linear(arguments: _LinearArguments) -> Tensor:
    return arguments.x.new_empty(*arguments.x.shape[:-1], arguments.out_features)


def _fake_matmul(arguments: _MatmulArguments) -> Tensor:
    return arguments.x.new_empty(*arguments.x.shape[:-1], arguments.matrix.shape[0])


def _unsupported_reasons(arguments: Any) -> Sequence[str]:
    """Return the reasons why no kernel serves. The native library has the only kernels, for CPU."""
    device, reason = arguments[0].device.type, unsupported_reason()
    reasons = [] if device == "cpu" else [f"serves cpu tensors, not {device}"]
    return [*reasons, reason or "the native library has no such kernel"]


def _with_unsupported(errors: Callable[[Any], list[str]]) -> Callable[[Any], list[str]]:
    """Return a function that appends `unsupported_reason()` to the errors of the arguments."""

    def all_errors(arguments: Any) -> list[str]:
        reason = unsupported_reason()
        return errors(arguments) if reason is None else [*errors(arguments), reason]

    return all_errors


def _fail(arguments: Any) -> None:
    raise AssertionError("there is always a reason")


_WITHOUT_LIBRARY = Kernel(_fail, _unsupported_reasons)

pack_op = register_op(
    "_pack_split_bf16(Tensor matrix, bool transposed, int terms) -> Tensor",
    _PackArguments,
    errors=_pack_errors,
    fallback=_WITHOUT_LIBRARY,
    fake=_fake_pack,
)
linear_op = register_op(
    "_linear_split_bf16(Tensor x, Tensor packed, SymInt out_features, int terms, Tensor? bias=None, "
    "Tensor? residual=None, bool gelu=False) -> Tensor",
    _LinearArguments,
    errors=_linear_errors,
    fallback=_WITHOUT_LIBRARY,
    fake=_fake_linear,
)
matmul_op = register_op(
    "_matmul_split_bf16(Tensor x, Tensor matrix, int terms, Tensor? bias=None) -> Tensor",
    _MatmulArguments,
    errors=_matmul_errors,
    fallback=_WITHOUT_LIBRARY,
    fake=_fake_matmul,
)
