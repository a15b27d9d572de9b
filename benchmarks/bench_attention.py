"""Attention alone, forward and training step, beside every peer: `pytest benchmarks/bench_attention.py`."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from .baselines.attention import PEERS, Peer
from .harness.cases import Case, cases, chosen_device


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    options = metafunc.config.option
    metafunc.parametrize("case", cases(chosen_device(options.device), options.full), ids=str)
    metafunc.parametrize("peer", PEERS, ids=lambda peer: peer.name.replace(" ", "-"))


def test_attention(case: Case, peer: Peer, race: Callable[[Case, Peer], None]) -> None:
    race(case, peer)
