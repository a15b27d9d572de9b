"""Clocks on a simulated device, and interleaved timing by a fake clock."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from beit_fast.tuning import timer


class SimulatedDevice:
    """A device with one queue and a host that launches into it; both have a clock in seconds."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
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
        monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: self.launch(0.0, cycles / timer.SPIN_RATE))
        monkeypatch.setattr(timer, "synchronize", lambda device: self.wait())
        monkeypatch.setattr(timer.time, "perf_counter", lambda: self.host)

    def launch(self, cost: float, work: float) -> None:
        self.host += cost
        self.device = max(self.device, self.host) + work

    def wait(self) -> None:
        self.host = max(self.host, self.device)


@pytest.mark.parametrize(("cost", "work"), [(1e-4, 2e-5), (2e-5, 1e-3), (3e-3, 1e-5)])
def test_device_clock_excludes_launches(monkeypatch: pytest.MonkeyPatch, cost: float, work: float) -> None:
    simulated = SimulatedDevice(monkeypatch)
    clock = timer.clock_of("cuda")
    iterations, rounds = clock.plan(lambda: simulated.launch(cost, work))
    assert 10 <= rounds <= 30
    for _ in range(rounds):
        started = clock()
        for _ in range(iterations):
            simulated.launch(cost, work)
        assert clock() - started == pytest.approx(iterations * work)
    assert clock.queued_ahead is True
    assert timer.single_call(lambda: simulated.launch(cost, work), "cuda") == pytest.approx(cost + work)


def test_device_clock_reports_a_device_that_waits_for_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    simulated = SimulatedDevice(monkeypatch)
    clock = timer.clock_of("cuda")
    clock.plan(lambda: simulated.launch(1e-4, 2e-5))
    for late in (False, False, True, False):
        clock()
        simulated.launch(1.0 if late else 1e-4, 2e-5)
        clock()
    assert clock.queued_ahead is True  # one late round of four is allowed
    started = clock()
    simulated.launch(1.0, 2e-5)
    assert clock() - started > 0.5
    assert clock.queued_ahead is False


class CountingClock:
    """A clock that only the steps advance."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def plan(self, step: timer.Step) -> tuple[int, int]:
        step()
        return 2, 3


def test_interleaved_medians_steps_in_turns_have_their_own_median() -> None:
    clock, order = CountingClock(), []
    costs = {"a": iter([1.0, 1.0, 1.0, 9.0, 9.0, 2.0, 2.0]), "b": iter([4.0, 4.0, 3.0, 3.0, 5.0, 5.0])}

    def step(name: str) -> None:
        order.append(name)
        clock.now += next(costs[name])

    found = timer.interleaved_medians({"a": lambda: step("a"), "b": lambda: step("b")}, clock, rounds=3)
    assert found == {"a": 2.0, "b": 4.0}
    assert "".join(order) == "a" + 3 * "aabb"
