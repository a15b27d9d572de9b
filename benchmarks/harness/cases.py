"""Cases of the attention benchmarks: shapes, inputs, fp64 reference and error budgets."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from beit_fast.position_bias import Window, gather_bias, table_rows, token_count
from beit_fast.tuning.reference import error_budgets, relative_error

FORWARD = "forward"
BACKWARD = "backward"  # alone: the forward runs before the clock starts, and its graph is kept
TRAINING = "training"
TRAINING_FROZEN = "training, frozen table"
MODES = (FORWARD, BACKWARD, TRAINING, TRAINING_FROZEN)

DTYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}


@dataclass(frozen=True)
class Case:
    """One shape, dtype, device and mode: forward, backward, or both as a training step."""

    mode: str
    batch: int
    window: Window  # (height, width) in patches; N = height * width + 1
    dtype: torch.dtype
    device: str
    heads: int = 12
    head_dim: int = 64

    def __str__(self) -> str:
        mode = self.mode.replace(", ", "-").replace(" ", "-")
        return f"{mode}-{self.batch}x{self.tokens}-{DTYPE_NAMES[self.dtype]}"

    @property
    def tokens(self) -> int:
        return token_count(self.window)

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5

    @property
    def trains(self) -> bool:
        return self.mode != FORWARD

    @property
    def trains_table(self) -> bool:
        return self.mode in (BACKWARD, TRAINING)

    @property
    def flops(self) -> int:
        """Floating-point operations of the matrix products of one call.

        The forward has two products. The backward has five, because it recomputes the scores.
        """
        product = 2 * self.batch * self.heads * self.tokens**2 * self.head_dim
        return product * {FORWARD: 2, BACKWARD: 5}.get(self.mode, 7)

    def least_bytes(self, biased: bool) -> int:
        """Bytes that every kernel has to move: inputs read once, results written once, no [N, N] matrix."""
        size = self.dtype.itemsize
        activation = self.batch * self.tokens * self.heads * self.head_dim * size
        table = table_rows(self.window) * self.heads * size if biased else 0
        lse = self.batch * self.heads * self.tokens * 4
        forward = 4 * activation + table
        backward = 8 * activation + table * (2 if self.trains_table else 1) + lse
        if self.mode == BACKWARD:
            return backward
        return forward + lse + backward if self.trains else forward


@dataclass(frozen=True)
class Inputs:
    """Random tensors of a case, all N(0, 1): q, k, v, grad_out `[B, N, H, D]` and table `[rows, H]`."""

    q: Tensor
    k: Tensor
    v: Tensor
    table: torch.nn.Parameter
    grad_out: Tensor

    def leaves(self, case: Case, biased: bool = True) -> dict[str, Tensor]:
        """Return the tensors that need gradients in the case, by name."""
        if not case.trains:
            return {}
        leaves: dict[str, Tensor] = {"q": self.q, "k": self.k, "v": self.v}
        if case.trains_table and biased:
            leaves["table"] = self.table
        return leaves


def draw(case: Case) -> Inputs:
    """Draw the inputs of a case; the values depend on the case and the device type only."""
    generator = torch.Generator(case.device).manual_seed(zlib.crc32(str(case).encode()))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=case.device).to(case.dtype)

    shape = (case.batch, case.tokens, case.heads, case.head_dim)
    q, k, v, grad_out = (normal(*shape) for _ in range(4))
    for leaf in (q, k, v):
        leaf.requires_grad_(case.trains)
    table = torch.nn.Parameter(normal(table_rows(case.window), case.heads), requires_grad=case.trains_table)
    return Inputs(q, k, v, table, grad_out)


def textbook_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """Compute attention with an optional bias in the dtype of q.

    The result is softmax(scale * q k^T + bias) v.

    Args:
        q: `[B, N, H, D]`.
        k: `[B, N, H, D]`.
        v: `[B, N, H, D]`.
        bias: `[H, N, N]`, or None.
        scale: Factor of the scores.
    """
    scores = scale * torch.einsum("bihd,bjhd->bhij", q, k)
    if bias is not None:
        scores = scores + bias
    return torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v)


@dataclass(frozen=True)
class Reference:
    """fp64 results by name, and the relative error allowed for each.

    A name is "out" or the input of a gradient.
    """

    results: dict[str, Tensor]
    budgets: dict[str, float]


@functools.lru_cache(maxsize=2)
def reference(case: Case, biased: bool) -> Reference:
    """Compute the fp64 results and error budgets of a case.

    The budgets come from the error of textbook attention in the dtype of the case. They are twice that error for the
    output and three times for a gradient, plus four eps of the dtype.
    """
    exact = _reference_results(case, biased)
    inputs = draw(case)
    rounded = results_of(case, inputs, _textbook(case, inputs, biased), biased)
    return Reference(exact, error_budgets(exact, rounded, ("out",), case.dtype))


def checked_errors(results: dict[str, Tensor], expected: Reference, tolerance: float | None = None) -> dict[str, float]:
    """Return the relative error of each result if all are within budget.

    Args:
        results: Tensors by name.
        expected: The reference.
        tolerance: Replaces the budgets if given.

    Raises:
        ValueError: If an error exceeds its budget.
    """
    errors = {name: relative_error(results[name], exact) for name, exact in expected.results.items()}
    budgets = expected.budgets if tolerance is None else dict.fromkeys(errors, tolerance)
    wrong = [
        f"{name}: relative error {error:.2e}, allowed {budgets[name]:.2e}"
        for name, error in errors.items()
        if not error <= budgets[name]  # a NaN is not within any budget
    ]
    if wrong:
        raise ValueError(f"wrong and not timed. {'; '.join(wrong)}")
    return errors


def _textbook(case: Case, inputs: Inputs, biased: bool) -> Callable[[], Tensor]:
    def run() -> Tensor:
        bias = gather_bias(inputs.table, case.window) if biased else None
        return textbook_attention(inputs.q, inputs.k, inputs.v, bias, case.scale)

    return run


def _reference_results(case: Case, biased: bool) -> dict[str, Tensor]:
    """Compute the results in fp64, one sample at a time. Memory holds only a few [H, N, N] matrices."""
    inputs = draw(case)
    table = inputs.table.detach().double().requires_grad_(case.trains_table)
    parts: list[dict[str, Tensor]] = []
    for sample in range(case.batch):
        one = slice(sample, sample + 1)
        q, k, v = (x.detach()[one].double().requires_grad_(case.trains) for x in (inputs.q, inputs.k, inputs.v))
        single = Inputs(q, k, v, table, inputs.grad_out[one].double())  # type: ignore[arg-type]
        parts.append(results_of(case, single, _textbook(case, single, biased), biased))
    results = {name: torch.cat([part[name] for part in parts]) for name in parts[0] if name != "table"}
    if "table" in parts[0]:
        results["table"] = torch.stack([part["table"] for part in parts]).sum(0)
    return results


def results_of(case: Case, inputs: Inputs, attention: Callable[[], Tensor], biased: bool) -> dict[str, Tensor]:
    """Return the output of `attention` and the case's gradients, by name. The output is "out"."""
    leaves = inputs.leaves(case, biased)
    with torch.set_grad_enabled(case.trains):
        out = attention()
    keep = case.mode == BACKWARD
    gradients = torch.autograd.grad(out, list(leaves.values()), inputs.grad_out, retain_graph=keep) if leaves else ()
    return {"out": out.detach(), **dict(zip(leaves, gradients, strict=True))}


