"""The two tables of Transformers' BEiT page with columns for ours: `pytest benchmarks/bench_page.py`."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from .baselines.hf_docs import race_page
from .harness.cases import chosen_device
from .harness.hf_docs_cases import PageCase, page_cases


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    options = metafunc.config.option
    drawn = page_cases(chosen_device(options.device), options.full, options.require_peers)
    metafunc.parametrize("case", drawn, ids=str)


def test_page(case: PageCase, race_apart: Callable[..., None]) -> None:
    race_page(case, race_apart, torch.get_num_threads())
