"""The tables in Transformers' documentation of BEiT, with ours: `pytest benchmarks/bench_hf_docs.py`."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from .baselines.hf_docs import run_hf_docs
from .harness.cases import chosen_device
from .harness.hf_docs_cases import HfDocsCase, hf_docs_cases


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    options = metafunc.config.option
    drawn = hf_docs_cases(chosen_device(options.device), options.full, options.require_baselines)
    metafunc.parametrize("case", drawn, ids=str)


def test_hf_docs(case: HfDocsCase, time_workers: Callable[..., None]) -> None:
    run_hf_docs(case, time_workers, torch.get_num_threads())
