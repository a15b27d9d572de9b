"""Counts of a main loop, from its execution on the CPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

from ..executor.counters import SECTOR, Counters, Key, SharedCount, pipe_of
from ..executor.kernel_code import Code
from ..executor.launch import Launch
from ..executor.ptx import Instruction
from ..sass import SCHEDULERS

WAITS = ("wait_group", "wait_all", "try_wait", "wait_ld", "wait_st", "wait")


class Conflict(NamedTuple):
    """An instruction whose threads access one bank of shared memory several times."""

    name: str
    source: str
    extra: float  # wavefronts beyond the least


class LoopCounts(NamedTuple):
    """Counts of a main loop for 64 x 64 scores."""

    pipes: dict[str, float]  # PTX instructions that each of four schedulers issues, by pipe
    wavefronts: float  # of shared memory
    ideal_wavefronts: float  # without bank conflicts
    conflicts: list[Conflict]  # most first
    sectors: float  # of global memory
    ideal_sectors: float  # filled by the bytes that each warp asks for
    barriers: float  # that a warp executes
    waits: float  # for copies, products or tensor memory, that a warp executes

    @property
    def l2_bytes(self) -> float:
        """Bytes that the sectors hold: what L2 delivers if L1 has none of them."""
        return self.sectors * SECTOR


class LaunchCounts(NamedTuple):
    """Counts of a whole launch of a kernel."""

    wavefronts: int
    ideal_wavefronts: int
    sectors: int
    ideal_sectors: int
    conflicts: list[Conflict]  # most first


def loop_of(code: Code) -> tuple[int, int]:
    """Return the first and last instruction of the loop with products.

    Raises:
        ValueError: If there is none.
    """
    labels = code.function.labels
    for place, instruction in enumerate(code.instructions):
        first = labels.get(instruction.label(0), place + 1) if instruction.opcode == "bra" else place + 1
        if first <= place and any(_is_product(one) for one in code.instructions[first : place + 1]):
            return first, place
    raise ValueError(f"{code.function.name} has no loop with a matrix product")


def _is_product(instruction: Instruction) -> bool:
    if instruction.opcode == "mma":
        return True
    return instruction.opcode in ("wgmma", "tcgen05") and any(name.startswith("mma") for name in instruction.modifiers)


def loop_counts(launch: Launch, counters: Counters, scores: int) -> LoopCounts:
    """Return the counts of the main loop.

    Args:
        launch: The only launch of its kernel that the counters have seen.
        counters: What the executor collected.
        scores: Scores of an iteration, BLOCK_M * BLOCK_N.
    """
    first, last = loop_of(launch.code)
    executed = {
        number: warps
        for number, warps in launch.executed.items()
        if first <= launch.code.blocks[number].first <= launch.code.blocks[number].last <= last
    }
    threads = launch.code.function.threads
    assert threads is not None
    warps = threads // 32
    # Most instructions are executed by every warp in every iteration. Others wait in a loop of their own, belong to one
    # warp, or are skipped because the loop is entered behind its first block.
    weights: Counter[int] = Counter()
    for number, count in executed.items():
        weights[count] += launch.code.blocks[number].last - launch.code.blocks[number].first + 1
    units = weights.most_common(1)[0][0] / warps * scores / 4096
    pipes: Counter[str] = Counter()
    times: dict[str, int] = {}  # warps that executed an instruction, by its text
    barriers = waits = 0
    for number, count in executed.items():
        block = launch.code.blocks[number]
        for instruction in launch.code.instructions[block.first : block.last + 1]:
            times[instruction.text] = count
            pipes[pipe_of(instruction)] += count
            barriers += count * (instruction.opcode in ("bar", "barrier"))
            waits += count * any(name in WAITS for name in instruction.modifiers)
    shared = {key: count for key, count in counters.shared.items() if key.kernel == launch.kernel and key.text in times}
    # The last iterations copy nothing: count each copy as often as it is executed.
    accesses = [
        (count, times[key.text] / count.requests)
        for key, count in counters.global_memory.items()
        if key.kernel == launch.kernel and key.text in times
    ]
    return LoopCounts(
        pipes={pipe: count / units / SCHEDULERS for pipe, count in sorted(pipes.items())},
        wavefronts=sum(count.wavefronts for count in shared.values()) / units,
        ideal_wavefronts=sum(count.ideal for count in shared.values()) / units,
        conflicts=_conflicts(shared, units),
        sectors=sum(count.sectors * scale for count, scale in accesses) / units,
        ideal_sectors=sum(count.ideal * scale for count, scale in accesses) / units,
        barriers=barriers / warps / units,
        waits=waits / warps / units,
    )


def _conflicts(shared: Mapping[Key, SharedCount], units: float) -> list[Conflict]:
    extra: Counter[tuple[str, str]] = Counter()
    for key, count in shared.items():
        extra[key.name, key.source] += count.conflicts
    return [Conflict(*key, count / units) for key, count in extra.most_common() if count]


def launch_counts(kernel: str, counters: Counters) -> LaunchCounts:
    """Return the counts of all launches of a kernel."""
    shared = {key: count for key, count in counters.shared.items() if key.kernel == kernel}
    accesses = [count for key, count in counters.global_memory.items() if key.kernel == kernel]
    return LaunchCounts(
        wavefronts=sum(count.wavefronts for count in shared.values()),
        ideal_wavefronts=sum(count.ideal for count in shared.values()),
        sectors=sum(count.sectors for count in accesses),
        ideal_sectors=sum(count.ideal for count in accesses),
        conflicts=_conflicts(shared, 1),
    )
