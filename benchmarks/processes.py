"""Peers in processes of their own, timed in turns: no peer's threads slow another, and a drift meets all alike."""

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

FOLDER = Path(__file__).resolve().parent
ANSWER_SECONDS = 600.0  # a process that is silent for longer is ended


@dataclass(frozen=True)
class Prepared:
    """A step that is ready to be timed, and facts about it that JSON can hold, such as its errors."""

    step: Callable[[], object]
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Entrant:
    """One peer of a race.

    prepare: a function at the top of a module of this folder, called in the peer's process. It checks the results: what
    it raises becomes the peer's `failure`, and nothing is timed. arguments: its keyword arguments, as JSON.
    environment: variables of that process.
    """

    name: str
    prepare: Callable[..., Prepared]
    arguments: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    """Seconds of one call, round by round; or no times and the `failure`, which says why."""

    name: str
    times: tuple[float, ...] = ()
    iterations: int = 0
    facts: dict[str, Any] = field(default_factory=dict)
    peak_memory: int | None = None
    failure: str | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.times)

    @property
    def iqr(self) -> float:
        first, _, third = statistics.quantiles(self.times, n=4, method="inclusive")
        return third - first


def race(
    entrants: Sequence[Entrant],
    *,
    threads: int = 1,
    rounds: int = 9,
    round_seconds: float = 0.03,
    memory: bool = False,
) -> list[Result]:
    """Time every entrant in a process of its own with `threads` threads; results in the order of `entrants`.

    All processes prepare one after the other and wait. Then each round calls one after the other, forwards and
    backwards by turns, for about `round_seconds` after one call that is not timed. With `memory`, each measures what
    one call needs at its peak.
    """
    with contextlib.ExitStack() as stack:
        workers = [stack.enter_context(_started(entrant, threads, round_seconds)) for entrant in entrants]
        for number in range(rounds):
            for worker in workers if number % 2 == 0 else reversed(workers):
                worker.run_round()
        if memory:
            for worker in workers:
                worker.measure_memory()
        return [worker.result for worker in workers]


@contextlib.contextmanager
def _started(entrant: Entrant, threads: int, round_seconds: float) -> Iterator[_Worker]:
    command = [sys.executable, "-m", f"{FOLDER.name}.{Path(__file__).stem}"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), **entrant.environment}
    process = subprocess.Popen(
        command, cwd=FOLDER.parent, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    worker = _Worker(entrant, process)
    try:
        worker.prepare(threads, round_seconds)
        yield worker
    finally:
        process.kill()
        process.communicate()


class _Worker:
    """The parent's end of an entrant's process: one line of JSON to it, one line back."""

    def __init__(self, entrant: Entrant, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.prepare_function = entrant.prepare
        self.arguments = entrant.arguments
        self.result = Result(entrant.name)

    def prepare(self, threads: int, round_seconds: float) -> None:
        module = self.prepare_function.__module__.rpartition(".")[2]
        answer = self._ask(
            module=module,
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
        self._note(peak_memory=self._ask(do="memory").get("bytes"))

    def _note(self, **changes: Any) -> None:
        self.result = dataclasses.replace(self.result, **changes)

    def _ask(self, **request: Any) -> dict[str, Any]:
        """The answer; {} once the entrant has failed, which takes back its times."""
        if self.result.failure is not None:
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
        if "failure" in answer:
            self._note(failure=answer["failure"], times=(), iterations=0)
        return answer


def _serve() -> None:
    """The entrant's process: prepare, then one answer for each line, until there are no more."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a peer prints must not be taken for an answer

    def answer(**contents: Any) -> None:
        print(json.dumps(contents), file=answers, flush=True)

    try:
        import torch

        request = json.loads(sys.stdin.readline())
        torch.set_num_threads(request["threads"])
        module = importlib.import_module(f"{FOLDER.name}.{request['module']}")
        prepared = getattr(module, request["function"])(**request["arguments"])
        step = prepared.step
        step()
        iterations = max(1, math.ceil(request["round_seconds"] / min(_seconds(step, 1) for _ in range(3))))
        gc.collect()
        gc.freeze()
        gc.disable()
        answer(facts=prepared.facts, iterations=iterations)
        for line in sys.stdin:
            if json.loads(line)["do"] == "round":
                step()
                answer(seconds=_seconds(step, iterations))
            else:
                answer(bytes=_peak_memory(step))
    except Exception as error:
        answer(failure=f"{type(error).__name__}: {error}")


def _seconds(step: Callable[[], object], iterations: int) -> float:
    started = time.perf_counter()
    for _ in range(iterations):
        step()
    return (time.perf_counter() - started) / iterations


def _peak_memory(step: Callable[[], object]) -> int | None:
    from beit_fast.measure import peak_memory

    return peak_memory(step)


if __name__ == "__main__":
    _serve()
