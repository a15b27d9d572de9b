"""What takes the part of CUDA graphs on CPU tensors."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


class Recorded:
    """As a graph of a GPU: made without a run of its own, it repeats the work into the same memory."""

    def __init__(self, run: Callable[[], Any], pool: Any) -> None:
        self.run = run
        self.own_pool = object() if pool is None else pool
        self.is_reset = False
        self.in_inference_mode = torch.is_inference_mode_enabled()
        self.result = run()
        for tensor in self._tensors(self.result):
            tensor.fill_(float("nan") if tensor.is_floating_point() else 77)

    @staticmethod
    def _tensors(result: Any) -> list[Tensor]:
        return [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]

    def replay(self) -> None:
        assert not self.is_reset
        with torch.inference_mode(self.in_inference_mode), torch.no_grad():  # who may write to the result
            for place, value in zip(self._tensors(self.result), self._tensors(self.run()), strict=True):
                place.copy_(value)

    def pool(self) -> Any:
        assert not self.is_reset
        return self.own_pool

    def reset(self) -> None:
        self.is_reset = True


class StandIn:
    """Takes the part of CUDA on CPU tensors, and remembers what it was asked for."""

    device_type = "cpu"

    def __init__(self) -> None:
        self.graphs: list[Recorded] = []
        self.recording = False
        self.turns = 0
        self.most_turns_at_once = 0
        self.drained = 0

    def is_recording(self, device: torch.device) -> bool:
        return self.recording

    @contextlib.contextmanager
    def turn(self, device: torch.device) -> Iterator[None]:
        self.turns += 1
        self.most_turns_at_once = max(self.most_turns_at_once, self.turns)
        yield
        self.turns -= 1

    def warm_up(self, run: Callable[[], Any], device: torch.device) -> None:
        run()

    def record(self, run: Callable[[], Any], device: torch.device, pool: Any) -> tuple[Recorded, Any]:
        self.graphs.append(Recorded(run, pool))
        return self.graphs[-1], self.graphs[-1].result

    def drain(self, device: torch.device) -> None:
        self.drained += 1
