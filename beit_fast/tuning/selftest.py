"""Check every kernel of a device against fp64, and time it."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from ..ops.dispatch import availability
from .child import Child, ChildError
from .problems import Problem, Results
from .reference import error_budgets, relative_error
from .selftest_cases import Check
from .timer import Clock, interleaved_medians

ROUNDS = 10
"""Timed rounds of each step."""
LIMIT = 60.0
"""Seconds that a check of a refused kernel may take."""
WHOLE = 100.0
"""Seconds after which a self-test stops if a check did not end: with imports the command takes two minutes."""


@dataclass(frozen=True)
class Row:
    """The result of one check.

    Attributes:
        kernel: The operator.
        case: Sizes and options.
        dtype: dtype of the operands.
        bias: Layout of the bias; "-" for operators without one.
        served_by: The kernel that ran.
        errors: Relative error of each result against fp64.
        budgets: Allowed errors.
        same_bits: Whether each launch, replay or stream gave the bits of the first launch, by name.
        seconds: Median seconds of the operator and of the baseline, by step.
        baseline: What the times are compared with.
        failures: What is wrong; empty if the check passed.
        refused: Why the dispatcher refuses this kernel here; then nothing is timed.
    """

    kernel: str
    case: str
    dtype: str
    bias: str
    served_by: str
    errors: dict[str, float] = field(default_factory=dict)
    budgets: dict[str, float] = field(default_factory=dict)
    same_bits: dict[str, bool] = field(default_factory=dict)
    seconds: dict[str, tuple[float, float]] = field(default_factory=dict)
    baseline: str = ""
    failures: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        return not self.failures

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "passed": self.passed}


def run_checks(
    checks: Sequence[Check], device: torch.device, clock_of: Callable[[], Clock] | None, limit: float = LIMIT
) -> Iterator[Row]:
    """Yield a row for each check, as soon as it is known; refused kernels are the last.

    Args:
        checks: What to check.
        device: The device of the kernels.
        clock_of: Returns a new timer; None measures no time.
        limit: Seconds for each check of a refused kernel.
    """
    started = time.monotonic()
    for check in checks:
        if not check.refused:
            yield run_check(check, device, clock_of)
            gc.collect()
    yield from _run_refused([check for check in checks if check.refused], device, limit, started + WHOLE)


def _run_refused(checks: Sequence[Check], device: torch.device, limit: float, deadline: float) -> Iterator[Row]:
    """Yield a row for each check of a refused kernel.

    It runs in a child process, because it may never end. After a check without an end, the others have until
    `deadline` together.
    """
    child, is_late = Child(_check_refused), False
    try:
        for check in checks:
            remaining = min(limit, deadline - time.monotonic()) if is_late else limit
            try:
                if remaining <= 0:
                    raise ChildError(f"not run: {WHOLE:.0f} s of the self-test are over")
                row = child.call(check, device, limit=remaining)
            except ChildError as error:
                row, is_late = _with(_row_of(check), failures=(str(error),)), True
            yield row
            # A fault of CUDA fails every later call of its process.
            if not row.errors:
                child.close()
    finally:
        child.close()


def _check_refused(check: Check, device: torch.device) -> Row:
    """Check a refused kernel, in a child process."""
    with availability.ignore_compiler_hazards():
        row = run_check(check, device, None)
    gc.collect()
    return row


@contextmanager
def count_kernels(kernel: str) -> Iterator[Callable[[], int]]:
    """Count the different Triton kernels that are launched inside the context.

    Args:
        kernel: The attention kernel that serves; 0 if it is not compiled by Triton.
    """
    if kernel != "triton":
        yield lambda: 0
        return
    from ..kernels.common.launch import observe_launches

    with observe_launches() as launched:
        yield lambda: len({compiled.hash for compiled in launched})


def run_check(check: Check, device: torch.device, clock_of: Callable[[], Clock] | None) -> Row:
    """Check one kernel; an exception is a failure of the row."""
    row = _row_of(check)
    if check.refused:
        clock_of = None
    try:
        with fp32_precision("tf32" if check.tf32 else "ieee"):
            return _checked(row, check.build(device), check.dtype, device, clock_of)
    except Exception as error:  # one kernel that fails to compile must not hide the others
        text = " ".join(str(error).split()) or type(error).__name__
        return _with(row, failures=(f"{type(error).__name__}: {text}",))


def _row_of(check: Check) -> Row:
    return Row(check.kernel, check.case, check.dtype_label, check.bias, check.served_by, refused=check.refused)


def _checked(
    row: Row, problem: Problem, dtype: torch.dtype, device: torch.device, clock_of: Callable[[], Clock] | None
) -> Row:
    results = problem.run()
    exact, eager = problem.reference(torch.float64), problem.reference(dtype)
    budgets = error_budgets(exact, eager, problem.outputs, dtype)
    errors = {name: relative_error(results[name], value) for name, value in exact.items()}
    failures = [
        f"{name}: relative error {errors[name]:.2e} is over the budget {budget:.2e}"
        for name, budget in budgets.items()
        if not errors[name] <= budget  # NaN is not within any budget
    ]
    # PyTorch's operations may copy from the host, which a capture does not allow.
    repetitions = _repetitions(problem, device if row.served_by != "torch" else torch.device("cpu"))
    same_bits = {name: _same(results, repeated()) for name, repeated in repetitions.items()}
    failures += [f"{name}: other bits than the first launch" for name, same in same_bits.items() if not same]
    seconds = {} if failures or clock_of is None else _times(problem, clock_of)
    baseline = problem.baseline if seconds else ""
    found = {"errors": errors, "budgets": budgets, "same_bits": same_bits, "seconds": seconds, "baseline": baseline}
    return _with(row, **found, failures=tuple(failures))


def _with(row: Row, **values: Any) -> Row:
    return Row(**{**vars(row), **values})


def _same(left: Results, right: Results) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def _repetitions(problem: Problem, device: torch.device) -> dict[str, Callable[[], Results]]:
    """Return the ways to run a call again."""
    ways: dict[str, Callable[[], Results]] = {"launch 2": problem.run, "launch 3": problem.run}
    if device.type == "cuda":
        ways["CUDA graph"] = lambda: _replayed(problem.run, device)
        ways["second stream"] = lambda: _on_second_stream(problem.run, device)
    return ways


def _on_second_stream(run: Callable[[], Results], device: torch.device) -> Results:
    current, stream = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        results = run()
    current.wait_stream(stream)
    return results


def _replayed(run: Callable[[], Results], device: torch.device) -> Results:
    """Capture a call in a CUDA graph and replay it.

    The results of the capture are cleared before the replay.
    """
    _on_second_stream(run, device)  # the warm-up that torch asks for before a capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()
    for result in results.values():
        result.zero_()
    graph.replay()
    torch.cuda.synchronize(device)
    return {name: result.clone() for name, result in results.items()}


def _times(problem: Problem, clock_of: Callable[[], Clock]) -> dict[str, tuple[float, float]]:
    """Return median seconds of the operator and of the baseline, by step."""
    found = {}
    for name, (ours, baseline) in problem.timed.items():
        baseline()
        medians = interleaved_medians({"ours": ours, "baseline": baseline}, clock_of(), ROUNDS)
        found[name] = (medians["ours"], medians["baseline"])
    return found


@contextmanager
def fp32_precision(precision: str) -> Iterator[None]:
    """Set the precision of fp32 products on CUDA: "tf32" or "ieee"."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = precision
    try:
        yield
    finally:
        matmul.fp32_precision = before
