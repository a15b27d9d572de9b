"""The processes of one run as torchrun starts them: which one this is, and how one of them goes first."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Self

import torch

_PATIENCE = timedelta(minutes=30)


@dataclass(frozen=True)
class Ranks:
    """One of several processes, on one machine or several; by default the only one."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1

    @classmethod
    def from_environment(cls) -> Self:
        """As RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE say; alone where they are not set.

        Raises:
            ValueError: RANK and WORLD_SIZE are no numbers that fit each other.
        """
        rank, world = os.environ.get("RANK"), os.environ.get("WORLD_SIZE")
        if rank is None and world is None:
            return cls()
        numbers = [int(text) if text is not None and text.isdecimal() else -1 for text in (rank, world)]
        if not 0 <= numbers[0] < numbers[1]:
            raise ValueError(
                f"the environment has RANK={rank!r} and WORLD_SIZE={world!r}; accepted: neither, or a rank from 0 to "
                "WORLD_SIZE - 1, as torchrun sets them"
            )
        names = ("LOCAL_RANK", "LOCAL_WORLD_SIZE")
        local = [int(os.environ.get(name, default)) for name, default in zip(names, numbers, strict=True)]
        return cls(*numbers, *local)

    def __str__(self) -> str:
        return f"rank {self.rank} of {self.world}"

    def device(self, name: str | None) -> torch.device:
        """`name`, or CUDA where there is some, else the CPU; of several GPUs the one of this rank.

        Raises:
            ValueError: there are fewer GPUs than ranks on this machine.
        """
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device.type != "cuda" or device.index is not None:
            return device
        if torch.cuda.is_available() and self.local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"rank {self.local_rank} of this machine has no GPU of its own, there are {torch.cuda.device_count()}; "
                "start as many processes as there are GPUs, or give --device"
            )
        return torch.device("cuda", self.local_rank)

    def is_restarted(self) -> bool:
        """Whether torchrun started these processes again after some of them failed."""
        return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"

    def once_before_all(self, action: Callable[[], None]) -> None:
        """Let rank 0 do `action`, and return when it is done; what it raises, all raise.

        Raises:
            ValueError: several processes have no MASTER_ADDR and MASTER_PORT to meet at.
        """
        if self.world == 1:
            action()
            return
        missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
        if missing:
            raise ValueError(
                f"--overwrite and --retry-failed in several processes need {' and '.join(missing)} in the environment, "
                "which torchrun sets"
            )
        from torch.distributed import rendezvous

        store = next(rendezvous("env://", timeout=_PATIENCE))[0]
        if self.rank > 0:
            reason = store.get("beit_fast/first").decode()
            store.set(f"beit_fast/follows/{self.rank}", "")
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
            # The store may live in this process: it must not end before all have read.
            store.wait([f"beit_fast/follows/{rank}" for rank in range(1, self.world)])
