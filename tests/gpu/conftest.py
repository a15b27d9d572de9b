"""Tests of what only a GPU has: streams, graphs, its memory, large inputs. In a process without one they do not run."""

from __future__ import annotations

import pytest

from ..support.devices import why_no_cuda

collect_ignore_glob = ["test_*.py"] if why_no_cuda() else []


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if reason := why_no_cuda():
        terminalreporter.write_line(f"tests/gpu needs a GPU and was not collected: {reason}")
