"""Baselines timed in turns, each in its own process.

The threads of one baseline cannot slow another, and a drift of the machine affects all of them alike.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import importlib
import json
import math
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
MODULE = "benchmarks.harness.processes"
ANSWER_SECONDS = 600.0  # a process that does not answer for longer is killed
LONG_CALL = 1.0  # seconds; a longer call is not repeated to estimate its time


class Unavailable(Exception):  # noqa: N818
    """Raised by `prepare` if a baseline cannot run here, with the reason."""


@dataclass(frozen=True)
class Prepared:
    """A step that is ready to be timed.

    Attributes:
        step: The function to time.
        facts: Fields of its row, as JSON values, such as its errors.
        device: Device on which the step must have finished when the clock is read.
    """

    step: Callable[[], object]
    facts: dict[str, Any] = field(default_factory=dict)
    device: str = "cpu"


@dataclass(frozen=True)
class Worker:
    """One baseline of a run.

    Attributes:
        name: Name of the baseline.
        prepare: Top-level function of an importable module, called in the process. It checks the results. An exception
            becomes the `failure` of the result; Unavailable and a lack of CUDA memory become `unavailable`.
        arguments: Keyword arguments of `prepare`, as JSON values.
        environment: Environment variables of the process.
        bytes_needed: Estimated peak memory of the process, for `memory_groups`.
    """

    name: str
    prepare: Callable[..., Prepared]
    arguments: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    bytes_needed: int = 0


@dataclass(frozen=True)
class Result:
    """Measurements of one worker, or the reason why there are none.

    Attributes:
        name: Name of the baseline.
        times: Seconds of one call, for each round.
        iterations: Calls per round.
        facts: Facts that `prepare` returned.
        peak_memory: Bytes of one call above `loaded_memory`.
        loaded_memory: Bytes that the process holds between calls.
        failure: Why it failed, if it did.
        unavailable: Why it cannot run here, if it cannot.
    """

    name: str
    times: tuple[float, ...] = ()
    iterations: int = 0
    facts: dict[str, Any] = field(default_factory=dict)
    peak_memory: int | None = None
    loaded_memory: int | None = None
    failure: str | None = None
    unavailable: str | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.times)

    @property
    def iqr(self) -> float:
        first, _, third = statistics.quantiles(self.times, n=4, method="inclusive")
        return third - first


def run_workers(
    workers: Sequence[Worker],
    *,
    threads: int = 1,
    rounds: int = 9,
    round_seconds: float = 0.03,
    memory: bool = False,
) -> list[Result]:
    """Time workers in turns, each in its own process.

    All processes prepare first, one after the other. Each round then times every worker, alternately in forward and in
    reverse order. A worker makes one untimed call before its timed ones.

    Args:
        workers: The baselines.
        threads: Threads of each process.
        rounds: Number of rounds.
        round_seconds: Approximate time of a worker in each round.
        memory: Whether to measure memory after the last round.

    Returns:
        Results in the order of `workers`.
    """
    with contextlib.ExitStack() as stack:
        processes = [stack.enter_context(_start(worker, threads, round_seconds)) for worker in workers]
        for number in range(rounds):
            for process in processes if number % 2 == 0 else reversed(processes):
                process.run_round()
        if memory:
            for process in processes:
                process.measure_memory()
        return [process.result for process in processes]


def free_memory(device: str) -> int | None:
    """Return 90 % of the free bytes of `device`. It is None if the system does not report them."""
    if device == "cuda":
        import torch

        return torch.cuda.mem_get_info()[0] * 9 // 10
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    kibibytes = [int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    return kibibytes[0] * 1024 * 9 // 10 if kibibytes else None


def memory_groups(workers: Sequence[Worker], room: int | None) -> tuple[list[list[Worker]], dict[str, str]]:
    """Split workers into groups whose processes fit into memory together.

    The first worker is in every group, so that each of the others is compared with it.

    Args:
        workers: The baselines.
        room: Free bytes; None for unlimited memory.

    Returns:
        The groups, and reasons by name of the workers that do not fit at all.
    """
    groups: list[list[Worker]] = []
    too_large = {}
    for worker in workers:
        first = [workers[0]] if worker is not workers[0] else []
        needed = sum(one.bytes_needed for one in [*first, worker])
        if room is not None and needed > room:
            too_large[worker.name] = f"memory: about {needed >> 20} MiB are needed, {room >> 20} MiB are free"
        elif not groups or (room is not None and sum(one.bytes_needed for one in [*groups[-1], worker]) > room):
            groups.append([*first, worker])
        else:
            groups[-1].append(worker)
    return groups, too_large


def run_once(function: Callable[..., Prepared], arguments: dict[str, Any], threads: int = 1) -> Result:
    """Call `prepare` in its own process, for the file that it writes."""
    with _start(Worker(function.__qualname__, function, arguments), threads, 0.0) as process:
        return process.result


@contextlib.contextmanager
def _start(worker: Worker, threads: int, round_seconds: float) -> Iterator[_Process]:
    command = [sys.executable, "-m", MODULE]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), **worker.environment}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    started = _Process(worker, process)
    try:
        started.prepare(threads, round_seconds)
        yield started
    finally:
        process.kill()
        process.communicate()


class _Process:
    """The process of a worker, seen from the parent: one line of JSON each way."""

    def __init__(self, worker: Worker, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.prepare_function = worker.prepare
        self.arguments = worker.arguments
        self.result = Result(worker.name)

    def prepare(self, threads: int, round_seconds: float) -> None:
        answer = self._ask(
            module=self.prepare_function.__module__,
            function=self.prepare_function.__qualname__,
            arguments=self.arguments,
            threads=threads,
            round_seconds=round_seconds,
        )
        self._note(facts=answer.get("facts", {}), iterations=answer.get("iterations", 0))

    def run_round(self) -> None:
        answer = self._ask(do="round")
        if "seconds" in answer:
            self._note(times=(*self.result.times, answer["seconds"]))

    def measure_memory(self) -> None:
        answer = self._ask(do="memory")
        self._note(peak_memory=answer.get("peak"), loaded_memory=answer.get("loaded"))

    def _note(self, **changes: Any) -> None:
        self.result = dataclasses.replace(self.result, **changes)

    def _ask(self, **request: Any) -> dict[str, Any]:
        """Send a request and return the answer. A failure returns {} and discards all times."""
        if self.result.failure is not None or self.result.unavailable is not None:
            return {}
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        timer = threading.Timer(ANSWER_SECONDS, self.process.kill)
        timer.start()
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            timer.cancel()
        answer = json.loads(line) if line else {"failure": f"its process ended with code {self.process.wait()}"}
        if "failure" in answer or "unavailable" in answer:
            self._note(failure=answer.get("failure"), unavailable=answer.get("unavailable"), times=(), iterations=0)
        return answer


class Server:
    """Answers the requests to one worker: the first prepares it, the others are rounds and memory."""

    def __init__(self) -> None:
        self._prepared: Prepared | None = None
        self._iterations = 0

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Return measurements, or the reason why there are none."""
        import torch

        try:
            if self._prepared is None:
                return self._prepare(request)
            return self._round() if request["do"] == "round" else _memory(self._prepared)
        except Unavailable as reason:
            return {"unavailable": str(reason)}
        except torch.OutOfMemoryError as error:
            return {"unavailable": f"memory: {error}".splitlines()[0]}
        except Exception as error:
            return {"failure": f"{type(error).__name__}: {error}"}

    def _prepare(self, request: dict[str, Any]) -> dict[str, Any]:
        import torch

        torch.set_num_threads(request["threads"])
        module = importlib.import_module(request["module"])
        prepared = getattr(module, request["function"])(**request["arguments"])
        self._iterations = _calls_a_round(prepared, request["round_seconds"])
        self._prepared = prepared
        return {"facts": prepared.facts, "iterations": self._iterations}

    def _round(self) -> dict[str, Any]:
        assert self._prepared is not None
        self._prepared.step()
        return {"seconds": _seconds(self._prepared, self._iterations)}


