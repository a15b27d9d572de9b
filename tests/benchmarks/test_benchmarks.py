"""The benchmark house: every peer computes the same thing, wrong is never timed, and pictures say their conditions."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from beit_fast.position_bias import relative_position_index, token_count

from ..support.benchmarks import BENCHMARKS, benchmark_house, run_in_a_copy


@pytest.fixture(scope="module")
def house() -> Iterator[ModuleType]:
    with benchmark_house() as module:
        yield module


def small_case(house: ModuleType, mode: str, dtype: torch.dtype = torch.float32) -> Any:
    return house.harness.cases.Case(mode, 2, (3, 3), dtype, "cpu", heads=2, head_dim=8)


def test_peers_are_declared_once_and_drawn_alike(house: ModuleType) -> None:
    names = [peer.name for peer in house.baselines.attention.PEERS]
    assert len(set(names)) == len(names)
    assert set(names) == set(house.report.plot.STYLES)
    looks = list(house.report.plot.STYLES.values())
    assert len(set(looks)) == len(looks)


def test_every_case_names_itself_once(house: ModuleType) -> None:
    for device in ("cpu", "cuda"):
        for full in (False, True):
            names = [str(case) for case in house.harness.cases.cases(device, full)]
            assert len(set(names)) == len(names) > 0


@pytest.mark.parametrize("mode", ["forward", "backward", "training", "training, frozen table"])
def test_a_gpu_run_has_every_mode_at_every_size(house: ModuleType, mode: str) -> None:
    cases = house.harness.cases.cases("cuda", full=False)
    sizes = {(case.batch, case.tokens) for case in cases if case.mode == mode and case.dtype == torch.bfloat16}
    assert {(64, 197), (32, 577), (8, 1025), (8, 1601), (1, 577), (1, 1025), (1, 1601)} == sizes
    assert {case.dtype for case in cases} == {torch.bfloat16, torch.float16, torch.float32}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("mode", ["forward", "backward", "training", "training, frozen table"])
def test_every_peer_that_can_run_is_right(house: ModuleType, mode: str, dtype: torch.dtype) -> None:
    case = small_case(house, mode, dtype)
    checked = []
    for peer in house.baselines.attention.PEERS:
        if peer.compiles or peer.why_missing(case) is not None:
            continue
        inputs = house.harness.cases.draw(case)
        results = house.harness.cases.results_of(case, inputs, peer.build(case, inputs), peer.biased)
        expected = house.harness.cases.reference(case, peer.biased)
        assert results.keys() == expected.results.keys()
        for name, exact in expected.results.items():
            error = house.harness.cases.relative_error(results[name], exact)
            assert error <= expected.budgets[name], f"{peer.name}: {name}"
        assert results["out"].is_contiguous()
        assert house.harness.cases.step_of(case, inputs, peer.build(case, inputs), peer.biased)() is not None
        checked.append(peer.name)
    assert {"beit_fast triton", "beit_fast eager", "transformers sdpa"} <= set(checked)


def test_a_peer_that_cannot_take_part_says_why(house: ModuleType) -> None:
    training = small_case(house, "training")
    peers = {peer.name: peer for peer in house.baselines.attention.PEERS}
    assert "inference only" in peers["flex_attention"].why_missing(training)
    assert "gradient" in peers["sdpa prebuilt bias"].why_missing(training)
    assert "CUDA backend" in peers["sdpa prebuilt bias cudnn"].why_missing(training)
    on_cuda = house.harness.cases.Case("training", 2, (3, 3), torch.float32, "cuda")
    assert "by name" in peers["sdpa without bias"].why_missing(on_cuda)
    assert "by name" in peers["sdpa prebuilt bias"].why_missing(on_cuda)
    assert "gradient" in peers["sdpa prebuilt bias cudnn"].why_missing(on_cuda)
    assert peers["flex_attention"].why_missing(on_cuda) is None


def test_a_backend_that_is_forced_and_refuses_is_quoted(house: ModuleType) -> None:
    backend = torch.nn.attention.SDPBackend.CUDNN_ATTENTION

    def build(case: Any, inputs: Any) -> Any:
        def run() -> torch.Tensor:
            with torch.nn.attention.sdpa_kernel(backend):
                return torch.nn.functional.scaled_dot_product_attention(inputs.q, inputs.k, inputs.v)

        return run

    refusal = house.baselines.attention._refusal(small_case(house, "forward"), build, False)
    assert "No viable backend" in refusal or "No available kernel" in refusal


def test_a_backend_that_refuses_only_its_backward_is_quoted(house: ModuleType) -> None:
    class Forward(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("no plan for this backward\nand a long trace")

    def build(case: Any, inputs: Any) -> Any:
        return lambda: Forward.apply(inputs.q + inputs.k + inputs.v)

    assert house.baselines.attention._refusal(small_case(house, "forward"), build, False) is None
    assert (
        house.baselines.attention._refusal(small_case(house, "backward"), build, False) == "no plan for this backward"
    )


@pytest.mark.parametrize("window", [(3, 3), (2, 5), (5, 2)])
@pytest.mark.parametrize("name", ["row_by_index", "row_by_coordinates"])
def test_flex_attention_reads_the_rows_of_the_paper(house: ModuleType, name: str, window: tuple[int, int]) -> None:
    row_of = getattr(house.baselines.attention, name)(
        house.harness.cases.Case("forward", 1, window, torch.float32, "cpu")
    )
    tokens = torch.arange(token_count(window), dtype=torch.int32)
    rows = torch.vmap(torch.vmap(row_of, (None, 0)), (0, None))(tokens, tokens)
    assert torch.equal(rows.long(), relative_position_index(window))


def test_a_ready_bias_is_the_gathered_one_with_padded_rows(house: ModuleType) -> None:
    case = small_case(house, "forward")
    inputs = house.harness.cases.draw(case)
    ready = house.baselines.attention._prebuilt_bias(case, inputs)()
    assert torch.equal(ready, house.baselines.attention._gathered_bias(case, inputs)())
    assert ready.stride(-1) == 1
    assert ready.stride(-2) == 16  # 10 tokens


def test_backward_alone_runs_no_forward(house: ModuleType) -> None:
    case = small_case(house, "backward")
    inputs = house.harness.cases.draw(case)
    peer = next(peer for peer in house.baselines.attention.PEERS if peer.name == "beit_fast triton")
    forwards: list[int] = []
    attention = peer.build(case, inputs)

    def counted() -> torch.Tensor:
        forwards.append(1)
        return attention()

    step = house.harness.cases.step_of(case, inputs, counted, True)
    gradients = [step(), step()]
    assert len(forwards) == 1
    exact = house.harness.cases.reference(case, True)
    for once in gradients:
        for name, gradient in zip(("q", "k", "v", "table"), once, strict=True):
            assert house.harness.cases.relative_error(gradient, exact.results[name]) <= exact.budgets[name]


class SimulatedDevice:
    """A device with one queue and a host that launches into it: times in seconds, on two clocks of their own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, clocks: ModuleType) -> None:
        self.host = self.device = 1.0
        simulation = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self, stream: Any) -> None:
                self.time = max(simulation.device, simulation.host)

            def query(self) -> bool:
                return self.time <= simulation.host

            def synchronize(self) -> None:
                simulation.host = max(simulation.host, self.time)

            def elapsed_time(self, end: Event) -> float:
                return (end.time - self.time) * 1e3

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
        monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: self.launch(0.0, cycles / clocks.SPIN_RATE))
        monkeypatch.setattr(clocks, "synchronize", lambda device: self.wait())
        monkeypatch.setattr(clocks.time, "perf_counter", lambda: self.host)

    def launch(self, cost: float, work: float) -> None:
        self.host += cost
        self.device = max(self.device, self.host) + work

    def wait(self) -> None:
        self.host = max(self.host, self.device)