def step_of(case: Case, inputs: Inputs, attention: Callable[[], Tensor], biased: bool) -> Callable[[], object]:
    """Return the timed function: the forward without a graph, a training step, or the backward alone."""
    leaves = list(inputs.leaves(case, biased).values())

    def forward() -> Tensor:
        with torch.no_grad():
            return attention()

    def train() -> tuple[Tensor, ...]:
        return torch.autograd.grad(attention(), leaves, inputs.grad_out)

    if case.mode == BACKWARD:
        out = attention()
        return lambda: torch.autograd.grad(out, leaves, inputs.grad_out, retain_graph=True)
    return train if case.trains else forward


def chosen_device(requested: str | None) -> str:
    """Return the requested device. The default is "cuda" if there is a CUDA device, else "cpu"."""
    return requested or ("cuda" if torch.cuda.is_available() else "cpu")


def cases(device: str, full: bool) -> list[Case]:
    """List the cases for "cpu" or "cuda": a quick set, or every size if `full`."""
    sizes = _FULL[device] if full else _QUICK[device]
    return [Case(mode, batch, (side, side), dtype, device) for mode, dtype, shapes in sizes for batch, side in shapes]


_LARGE = ((64, 14), (32, 24), (8, 32), (8, 40))  # batch, side of the window
_SINGLE = ((1, 24), (1, 32), (1, 40))
_QUICK = {
    "cpu": (
        (FORWARD, torch.float32, ((1, 14), (8, 14), (1, 24), (1, 32))),
        (FORWARD, torch.bfloat16, ((1, 24),)),
        (BACKWARD, torch.float32, ((1, 14),)),
        (TRAINING, torch.float32, ((1, 14), (1, 24))),
        (TRAINING_FROZEN, torch.float32, ((1, 14), (1, 24))),
    ),
    "cuda": (
        (FORWARD, torch.bfloat16, _LARGE + _SINGLE),
        (TRAINING, torch.bfloat16, _LARGE + _SINGLE),
        (BACKWARD, torch.bfloat16, _LARGE + _SINGLE),
        (TRAINING_FROZEN, torch.bfloat16, _LARGE + _SINGLE),
        (FORWARD, torch.float16, ((8, 32),)),
        (TRAINING, torch.float16, ((8, 32),)),
        (FORWARD, torch.float32, ((8, 32),)),
        (TRAINING, torch.float32, ((8, 32),)),
    ),
}
_FULL = {
    "cpu": (
        (FORWARD, torch.float32, ((1, 14), (8, 14), *_SINGLE, *_LARGE)),
        (FORWARD, torch.bfloat16, ((1, 24), (1, 40), *_LARGE)),
        (BACKWARD, torch.float32, ((1, 14), (1, 24), (1, 32), (8, 14), (8, 24))),
        (TRAINING, torch.float32, ((1, 14), (1, 24), (1, 32), (8, 14), (8, 24))),
        (TRAINING_FROZEN, torch.float32, ((1, 14), (1, 24), (1, 32), (8, 14), (8, 24))),
    ),
    "cuda": tuple(
        (mode, dtype, _LARGE + _SINGLE)
        for dtype in (torch.bfloat16, torch.float16, torch.float32)
        for mode in (FORWARD, TRAINING, BACKWARD, TRAINING_FROZEN)
    ),
}
