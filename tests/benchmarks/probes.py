"""Workers for the tests of the harness; a worker's process imports this module."""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch

from benchmarks.harness.processes import Prepared, Unavailable


def prepare(name: str, log: str = "", seconds: float = 0.001, error: float = 0.0) -> Prepared:
    """A step that sleeps and logs its name, or a failure that its name selects."""
    if name == "wrong":
        raise ValueError("wrong and not timed. out: relative error 2.00e+00")
    if name == "unavailable":
        raise Unavailable("does not run on this CPU")
    if name == "full":
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate much.")
    print("stdout of a baseline")

    def step() -> None:
        if log:
            with Path(log).open("a") as file:
                file.write(f"{name}\n")
        time.sleep(seconds)

    facts = {"kernel": "probe", "errors": {"out": error}, "process": os.getpid(), "threads": torch.get_num_threads()}
    return Prepared(step, {**facts, "variable": os.environ.get("PROBE")})
