"""Errors that the executor finds in a kernel, and unknown instructions."""

from __future__ import annotations

from typing import NamedTuple


class Hazard(NamedTuple):
    """One error of a kernel, without the thread and the address. These differ from one occurrence to the next."""

    kind: str  # name of the fault class
    kernel: str
    problem: str
    instruction: str
    source: str  # Python or CUDA source line, with the lines that it was inlined into
    number: int  # of the instruction in the kernel
    others: tuple[str, ...] = ()  # instructions that take part, with their source lines

    def __str__(self) -> str:
        text = f"{self.kind} in {self.kernel}: {self.problem}: `{self.instruction}`"
        text += f" from {self.source}" if self.source else ""
        return "; ".join((text, *self.others))


class UnsupportedInstructionError(NotImplementedError):
    """The executor does not implement an instruction, or a form of it."""


class KernelError(RuntimeError):
    """A kernel did something that PTX does not allow.

    Args:
        hazard: What happened, and at which instruction.
        detail: The thread, the CTA and the address of the first occurrence.
    """

    def __init__(self, hazard: Hazard, detail: str = "") -> None:
        super().__init__(f"{hazard} ({detail})" if detail else str(hazard))
        self.hazard = hazard


class AccessError(KernelError):
    """An access outside a buffer, or one not aligned to its size."""


class RaceError(KernelError):
    """Two warps access a byte without a barrier between them. At least one of them writes it.

    Barriers do not order CTAs.
    """


class RewriteError(KernelError):
    """A kernel writes an element of a result twice."""


class PipelineError(KernelError):
    """A kernel does not wait for the end of an asynchronous operation.

    The result is used before a wait, or the operands are overwritten too early.
    """


class ProxyError(KernelError):
    """The asynchronous proxy reads what the generic proxy wrote, without a fence.

    `fence.proxy.async` is missing between them.
    """


class BarrierError(KernelError):
    """Threads miss a barrier, or misuse a warp or an mbarrier.

    A warp is at an instruction that needs all its threads, or parts at a uniform branch. An mbarrier is
    used before `mbarrier.init`, or its bytes are used for something else before `mbarrier.inval`.
    """


class UninitializedError(KernelError):
    """A value that was not written decides what a kernel does.

    It decides an address, a branch or an asynchronous operation.
    """
