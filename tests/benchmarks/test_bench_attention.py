"""`bench_attention.py` times a baseline only if it is right, and its baselines do what their names say."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from beit_fast.position_bias import gather_bias, relative_position_index, token_count
from beit_fast.tuning import timer
from benchmarks import bench_attention
from benchmarks.baselines import attention
from benchmarks.harness import cases
from benchmarks.harness.cases import Case
from benchmarks.harness.results import read_results, row_of
from benchmarks.harness.session import Session


def small(mode: str, device: str = "cpu") -> Case:
    return Case(mode, 2, (3, 3), torch.float32, device, heads=2, head_dim=8)


class FakeBenchmark:
    """The fixture of pytest-benchmark, which counts its calls."""

    def __init__(self) -> None:
        self.extra_info: dict[str, Any] = {}
        self.calls = 0
        self.stats: Any = None

    def pedantic(self, step: Callable[[], object], rounds: int, iterations: int, warmup_rounds: int) -> None:
        self.calls += 1
        assert step() is not None
        self.stats = SimpleNamespace(stats=SimpleNamespace(median=0.5, iqr=0.1, rounds=rounds))


def probe(change_bias: Callable[..., Any], change_out: Callable[..., Any]) -> attention.Baseline:
    def build(case: Case, inputs: cases.Inputs) -> Callable[[], torch.Tensor]:
        def run() -> torch.Tensor:
            bias = change_bias(gather_bias(inputs.table, case.window))
            return change_out(cases.textbook_attention(inputs.q, inputs.k, inputs.v, bias, case.scale))

        return run

    return attention.Baseline("probe", "a probe", build, lambda case: "probe")


def same(x: torch.Tensor) -> torch.Tensor:
    return x


@pytest.mark.parametrize(
    ("change_bias", "change_out", "wrong"),
    [
        (same, same, None),
        (lambda bias: bias.transpose(1, 2), same, "out"),
        (same, lambda out: out * math.nan, "out: relative error nan"),
        (lambda bias: bias.detach() + 0 * bias, same, "table"),  # the output is right
    ],
    ids=["right", "transposed", "nan", "frozen"],
)
def test_time_baseline_logs_a_row_or_the_reason(
    change_bias: Callable[..., Any], change_out: Callable[..., Any], wrong: str | None, tmp_path: Path
) -> None:
    session = Session({"device": "cpu"}, tmp_path / "rows.jsonl")
    benchmark, clock = FakeBenchmark(), timer.clock_of("cpu")
    arguments = small("training"), probe(change_bias, change_out), benchmark, clock, session, True
    if wrong is not None:
        with pytest.raises(ValueError, match=rf"wrong and not timed\. {wrong}"):
            bench_attention.time_baseline(*arguments)
        assert (benchmark.calls, session.rows) == (0, [])
        assert f'"left_out": "wrong and not timed. {wrong}' in (tmp_path / "rows.jsonl").read_text()
        return
    bench_attention.time_baseline(*arguments)
    (row,) = session.rows
    assert benchmark.calls == 1
    assert (row["baseline"], row["kernel"], row["median"]) == ("probe", "probe", 0.5)
    assert row["tflops"] == row["flops"] / 0.5 / 1e12
    assert set(row["errors"]) == {"out", "q", "k", "v", "table"}
    logged = read_results(tmp_path / "rows.jsonl")["rows"]
    assert logged == [row_of(row, row)]


@pytest.mark.parametrize(
    ("baseline", "full", "budget", "reason"),
    [
        ("flex_attention", False, None, "compiles for long on a CPU"),
        ("sdpa prebuilt bias cudnn", True, None, "needs a CUDA backend"),
        ("beit_fast triton", True, -1.0, "budget of -1 seconds is spent"),
    ],
)
def test_time_baseline_skips_what_cannot_run(
    baseline: str, full: bool, budget: float | None, reason: str, tmp_path: Path
) -> None:
    session = Session({"device": "cpu"}, tmp_path / "rows.jsonl", budget)
    chosen = next(one for one in attention.BASELINES if one.name == baseline)
    with pytest.raises(pytest.skip.Exception, match=reason):
        bench_attention.time_baseline(small("forward"), chosen, FakeBenchmark(), timer.clock_of("cpu"), session, full)
    assert reason in (tmp_path / "rows.jsonl").read_text()


def test_backend_error_quotes_pytorch_for_forward_and_backward() -> None:
    class Forward(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("no plan for this backward\nand a long trace")

    def sdpa(case: Case, inputs: cases.Inputs) -> Callable[[], torch.Tensor]:
        def run() -> torch.Tensor:
            with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.CUDNN_ATTENTION):
                return torch.nn.functional.scaled_dot_product_attention(inputs.q, inputs.k, inputs.v)

        return run

    def forward(case: Case, inputs: cases.Inputs) -> Callable[[], torch.Tensor]:
        return lambda: Forward.apply(inputs.q + inputs.k + inputs.v)

    assert attention._backend_error(small("forward"), forward, False) is None
    assert attention._backend_error(small("backward"), forward, False) == "no plan for this backward"
    error = attention._backend_error(small("forward"), sdpa, False) or ""
    assert "No viable backend" in error or "No available kernel" in error


@pytest.mark.parametrize("window", [(3, 3), (2, 5)])
@pytest.mark.parametrize("rows", [attention.row_by_index, attention.row_by_coordinates])
def test_flex_attention_reads_the_rows_of_the_paper(rows: Callable[..., Any], window: tuple[int, int]) -> None:
    row_of = rows(Case("forward", 1, window, torch.float32, "cpu"))
    tokens = torch.arange(token_count(window), dtype=torch.int32)
    found = torch.vmap(torch.vmap(row_of, (None, 0)), (0, None))(tokens, tokens)
    assert torch.equal(found.long(), relative_position_index(window))


def test_prebuilt_bias_is_the_gathered_one_with_padded_rows() -> None:
    case = small("forward")
    inputs = cases.draw(case)
    bias = attention._prebuilt_bias(case, inputs)()
    assert torch.equal(bias, attention._gathered_bias(case, inputs)())
    assert bias.stride()[-2:] == (16, 1)  # 10 tokens


def test_backward_step_does_not_run_the_forward() -> None:
    case = small("backward")
    inputs, forwards = cases.draw(case), []
    attend = attention.BASELINES[0].build(case, inputs)
    step = cases.step_of(case, inputs, lambda: forwards.append(1) or attend(), True)
    assert [len(step()), len(step()), len(forwards)] == [4, 4, 1]
