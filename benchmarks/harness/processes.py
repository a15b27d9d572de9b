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

FOLDER = Path(__file__).resolve().parents[1]
ANSWER_SECONDS = 600.0  # a process that is silent for longer is ended
LONG_CALL = 1.0  # seconds; a call that takes so long is not repeated to see how long it takes


class Absent(Exception):  # noqa: N818
    """Raised by an entrant's `prepare`: it cannot take part, for the reason given."""


@dataclass(frozen=True)
class Prepared:
    """A step that is ready to be timed, and facts about it that JSON can hold, such as its errors.

    device: what the step has to have finished on when the clock is read.
    """

    step: Callable[[], object]
    facts: dict[str, Any] = field(default_factory=dict)
    device: str = "cpu"


@dataclass(frozen=True)
class Entrant:
    """One peer of a race.

    prepare: a function at the top of a module of this folder, called in the peer's process. It checks the results: what
    it raises becomes the peer's `failure`, and nothing is timed; but Absent, and lack of memory on CUDA, say why it is
    `absent`. arguments: its keyword arguments, as JSON. environment: variables of that process.
    bytes_needed: about what its process holds at its peak; only `heats` asks for it.
    """

    name: str
    prepare: Callable[..., Prepared]
    arguments: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    bytes_needed: int = 0


@dataclass(frozen=True)
class Result:
    """Seconds of one call, round by round; or no times, and the `failure` or why it was `absent`.

    peak_memory: bytes of one call above `loaded_memory`, which the process holds between calls.
    """

    name: str
    times: tuple[float, ...] = ()
    iterations: int = 0
    facts: dict[str, Any] = field(default_factory=dict)
    peak_memory: int | None = None
    loaded_memory: int | None = None
    failure: str | None = None
    absent: str | None = None

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


def free_memory(device: str) -> int | None:
    """Bytes that processes can take on `device` now, less a tenth; None where the system does not say."""
    if device == "cuda":
        import torch

        return torch.cuda.mem_get_info()[0] * 9 // 10
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    kibibytes = [int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    return kibibytes[0] * 1024 * 9 // 10 if kibibytes else None


def heats(entrants: Sequence[Entrant], room: int | None) -> tuple[list[list[Entrant]], dict[str, str]]:
    """The entrants in groups that fit into `room` bytes, and by name why some are in none; None is room for all.

    The first entrant is in every group, so that each of the others is raced against it.
    """
    groups: list[list[Entrant]] = []
    too_large = {}
    for entrant in entrants:
        rivals = [entrants[0]] if entrant is not entrants[0] else []
        needed = sum(one.bytes_needed for one in [*rivals, entrant])
        if room is not None and needed > room:
            too_large[entrant.name] = f"memory: about {needed >> 20} MiB are needed, {room >> 20} MiB are free"
        elif not groups or (room is not None and sum(one.bytes_needed for one in [*groups[-1], entrant]) > room):
            groups.append([*rivals, entrant])
        else:
            groups[-1].append(entrant)
    return groups, too_large


def apart(function: Callable[..., Prepared], arguments: dict[str, Any], threads: int = 1) -> Result:
    """Call a `prepare` in a process of its own for what it writes; its facts, or its failure."""
    with _started(Entrant(function.__qualname__, function, arguments), threads, 0.0) as worker:
        return worker.result


@contextlib.contextmanager
def _started(entrant: Entrant, threads: int, round_seconds: float) -> Iterator[_Worker]:
    command = [sys.executable, "-m", f"{FOLDER.name}.harness.{Path(__file__).stem}"]
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
        module = self.prepare_function.__module__.partition(".")[2]
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
        answer = self._ask(do="memory")
        self._note(peak_memory=answer.get("peak"), loaded_memory=answer.get("loaded"))

    def _note(self, **changes: Any) -> None:
        self.result = dataclasses.replace(self.result, **changes)

    def _ask(self, **request: Any) -> dict[str, Any]:
        """The answer; {} once the entrant has failed or is absent, which takes back its times."""
        if self.result.failure is not None or self.result.absent is not None:
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
        if "failure" in answer or "absent" in answer:
            self._note(failure=answer.get("failure"), absent=answer.get("absent"), times=(), iterations=0)
        return answer


def _serve() -> None:
    """The entrant's process: prepare, then one answer for each line, until there are no more."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a peer prints must not be taken for an answer

    def answer(**contents: Any) -> None:
        print(json.dumps(contents), file=answers, flush=True)

    import torch

    try:
        request = json.loads(sys.stdin.readline())
        torch.set_num_threads(request["threads"])
        module = importlib.import_module(f"{FOLDER.name}.{request['module']}")
        prepared = getattr(module, request["function"])(**request["arguments"])
        iterations = _calls_a_round(prepared, request["round_seconds"])
        gc.collect()
        gc.freeze()
        gc.disable()
        answer(facts=prepared.facts, iterations=iterations)
        for line in sys.stdin:
            if json.loads(line)["do"] == "round":
                prepared.step()
                answer(seconds=_seconds(prepared, iterations))
            else:
                answer(**_memory(prepared))
    except Absent as reason:
        answer(absent=str(reason))
    except torch.OutOfMemoryError as error:
        answer(absent=f"memory: {error}".splitlines()[0])
    except Exception as error:
        answer(failure=f"{type(error).__name__}: {error}")


def _calls_a_round(prepared: Prepared, round_seconds: float) -> int:
    """Calls that fill a round, by the fastest of three after one that warms up, unless that one was long."""
    once = _seconds(prepared, 1)
    if once < max(round_seconds, LONG_CALL):
        once = min(_seconds(prepared, 1) for _ in range(3))
    return max(1, math.ceil(round_seconds / once))


def _seconds(prepared: Prepared, iterations: int) -> float:
    from beit_fast.testing.timing import synchronize

    synchronize(prepared.device)
    started = time.perf_counter()
    for _ in range(iterations):
        prepared.step()
    synchronize(prepared.device)
    return (time.perf_counter() - started) / iterations


def _memory(prepared: Prepared) -> dict[str, int | None]:
    from beit_fast.testing.memory import loaded_memory, peak_memory

    loaded = loaded_memory(prepared.device)
    return {"peak": peak_memory(prepared.step, prepared.device), "loaded": loaded}


if __name__ == "__main__":  # by its name, or its Absent would be another than the one that peers raise
    importlib.import_module(f"{FOLDER.name}.harness.{Path(__file__).stem}")._serve()
