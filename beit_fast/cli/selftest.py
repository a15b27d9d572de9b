"""`beit-fast selftest`: check every kernel of this machine against fp64, and time it."""

from __future__ import annotations

import contextlib
import functools
import json
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from tqdm import tqdm

from ..ops.dispatch import availability
from ..tuning.selftest import Row, count_kernels, run_checks
from ..tuning.selftest_cases import checks_for
from ..tuning.timer import Clock, clock_of
from .collect_env import environment
from .devices import parse_device
from .measurements import RowLog, check_variables, interrupted, milliseconds, table_lines
from .options import ExitCode, SelftestOptions

_HEADER = (
    "kernel",
    "case",
    "dtype",
    "bias",
    "runs on",
    "out error",
    "grad error",
    "same bits",
    "forward",
    "training",
    "",
)


def selftest(options: SelftestOptions) -> int:
    """Check every kernel and print a row for each case.

    Returns:
        The exit code: 0, or 1 if a case failed.
    """
    with availability.ignore_compiler_hazards() if options.include_refused else contextlib.nullcontext():
        return _selftest(options)


def _selftest(options: SelftestOptions) -> int:
    check_variables()
    device = parse_device(options.device)
    kernel = _serving_kernel(device)
    conditions = environment(device)
    checks, log, rows = checks_for(device, kernel), RowLog(options.rows, conditions), []
    started, is_interrupted = time.monotonic(), False
    with count_kernels(kernel) as compiled, tqdm(total=len(checks), unit="case", disable=None) as bar:
        try:
            for row in run_checks(checks, device, _clock(device, kernel)):
                rows.append(row)
                log.add(row.as_json())
                bar.set_postfix_str(f"{row.kernel} {row.dtype}", refresh=False)
                bar.update()
        except KeyboardInterrupt:
            is_interrupted = True
        facts = {"device": str(device), "kernel": kernel, "compiled": compiled()}
    facts |= {"seconds": round(time.monotonic() - started, 1), "interrupted": is_interrupted}
    passed = all(row.passed for row in rows) and not is_interrupted
    if options.json:
        listed = [row.as_json() for row in rows]
        print(json.dumps({"environment": conditions, **facts, "passed": passed, "rows": listed}, indent=1))
    else:
        print("\n".join(format_rows(rows, conditions, facts)))
    if is_interrupted:
        return interrupted("selftest", f"{len(rows)} of {len(checks)} cases")
    return ExitCode.DONE if passed else ExitCode.SOME_FAILED


def _serving_kernel(device: torch.device) -> availability.KernelName:
    """Return the attention kernel of a device.

    Raises:
        ValueError: If no kernel serves; the error lists the reasons.
    """
    kernel = availability.serving_kernel(device, torch.float32, 64)
    if kernel is None:
        name: availability.KernelName = "triton" if device.type == "cuda" else "torch"
        reasons = availability.attention_unsupported_reasons(name, device, torch.float32, 64)
        hint = "; --include-refused runs it all the same" if availability.compiler_hazards_of(device) else ""
        raise ValueError(f"no kernel runs on {device}: {'; '.join(reasons)}{hint}")
    return kernel


def _clock(device: torch.device, kernel: str) -> Callable[[], Clock] | None:
    # Times of interpreted kernels are meaningless.
    return None if kernel == "triton-interpret" else functools.partial(clock_of, device)


def format_rows(rows: Sequence[Row], conditions: dict[str, Any], facts: dict[str, Any]) -> list[str]:
    """Format the result as lines: conditions, one line a case, failures, and the verdict."""
    lines = [
        f"beit_fast {conditions['beit_fast']} on {conditions['device_name']}",
        f"torch {conditions['torch']}, CUDA {conditions['cuda'] or 'none'}, Triton {conditions['triton'] or 'none'}",
    ]
    if facts["device"] == "cpu":
        lines.append(f"The GPU kernels are not tested here: this is a CPU, and attention runs {facts['kernel']!r}.")
    lines += [
        "Errors are relative, with the part of the budget. Times are ms / ms of SDPA with the dense bias, or of",
        "",
    ]
    lines[-2] += " PyTorch's operations for the other kernels."
    lines += table_lines(_HEADER, [_cells(row) for row in rows])
    lines += [f"refused: {reason}" for reason in dict.fromkeys(reason for row in rows for reason in row.refused)]
    failed = [row for row in rows if not row.passed]
    for row in failed:
        lines += ["", f"{row.kernel} {row.case} {row.dtype} {row.bias}:", *(f"  {text}" for text in row.failures)]
    passed = (
        f"{len(rows)} cases passed before the interrupt" if facts["interrupted"] else f"all {len(rows)} cases passed"
    )
    verdict = f"{len(failed)} of {len(rows)} cases failed" if failed else passed
    # Refused kernels are compiled in another process.
    is_counted = facts["compiled"] and not any(row.refused for row in rows)
    compiled = f", {facts['compiled']} kernels" if is_counted else ""
    return [*lines, "", f"{verdict} ({facts['seconds']} s{compiled})"]


def _cells(row: Row) -> tuple[str, ...]:
    gradients = [name for name in row.errors if name.startswith("d")]
    outputs = [name for name in row.errors if name not in gradients]
    same = "-" if not row.same_bits else "yes" if all(row.same_bits.values()) else "NO"
    times = [_time(row, name) for name in ("forward", "training")]
    errors = [_error(row, outputs), _error(row, gradients)]
    return (
        row.kernel,
        row.case,
        row.dtype,
        row.bias,
        row.served_by,
        *errors,
        same,
        *times,
        ("ok" if row.passed else "FAILED") + (", refused" if row.refused else ""),
    )


def _error(row: Row, names: Sequence[str]) -> str:
    """Return the error that is closest to its budget, and the ratio."""
    if not names:
        return "-"
    worst = max(names, key=lambda name: row.errors[name] / row.budgets[name])
    return f"{row.errors[worst]:.1e} ({row.errors[worst] / row.budgets[worst]:.0%})"


def _time(row: Row, step: str) -> str:
    if step not in row.seconds:
        return "-"
    ours, baseline = row.seconds[step]
    return f"{milliseconds(ours)} / {milliseconds(baseline)}"
