"""The self-test on this process's kernels: passing, wrong and unsteady operators."""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from beit_fast.ops.dispatch import availability
from beit_fast.tuning import selftest
from beit_fast.tuning.child import Child, ChildError
from beit_fast.tuning.problems import Problem, Results
from beit_fast.tuning.selftest_cases import Check, checks_for

from .test_timer import CountingClock

CPU = torch.device("cpu")
EXACT = torch.linspace(-1, 1, 65, dtype=torch.float64)


def problem(results: Callable[[], Results], timed: bool = False) -> Problem:
    """A problem whose reference is EXACT for an output and a gradient."""

    def reference(dtype: torch.dtype) -> Results:
        return {"out": EXACT.to(dtype), "dq": EXACT.to(dtype)}

    steps = {"forward": (results, results)} if timed else {}
    return Problem(results, reference, ("out",), steps, "a baseline")


def check_of(build: Callable[[torch.device], Problem], dtype: torch.dtype = torch.float16) -> Check:
    return Check("attention", "a case", dtype, "paired", "cpp", build)


def run(results: Callable[[], Results], **options: bool) -> selftest.Row:
    return selftest.run_check(check_of(lambda device: problem(results, **options)), CPU, CountingClock)


def both(value: Tensor) -> Results:
    return {"out": value, "dq": value.clone()}


def test_run_check_result_within_budget_passes_and_is_timed() -> None:
    row = run(lambda: both(EXACT.half() * 1.001), timed=True)
    assert row.passed
    assert row.errors.keys() == row.budgets.keys() == {"out", "dq"}
    assert 0 < row.errors["out"] < row.budgets["out"] <= row.budgets["dq"]
    assert row.same_bits == {"launch 2": True, "launch 3": True}
    assert row.seconds.keys() == {"forward"}
    assert row.baseline == "a baseline"
    assert row.as_json()["passed"] is True


@pytest.mark.parametrize("wrong", [EXACT.half() * 1.01, torch.full((65,), torch.nan).half()])
def test_run_check_result_over_budget_fails_and_is_not_timed(wrong: Tensor) -> None:
    row = run(lambda: {"out": EXACT.half(), "dq": wrong}, timed=True)
    assert not row.passed
    (failure,) = [text for text in row.failures if "budget" in text]
    assert failure.startswith("dq: relative error")
    assert row.seconds == {}


def test_run_check_other_bits_in_a_later_launch_fails() -> None:
    launches = []

    def unsteady() -> Results:
        launches.append(None)
        value = EXACT.half()
        if len(launches) == 3:
            value[32] = 1e-7
        return both(value)

    row = run(unsteady, timed=True)
    assert row.same_bits == {"launch 2": True, "launch 3": False}
    assert row.failures == ("launch 3: other bits than the first launch",)
    assert row.seconds == {}


def test_run_checks_exception_fails_its_row_and_the_next_one_runs() -> None:
    def broken(device: torch.device) -> Problem:
        raise RuntimeError("no code\nfor this")

    checks = [check_of(broken), check_of(lambda device: problem(lambda: both(EXACT.half())))]
    rows = list(selftest.run_checks(checks, CPU, None))
    assert [row.passed for row in rows] == [False, True]
    assert rows[0].failures == ("RuntimeError: no code for this",)


def test_repetitions_on_cuda_add_a_graph_and_a_stream() -> None:
    found = selftest._repetitions(problem(lambda: both(EXACT)), torch.device("cuda"))
    assert list(found) == ["launch 2", "launch 3", "CUDA graph", "second stream"]


def test_checks_for_every_kernel_cover_operators_dtypes_and_layouts() -> None:
    kernel = availability.serving_kernel(CPU, torch.float32, 64)
    assert kernel is not None
    checks = checks_for(CPU, kernel)
    assert {check.kernel for check in checks} == {"attention", "residual norm", "linear + GELU", "patch embedding"}
    for name in ("attention", "residual norm", "linear + GELU", "patch embedding"):
        assert {check.dtype for check in checks if check.kernel == name} == {
            torch.bfloat16,
            torch.float16,
            torch.float32,
        }
    layouts = {check.bias for check in checks if check.kernel == "attention"}
    interpreted = {"paired", "plain", "extended", "none"}
    assert layouts == (
        interpreted if kernel == "triton-interpret" else {"packed" if kernel == "cpp" else "table", "none"}
    )
    assert len({(check.kernel, check.case, check.dtype_label, check.bias) for check in checks}) >= len(checks) - 3


