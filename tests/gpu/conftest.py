"""Tests that need a GPU: streams, CUDA graphs, device memory, large inputs.

Without a GPU they are not collected.
"""

from __future__ import annotations

import pytest

from ..support.devices import cuda_unsupported_reason

collect_ignore_glob = ["test_*.py"] if cuda_unsupported_reason() else []


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if reason := cuda_unsupported_reason():
        terminalreporter.write_line(f"tests/gpu needs a GPU and was not collected: {reason}")
