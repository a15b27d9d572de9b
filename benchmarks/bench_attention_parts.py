"""The kernels of attention one by one, with and without the bias: `pytest benchmarks/bench_attention_parts.py`.

dK/dV, dQ and dBias each run alone, with the preprocessing and the packing of the bias that they need. The row of
"backward" runs all of them. A GPU is required.
"""

from __future__ import annotations

import statistics
from dataclasses import replace

import pytest
import torch

from beit_fast.ops.dispatch import availability
from beit_fast.tuning.reference import relative_error
from beit_fast.tuning.timer import Clock, clock_of, interleaved_times
from beit_fast.tuning.tune import Trial
from beit_fast.tuning.tune_jobs import ATTENTION_KERNELS, Shape, attention_trial

from .harness.cases import DTYPE_NAMES, chosen_device
from .harness.session import Session

BENCH = "attention parts"
ROUNDS = 20
PARTS = (*ATTENTION_KERNELS, "backward")
SHAPES = (
    Shape((14, 14), 64, torch.bfloat16),
    Shape((24, 24), 16, torch.bfloat16),
    Shape((24, 24), 1, torch.bfloat16),
    Shape((40, 40), 4, torch.bfloat16),
)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention_parts(shape: Shape, session: Session, request: pytest.FixtureRequest) -> None:
    device = chosen_device(request.config.option.device)
    if device != "cuda":
        pytest.skip("the kernels of attention are timed one by one on a GPU")
    # The parts are launched without the dispatcher; a refused pair of GPU and Triton publishes no speed.
    reasons = availability.compiler_hazards_of(torch.device(device))
    if (reason := "; ".join(reasons) or session.over_budget()) is not None:
        session.leave_out(str(shape), "all parts", reason, BENCH)
        pytest.skip(reason)
    time_parts(shape, torch.device(device), clock_of(device), session)


def time_parts(shape: Shape, device: torch.device, clock: Clock, session: Session, rounds: int = ROUNDS) -> None:
    """Check every part against fp64, then time all of them in turns, and add a row for each.

    Args:
        shape: Sizes and dtype, with a bias; the parts also run without it.
        device: The device of the kernels.
        clock: The timer.
        session: Receives the rows.
        rounds: Timed rounds of each part.
    """
    trials: dict[tuple[str, bool], Trial] = {}
    for biased in (True, False):
        for part in PARTS if biased else [part for part in PARTS if part != "backward_dbias"]:
            trials[part, biased] = attention_trial(part, replace(shape, biased=biased), device)
    errors = {key: _checked_errors(f"{key[0]} of {shape}", trial) for key, trial in trials.items()}
    named = {_name(*key): key for key in trials}
    times = interleaved_times({name: trials[key].run for name, key in named.items()}, clock, rounds)
    for name, (part, biased) in named.items():
        quartiles = statistics.quantiles(times[name], n=4, method="inclusive")
        session.add(
            {
                **{"bench": BENCH, "case": str(shape), "baseline": name, "part": part, "biased": biased},
                **{"batch": shape.batch, "tokens": shape.tokens, "window": list(shape.window)},
                **{"heads": shape.heads, "head_dim": shape.head_dim, "dtype": DTYPE_NAMES[shape.dtype]},
                **{"kernel": "triton", "median": quartiles[1], "iqr": quartiles[2] - quartiles[0]},
                **{"rounds": rounds, "peak_memory": None, "errors": errors[part, biased]},
            }
        )


def _name(part: str, biased: bool) -> str:
    return part if biased else f"{part} without bias"


def _checked_errors(what: str, trial: Trial) -> dict[str, float]:
    """Return the errors of a part.

    Raises:
        ValueError: If an error exceeds its budget; then nothing is timed.
    """
    results = trial.run()
    errors = {name: relative_error(results[name], exact) for name, exact in trial.exact.items()}
    wrong = [f"{name}: {error:.2e}" for name, error in errors.items() if not error <= trial.budgets[name]]
    if wrong:
        raise ValueError(f"{what} is wrong and not timed: {'; '.join(wrong)}")
    return errors