def test_checks_of_a_gpu_split_keys_and_run_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    from beit_fast.tuning import selftest_cases

    monkeypatch.setattr(selftest_cases, "_layout", lambda kernel, window, dtype: str(window))
    checks = [check for check in checks_for(torch.device("cuda"), "triton") if check.kernel == "attention"]
    assert any(check.tf32 for check in checks)
    assert any(check.case.startswith("1x677x12") for check in checks)
    assert all(
        sum(check.bias == layout for check in checks) >= 3 for layout in ("(14, 18)", "(15, 15)", "(2, 298)", "none")
    )


@pytest.mark.parametrize("name", ["attention", "residual norm", "linear + GELU", "patch embedding"])
def test_run_check_kernel_of_this_process_passes(name: str) -> None:
    kernel = availability.serving_kernel(CPU, torch.float32, 64)
    assert kernel is not None
    check = next(check for check in checks_for(CPU, kernel) if check.kernel == name)
    row = selftest.run_check(check, CPU, None)
    assert row.passed, row.failures
    assert row.served_by in ("cpp", "torch", "triton-interpret")


def test_run_check_wrong_table_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that forgets the bias fails, because tables are N(0, 1)."""
    from beit_fast.tuning import problems

    original = problems.rel_pos_attention

    def without_bias(*arguments: object, **options: object) -> Tensor:
        q, k, v, table, window = arguments
        assert isinstance(table, Tensor)
        return original(q, k, v, table * 0, window, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(problems, "rel_pos_attention", without_bias)
    kernel = availability.serving_kernel(CPU, torch.float32, 64)
    assert kernel is not None
    check = next(check for check in checks_for(CPU, kernel) if check.kernel == "attention" and check.bias != "none")
    row = selftest.run_check(check, CPU, None)
    assert any(text.startswith("out: relative error") for text in row.failures)
    assert dataclasses.asdict(row)["seconds"] == {}


def test_run_check_refused_kernel_is_checked_and_not_timed() -> None:
    check = check_of(lambda device: problem(lambda: both(EXACT.half()), timed=True))
    row = selftest.run_check(dataclasses.replace(check, refused=("a fault",)), CPU, CountingClock)
    assert row.passed
    assert row.refused == ("a fault",)
    assert row.seconds == {}


def test_checks_of_a_refused_pair_label_the_kernels_with_products(monkeypatch: pytest.MonkeyPatch) -> None:
    from beit_fast.tuning import selftest_cases

    monkeypatch.setattr(selftest_cases, "_layout", lambda kernel, window, dtype: "paired")
    monkeypatch.setattr(availability, "compiler_hazards_of", lambda device: ("a fault",))
    monkeypatch.setattr(availability, "_cuda_reasons", lambda device: ())
    with availability.ignore_compiler_hazards():
        checks = checks_for(torch.device("cuda"), "triton")
    labelled = {check.kernel for check in checks if check.refused}
    assert labelled == {"attention", "linear + GELU"}
    assert all(check.served_by == "triton" for check in checks if check.refused)


def endless(device: torch.device) -> Problem:
    time.sleep(600)
    raise AssertionError


def crashing(device: torch.device) -> Problem:
    os._exit(3)


def of_process(device: torch.device) -> Problem:
    raise RuntimeError(f"in {os.getpid()}, faults ignored: {availability._hazards_are_ignored}")


def exact(device: torch.device) -> Problem:
    return problem(lambda: both(EXACT.half()), timed=True)


def refused(build: Callable[[torch.device], Problem]) -> Check:
    return dataclasses.replace(check_of(build), refused=("a fault",))


def test_run_checks_refused_kernel_that_never_ends_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """The child is killed, and the others run in a new one, after the sound kernels."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2])  # the child imports this file
    checks = [refused(build) for build in (endless, exact, crashing, of_process)]
    rows = list(selftest.run_checks([*checks, check_of(exact)], CPU, CountingClock, limit=10))
    assert not multiprocessing.active_children()
    sound, late, passed, crashed, last = rows
    assert [row.refused for row in rows] == [(), *[("a fault",)] * 4]
    assert sound.seconds.keys() == {"forward"}
    assert late.failures == ("no end within 10 s",)
    assert (passed.failures, passed.seconds, set(passed.errors)) == ((), {}, {"out", "dq"})
    assert crashed.failures == ("the child process ended with exit code 3",)
    (text,) = last.failures
    assert text.endswith("faults ignored: True")
    assert f"in {os.getpid()}," not in text


