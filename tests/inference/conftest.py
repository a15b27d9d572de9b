"""Fake CUDA graphs on CPU tensors."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from beit_fast.inference import cuda_graphs
from beit_fast.inference.cuda_graphs import GraphCache


class CpuGraph:
    """Fake CUDA graph on CPU tensors.

    A replay runs the function again and writes into the same memory.
    """

    def __init__(self, run: Callable[[], Any], pool: Any) -> None:
        self.run, self.own_pool, self.is_reset = run, pool or object(), False
        self.in_inference_mode = torch.is_inference_mode_enabled()
        self.result = run()
        for tensor in self._tensors(self.result):
            tensor.fill_(77)  # a captured graph has not run yet

    @staticmethod
    def _tensors(result: Any) -> list[Tensor]:
        return [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]

    def replay(self) -> None:
        assert not self.is_reset
        with torch.inference_mode(self.in_inference_mode), torch.no_grad():  # the mode that may write to the result
            for place, value in zip(self._tensors(self.result), self._tensors(self.run()), strict=True):
                place.copy_(value)

    def pool(self) -> Any:
        return self.own_pool

    def reset(self) -> None:
        self.is_reset = True


@pytest.fixture
def graphs(monkeypatch) -> Iterator[list[CpuGraph]]:
    """Capture functions of CPU tensors; the list holds every captured graph."""
    captured: list[CpuGraph] = []

    def capture(run: Callable[[], Any], device: torch.device, pool: Any) -> tuple[CpuGraph, Any]:
        captured.append(CpuGraph(run, pool))
        return captured[-1], captured[-1].result

    monkeypatch.setattr(cuda_graphs, "DEVICE_TYPE", "cpu")
    monkeypatch.setattr(cuda_graphs, "capture", capture)
    monkeypatch.setattr(cuda_graphs, "warm_up", lambda run, device: run())
    monkeypatch.setattr(GraphCache, "_after_last_replay", lambda self, device: contextlib.nullcontext())
    with torch.no_grad():
        yield captured
