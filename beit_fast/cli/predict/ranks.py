"""The processes of one run, as torchrun starts them."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Self

import torch

from ..devices import usable_device

_TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True)
class Ranks:
    """The place of this process among all; by default it is the only one."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1

    @classmethod
    def from_environment(cls) -> Self:
        """Read RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE.

        Raises:
            ValueError: If RANK and WORLD_SIZE are not consistent numbers.
        """
        rank, world = os.environ.get("RANK"), os.environ.get("WORLD_SIZE")
        if rank is None and world is None:
            return cls()
        numbers = [int(text) if text is not None and text.isdecimal() else -1 for text in (rank, world)]
        if not 0 <= numbers[0] < numbers[1]:
            raise ValueError(
                f"RANK={rank!r} and WORLD_SIZE={world!r} in the environment are not supported (expected neither, or a "
                "rank from 0 to WORLD_SIZE - 1, as torchrun sets them)"
            )
        names = ("LOCAL_RANK", "LOCAL_WORLD_SIZE")
        local = [int(os.environ.get(name, default)) for name, default in zip(names, numbers, strict=True)]
        return cls(*numbers, *local)

    def __str__(self) -> str:
        return f"rank {self.rank} of {self.world}"

    def device(self, name: str | None) -> torch.device:
        """The device `name` (default: CUDA if available, else the CPU), with this rank's index.

        Raises:
            ValueError: If this machine does not have the device, or fewer GPUs than ranks.
        """
        device = usable_device(name)
        if device.type != "cuda" or device.index is not None:
            return device
        if self.local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"there is no GPU for rank {self.local_rank} of this machine, which has {torch.cuda.device_count()}; "
                "start as many processes as there are GPUs, or pass --device"
            )
        return torch.device("cuda", self.local_rank)

    def is_restarted(self) -> bool:
        """Whether torchrun restarted these processes after a failure."""
        return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"

    def once_before_all(self, action: Callable[[], None]) -> None:
        """Run `action` on rank 0 while the other ranks wait.

        Raises:
            ValueError: If `action` raised on rank 0, or MASTER_ADDR or MASTER_PORT is not set.
        """
        if self.world == 1:
            action()
            return
        missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
        if missing:
            raise ValueError(
                f"--overwrite and --retry-failed in several processes need {' and '.join(missing)} in the environment "
                "(set by torchrun)"
            )
        from torch.distributed import rendezvous

        store = next(rendezvous("env://", timeout=_TIMEOUT))[0]
        if self.rank > 0:
            reason = store.get("beit_fast/first").decode()
            store.set(f"beit_fast/received/{self.rank}", "")
            if reason:
                raise ValueError(f"rank 0: {reason}")
            return
        reason = ""
        try:
            action()
        except BaseException as error:
            reason = str(error) or type(error).__name__
            raise
        finally:
            store.set("beit_fast/first", reason)
            # Rank 0 may host the store, so it waits until all ranks have read.
            store.wait([f"beit_fast/received/{rank}" for rank in range(1, self.world)])