def test_run_checks_after_a_kernel_without_end_the_command_ends_in_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now, limits, closed = [0.0], [], []

    class SimulatedChild:
        """Each check takes its whole limit."""

        def __init__(self, function: object) -> None: ...

        def call(self, check: Check, device: torch.device, limit: float) -> selftest.Row:
            limits.append(limit)
            now[0] += limit
            raise ChildError(f"no end within {limit:.0f} s")

        def close(self) -> None:
            closed.append(len(limits))

    monkeypatch.setattr(selftest, "Child", SimulatedChild)
    monkeypatch.setattr(selftest, "time", SimpleNamespace(monotonic=lambda: now[0]))
    rows = list(selftest.run_checks([refused(exact)] * 4, CPU, None, limit=70))
    assert limits == [70, 30]
    assert [row.failures[0] for row in rows] == [
        "no end within 70 s",
        "no end within 30 s",
        *["not run: 100 s of the self-test are over"] * 2,
    ]
    assert closed[:2] == [1, 2]


def test_child_interrupted_is_killed() -> None:
    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    child = Child(time.sleep)
    child.call(0, limit=60)
    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    try:
        with pytest.raises(KeyboardInterrupt):
            child.call(600, limit=60)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert not multiprocessing.active_children()


def test_child_is_not_interrupted_by_itself(capfd: pytest.CaptureFixture[str]) -> None:
    """Ctrl-C of a terminal reaches both processes; the parent decides and prints."""
    child = Child(signal.raise_signal)
    try:
        assert child.call(signal.SIGINT, limit=60) is None
    finally:
        child.close()
    assert capfd.readouterr().err == ""


class SimulatedStream:
    """A stream in which everything has finished."""

    def __init__(self, device: torch.device | None = None) -> None:
        self.waited: list[SimulatedStream] = []

    def wait_stream(self, other: SimulatedStream) -> None:
        self.waited.append(other)


class SimulatedGraph:
    """A CUDA graph that replays by restoring what was captured, or does nothing."""

    def __init__(self, replays: bool) -> None:
        self.replays = replays
        self.captured: list[tuple[Tensor, Tensor]] = []

    def replay(self) -> None:
        for tensor, value in self.captured if self.replays else []:
            tensor.copy_(value)


@pytest.mark.parametrize("replays", [True, False])
def test_run_check_compares_a_replayed_graph_and_a_second_stream(
    replays: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph, streams = SimulatedGraph(replays), []

    @contextlib.contextmanager
    def capture(given: SimulatedGraph) -> Iterator[None]:
        launches.clear()
        yield
        given.captured = [(tensor, tensor.clone()) for tensor in launches[-1].values()]

    @contextlib.contextmanager
    def on(stream: SimulatedStream) -> Iterator[None]:
        streams.append(stream)
        yield

    launches: list[Results] = []

    def run_once() -> Results:
        launches.append(both(EXACT.half()))
        return launches[-1]

    current = SimulatedStream()
    replacements = {"current_stream": lambda device: current, "Stream": SimulatedStream, "stream": on, "graph": capture}
    replacements |= {"CUDAGraph": lambda: graph, "synchronize": lambda device: None}
    for name, replacement in replacements.items():
        monkeypatch.setattr(torch.cuda, name, replacement)
    check = check_of(lambda device: problem(run_once))
    row = selftest.run_check(check, torch.device("cuda"), None)
    assert row.same_bits == {"launch 2": True, "launch 3": True, "CUDA graph": replays, "second stream": True}
    assert row.passed is replays
    # Both sides wait: the stream for the inputs, and the current stream for the results.
    assert all(stream.waited == [current] for stream in streams)
    assert current.waited == streams
