"""The processes of a run under torchrun, and what they share."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ...layers.block import BeitLayer

Result = TypeVar("Result")


@dataclass(frozen=True)
class Processes:
    """This process among those of a run.

    Attributes:
        device: The device of this process.
        rank: Its number, from 0.
        count: The number of processes.
    """

    device: torch.device
    rank: int = 0
    count: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and messages."""
        return self.rank == 0

    def on_main(self, action: Callable[[], Result]) -> Result:
        """Run `action` in the main process; every process gets its result.

        Raises:
            The error of the action, in every process, so that none of them waits for another.
        """
        outcome: list[Any] = [None, None]
        if self.is_main:
            try:
                outcome[0] = action()
            except (OSError, ValueError, RuntimeError, ImportError, TypeError) as error:
                outcome[1] = error
        if self.count > 1:
            dist.broadcast_object_list(outcome, src=0, device=torch.device("cpu"))
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    def mean(self, values: Tensor) -> Tensor:
        """Average a tensor over the processes; every process gets the result."""
        if self.count == 1:
            return values
        values = values.to("cpu", torch.float64)
        dist.all_reduce(values)
        return values / self.count

    def gather(self, values: Sequence[Result]) -> list[Result]:
        """Join lists of all processes in the order of their ranks."""
        if self.count == 1:
            return list(values)
        lists: list[Any] = [None] * self.count
        dist.all_gather_object(lists, list(values))
        return [value for each in lists for value in each]

    def wrap(self, model: nn.Module, fsdp: bool, has_unused_parameters: bool = False) -> nn.Module:
        """Make a model train in all processes; with one process it is returned as it is.

        Args:
            model: A model on `device`.
            fsdp: If True, shard it in place by FSDP2, each block on its own; otherwise DistributedDataParallel.
            has_unused_parameters: Whether a forward leaves parameters unused.

        Raises:
            ValueError: If `fsdp` is asked of one process.
        """
        if fsdp:
            if self.count == 1:
                raise ValueError("fsdp=True needs several processes (expected torchrun --nproc-per-node 2 or more)")
            return _sharded(model)
        if self.count == 1:
            return model
        devices = None if self.device.type == "cpu" else [self.device]
        return nn.parallel.DistributedDataParallel(
            model, devices, gradient_as_bucket_view=True, find_unused_parameters=has_unused_parameters
        )


def _sharded(model: nn.Module) -> nn.Module:
    """Shard a model in place."""
    from torch.distributed.fsdp import fully_shard

    for module in model.modules():
        if isinstance(module, BeitLayer):
            fully_shard(module)
    fully_shard(model)
    return model


def without_gradient_sync(model: nn.Module, is_last: bool) -> AbstractContextManager[Any]:
    """Keep gradients in each process until the last forward of a step."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        return nullcontext() if is_last else model.no_sync()
    set_sync = getattr(model, "set_requires_gradient_sync", None)
    if set_sync is not None:
        set_sync(is_last)
    return nullcontext()


@contextmanager
def processes_of_run(device: str = "auto") -> Iterator[Processes]:
    """Yield the processes that torchrun started, or this one alone.

    A process group is opened for several processes, unless there is one, and closed again.

    Args:
        device: "cpu", "cuda", or "auto" for CUDA if it is available.

    Raises:
        ValueError: If CUDA is asked for and not available.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    on_gpu = device != "cpu" and torch.cuda.is_available()
    if device == "cuda" and not on_gpu:
        raise ValueError("device='cuda' is not available: torch finds no CUDA device (expected 'auto' or 'cpu')")
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if on_gpu:
        torch.cuda.set_device(local)
    place = torch.device("cuda", local) if on_gpu else torch.device("cpu")
    if count == 1 and not dist.is_initialized():
        yield Processes(place)
        return
    is_opened = not dist.is_initialized()
    if is_opened:
        dist.init_process_group("cuda:nccl,cpu:gloo" if on_gpu else "gloo")
    try:
        yield Processes(place, dist.get_rank(), dist.get_world_size())
    finally:
        if is_opened:
            dist.destroy_process_group()