@pytest.mark.parametrize(("cost", "work"), [(1e-4, 2e-5), (2e-5, 1e-3), (3e-3, 1e-5)])
def test_device_clock_leaves_out_what_the_host_needs(
    house: ModuleType, monkeypatch: pytest.MonkeyPatch, cost: float, work: float
) -> None:
    simulated = SimulatedDevice(monkeypatch, house.harness.clocks)
    clock = house.harness.clocks.clock_of("cuda")
    iterations, rounds = clock.plan(lambda: simulated.launch(cost, work))
    assert 10 <= rounds <= 30
    for _ in range(rounds):
        started = clock()
        for _ in range(iterations):
            simulated.launch(cost, work)
        assert clock() - started == pytest.approx(iterations * work)
    assert clock.queued_ahead is True


def test_device_clock_tells_when_the_device_waited_for_the_host(
    house: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    simulated = SimulatedDevice(monkeypatch, house.harness.clocks)
    clock = house.harness.clocks.clock_of("cuda")

    def waiting_step() -> None:
        simulated.launch(1e-4, 2e-5)
        simulated.wait()

    clock.plan(waiting_step)
    started = clock()
    for _ in range(3):
        waiting_step()
    assert clock() - started == pytest.approx(2e-5 + 2 * 1.2e-4)
    assert clock.queued_ahead is False


def test_device_clock_forgives_a_host_that_is_late_now_and_then(
    house: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    simulated = SimulatedDevice(monkeypatch, house.harness.clocks)
    clock = house.harness.clocks.clock_of("cuda")
    clock.plan(lambda: simulated.launch(1e-4, 2e-5))
    for late in (False, False, True, False):
        clock()
        simulated.launch(1.0 if late else 1e-4, 2e-5)
        clock()
    assert clock.queued_ahead is True
    clock()
    simulated.launch(1.0, 2e-5)
    clock()
    assert clock.queued_ahead is False


def test_single_call_holds_the_host_part(house: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    simulated = SimulatedDevice(monkeypatch, house.harness.clocks)
    assert house.harness.clocks.single_call(lambda: simulated.launch(1e-4, 2e-5), "cuda") == pytest.approx(1.2e-4)


def test_counts_of_work_and_bytes(house: ModuleType) -> None:
    case = house.harness.cases.Case("forward", 8, (14, 14), torch.bfloat16, "cpu")
    assert case.flops == 4 * 8 * 12 * 197 * 197 * 64
    assert case.least_bytes(biased=False) == 4 * 8 * 197 * 768 * 2
    assert case.least_bytes(biased=True) - case.least_bytes(biased=False) == 732 * 12 * 2
    training = house.harness.cases.Case("training", 8, (14, 14), torch.bfloat16, "cpu")
    assert training.flops * 2 == case.flops * 7
    backward = house.harness.cases.Case("backward", 8, (14, 14), torch.bfloat16, "cpu")
    assert backward.flops + case.flops == training.flops
    lse = 8 * 12 * 197 * 4  # written by the forward of a training step
    assert backward.least_bytes(True) + case.least_bytes(True) + lse == training.least_bytes(True)


PROBE = """
import math
from pathlib import Path

import pytest
import torch

from .harness.cases import Case, textbook_attention
from .baselines.attention import Peer
from beit_fast.position_bias import gather_bias

CALLS = Path(__file__).parent / "calls.txt"


def peer(name, change_bias=lambda bias: bias, change_out=lambda out: out):
    def build(case, inputs):
        def run():
            with CALLS.open("a") as file:
                file.write(name + "\\n")
            bias = change_bias(gather_bias(inputs.table, case.window))
            return change_out(textbook_attention(inputs.q, inputs.k, inputs.v, bias, case.scale))

        return run

    return Peer(name, "a probe", build, lambda case: "probe")


PEERS = [
    peer("right"),
    peer("transposed", change_bias=lambda bias: bias.transpose(1, 2)),
    peer("nan", change_out=lambda out: out * math.nan),
    peer("frozen", change_bias=lambda bias: bias.detach() + 0 * bias),
    Peer("absent", "a probe", lambda case, inputs: None, lambda case: "probe", lambda case: "stayed at home"),
]


@pytest.mark.parametrize("peer", PEERS, ids=str)
def test_probe(peer, race):
    race(Case("training", 2, (3, 3), torch.float32, "cpu", heads=2, head_dim=8), peer)
"""


def test_wrong_is_refused_before_it_is_timed(house: ModuleType, tmp_path: Path) -> None:
    """Only `frozen` has the right output: its table gradient is zero, and that is seen too."""
    done = run_in_a_copy(tmp_path, PROBE, "--benchmark-json=run.json", "--rows=rows.jsonl", "--commit=0123abc")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "3 failed, 1 passed, 1 skipped" in done.stdout
    assert "transposed is wrong on training-2x10-fp32 and was not timed. out: relative error" in done.stdout
    assert "nan is wrong on training-2x10-fp32 and was not timed. out: relative error nan" in done.stdout
    assert "frozen is wrong on training-2x10-fp32 and was not timed. table: relative error" in done.stdout
    assert "absent: stayed at home" in done.stdout
    assert "measured on: " in done.stdout
    calls = (tmp_path / "benchmarks" / "calls.txt").read_text().split()
    assert [calls.count(name) for name in ("transposed", "nan", "frozen")] == [1, 1, 1]
    assert calls.count("right") > 5
    (measured,) = json.loads((tmp_path / "run.json").read_text())["benchmarks"]
    facts = measured["extra_info"]
    assert facts["peer"] == "right"
    assert facts["kernel"] == "probe"
    assert facts["tflops"] == pytest.approx(facts["flops"] / measured["stats"]["median"] / 1e12)
    assert set(facts["errors"]) == {"out", "q", "k", "v", "table"}
    assert facts["least_bytes"] > 0

    logged = house.harness.results.read_results(tmp_path / "rows.jsonl")
    from_pytest = house.harness.results.read_results(tmp_path / "run.json")
    assert logged["rows"] == from_pytest["rows"]
    assert logged["conditions"] == from_pytest["conditions"]
    assert logged["conditions"]["commit"] == "0123abc"
    left_out = {entry["peer"]: entry for entry in logged["left_out"]}
    assert set(left_out) == {"transposed", "nan", "frozen", "absent"}
    assert left_out["absent"] == {"peer": "absent", "reason": "stayed at home", "cases": ["training-2x10-fp32"]}
    assert "was not timed. table: relative error" in left_out["frozen"]["reason"]


def test_a_spent_budget_skips_what_is_left_and_says_so(tmp_path: Path) -> None:
    done = run_in_a_copy(tmp_path, PROBE, "--budget=0", "--rows=rows.jsonl")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "5 skipped" in done.stdout
    conditions, *left_out = map(json.loads, (tmp_path / "rows.jsonl").read_text().splitlines())
    assert conditions["conditions"]["device"] == "cpu"
    assert [entry["left_out"] for entry in left_out] == ["the run's budget of 0 seconds is spent"] * 5


@pytest.mark.parametrize(("target", "bench"), [("gpu-bench", "attention"), ("gpu-bench-models", "model")])
def test_gpu_bench_uses_the_python_at_hand(target: str, bench: str) -> None:
    command = ["make", "--dry-run", target, "RESULTS=elsewhere", "COMMIT=0123abc", "GPU_PYTHON=some-python"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=BENCHMARKS.parent, check=True)
    assert "pip" not in done.stdout
    assert ".venv" not in done.stdout
    assert f"some-python -m pytest benchmarks/bench_{bench}.py --device=cuda" in done.stdout
    assert f'--rows="elsewhere/{target}.jsonl"' in done.stdout
    assert "some-python -m benchmarks.report.targets" in done.stdout
