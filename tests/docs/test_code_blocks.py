"""Every code block of README and docs runs as written, offline, with small checkpoints."""

from __future__ import annotations

import fnmatch
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from .pages import PAGES, Block, blocks_of

NOT_RUN = {
    "pip install *": "installs into the environment of the tests",
    "torchrun --nnodes 8 *": "starts eight machines",
}
"""Patterns of shell lines that do not run (installation, CUDA or network), each with its reason."""

RUNNER = Path(__file__).with_name("run_page.py")
WITH_PYTHON = [page for page in PAGES if blocks_of(page, "python")]
SHELL = [block for page in PAGES for block in blocks_of(page, "bash", "shell")]

has_run: set[str] = set()
"""Shell commands that have run; a command on several pages runs once."""

Environment = Callable[[], dict[str, str]]


@pytest.mark.parametrize("page", WITH_PYTHON)
def test_python_blocks_run_as_written(page: str, workspace: Path, environment: Environment) -> None:
    run([sys.executable, str(RUNNER), page], workspace, environment())


@pytest.mark.parametrize("block", SHELL, ids=str)
def test_shell_blocks_run_as_written(block: Block, workspace: Path, environment: Environment) -> None:
    for line in commands_of(block):
        if exemption_of(line) is None and line not in has_run:
            has_run.add(line)
            run(["bash", "-euo", "pipefail", "-c", line], workspace, environment())


def test_not_run_entries_are_few_and_used() -> None:
    lines = [line for block in SHELL for line in commands_of(block)]
    assert len(NOT_RUN) <= 10
    assert {exemption_of(line) for line in lines} - {None} == set(NOT_RUN)


def run(command: list[str], folder: Path, environment: dict[str, str]) -> None:
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command[-1]}\n{done.stdout}\n{done.stderr}"


def commands_of(block: Block) -> list[str]:
    """The commands of a shell block, one a line, without comments."""
    return [line for line in block.text.splitlines() if line.strip() and not line.startswith("#")]


def exemption_of(line: str) -> str | None:
    return next((pattern for pattern in NOT_RUN if fnmatch.fnmatch(line, pattern)), None)