def main() -> None:
    """Run in the process of a worker: answer each line of stdin with a line of stdout."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # stdout of the baseline must not mix with the answers
    server = Server()
    for line in sys.stdin:
        answer = server.answer(json.loads(line))
        if gc.isenabled():  # after the first request: no collection while the clock runs
            gc.collect()
            gc.freeze()
            gc.disable()
        print(json.dumps(answer), file=answers, flush=True)


def _calls_a_round(prepared: Prepared, round_seconds: float) -> int:
    """Return the calls that fill a round. The estimate uses the fastest of three warm calls."""
    once = _seconds(prepared, 1)
    if once < max(round_seconds, LONG_CALL):
        once = min(_seconds(prepared, 1) for _ in range(3))
    return max(1, math.ceil(round_seconds / once))


def _seconds(prepared: Prepared, iterations: int) -> float:
    from beit_fast.tuning.timer import synchronize

    synchronize(prepared.device)
    started = time.perf_counter()
    for _ in range(iterations):
        prepared.step()
    synchronize(prepared.device)
    return (time.perf_counter() - started) / iterations


def _memory(prepared: Prepared) -> dict[str, int | None]:
    from .memory import loaded_memory, peak_memory

    loaded = loaded_memory(prepared.device)
    return {"peak": peak_memory(prepared.step, prepared.device), "loaded": loaded}


if __name__ == "__main__":  # imported by name: the Unavailable of __main__ would be another class
    importlib.import_module(MODULE).main()
