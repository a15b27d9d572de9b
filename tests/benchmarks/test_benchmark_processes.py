"""Races of processes: every peer alone in its own, in turns, and a failure is told instead of a time."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ..support.benchmarks import BENCHMARKS

RACE = """
import os
import signal
import time
from pathlib import Path

from .harness.processes import Absent, Entrant, Prepared, apart, race

LOG = Path(__file__).parent / "log.txt"


def prepare(name, seconds=0.001):
    import torch

    if name == "wrong":
        raise ValueError("off by one")
    if name == "absent":
        raise Absent("stayed at home")
    if name == "full":
        raise torch.OutOfMemoryError("CUDA out of memory.\\nTried to allocate much.")
    if name == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    print("a peer that prints")

    def step():
        with LOG.open("a") as file:
            file.write(name + "\\n")
        time.sleep(seconds)

    return Prepared(step, {"process": os.getpid(), "threads": torch.get_num_threads(), "told": os.environ.get("TOLD")})


def main():
    entrants = [
        Entrant("first", prepare, {"name": "first"}, {"TOLD": "yes"}),
        Entrant("wrong", prepare, {"name": "wrong"}),
        Entrant("killed", prepare, {"name": "killed"}),
        Entrant("absent", prepare, {"name": "absent"}),
        Entrant("full", prepare, {"name": "full"}),
        Entrant("slow", prepare, {"name": "slow", "seconds": 0.01}),
    ]
    first, wrong, killed, absent, full, slow = race(entrants, threads=2, rounds=3, round_seconds=0.005, memory=True)
    assert [first.name, wrong.name, killed.name, slow.name] == ["first", "wrong", "killed", "slow"]
    assert wrong.failure == "ValueError: off by one"
    assert killed.failure == "its process ended with code -9"
    assert (absent.failure, absent.absent) == (None, "stayed at home")
    assert (full.failure, full.absent) == (None, "memory: CUDA out of memory.")
    assert wrong.times == killed.times == absent.times == full.times == ()
    assert wrong.absent is killed.absent is None
    assert first.failure is None
    assert len(first.times) == len(slow.times) == 3
    assert 0.001 <= first.median < slow.median
    assert first.iqr >= 0
    assert first.iterations > slow.iterations == 1
    assert len({os.getpid(), first.facts["process"], slow.facts["process"]}) == 3
    assert (first.facts["threads"], first.facts["told"]) == (2, "yes")
    assert first.peak_memory is None or 0 <= first.peak_memory < first.loaded_memory
    told = apart(prepare, {"name": "alone"}, threads=1)
    assert (told.failure, told.facts["threads"]) == (None, 1)
"""


@pytest.fixture
def ran(tmp_path: Path) -> Path:
    folder = tmp_path / "benchmarks"
    for name in ("__init__.py", "harness/__init__.py", "harness/processes.py"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(BENCHMARKS / name, folder / name)
    (folder / "race.py").write_text(RACE)
    command = [sys.executable, "-c", "from benchmarks.race import main; main()"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_a_race(ran: Path) -> None:
    """What `RACE` asserts, and that rounds go forwards and backwards by turns, after everyone has prepared."""
    log = (ran / "log.txt").read_text().split()
    turns = [name for place, name in enumerate(log) if place == 0 or log[place - 1] != name]
    prepared, rounds, memory = ["first", "slow"], ["first", "slow", "first", "slow"], ["first", "slow"]
    assert turns == [*prepared, *rounds, *memory, "alone"]
