"""The schedule in machine code, and the cycles of a loop.

Each instruction carries a stall count, the least cycles until its warp issues the next one. Instructions of variable
latency set one of six scoreboards, and others name the scoreboards that they wait for. One warp that runs alone
therefore needs the stall counts of an iteration, and the waits for results that are not ready yet.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from .. import sass

NO_SCOREBOARD = 7
REPEATS = 4
"""Iterations that are followed. The last one counts: the first has nothing to wait for yet."""

LATENCIES = {
    # Least cycles from issue to result. Shared memory 23, L1 33 and L2 200 are of "Demystifying the Nvidia Ampere
    # Architecture through Microbenchmarking and Instruction-level Analysis" (arXiv 2208.11174), for an A100. The others
    # are rounded from the same kind of measurement. Other GPUs get the same: their L1 and L2 are not nearer.
    "LDS": 23,
    "LDSM": 23,
    "LDTM": 23,
    "SHFL": 23,
    "MUFU": 18,
    "LDG": 33,
    "LDC": 33,
    "LD": 33,
    "LDL": 33,
    "LDGSTS": 200,
}
OTHER_LATENCY = 12
"""Cycles of other instructions with a scoreboard, and until any instruction has read its operands."""
PRODUCT_LATENCY = 32
"""Cycles from the end of the last wgmma of a group to its results."""


class Scheduled(NamedTuple):
    """An instruction and its schedule."""

    name: str
    operands: str
    stall: int  # least cycles until the next instruction
    write: int  # scoreboard that its result releases, or NO_SCOREBOARD
    read: int  # scoreboard that is released when its operands are read, or NO_SCOREBOARD
    waits: tuple[int, ...]  # scoreboards that must be released before it issues


class LoopCycles(NamedTuple):
    """Cycles of an iteration for one warp that runs alone."""

    stalls: int  # by stall counts
    waits: Counter[str]  # more cycles, by the instruction that is waited for
    barriers: int  # instructions that wait for other warps

    @property
    def total(self) -> int:
        return self.stalls + self.waits.total()


def scheduled(line: sass.Line) -> Scheduled:
    """Decode the control bits."""
    # They are bits 41 to 57 of the upper half of the 128 bits of an instruction.
    control = line.encoding >> 41
    waits = tuple(number for number in range(6) if control >> (11 + number) & 1)
    return Scheduled(line.name, line.operands, control & 15, control >> 5 & 7, control >> 8 & 7, waits)


def main_loop(disassembly: str) -> list[Scheduled]:
    """Return the innermost loop that multiplies matrices; empty if there is none.

    Args:
        disassembly: What nvdisasm prints with encodings.
    """
    code = sass.parse(disassembly)
    bodies = [code[first : last + 1] for first, last in sass.loops(code)]
    found = next((body for body in bodies if any(sass.MATRIX.match(line.name) for line in body)), [])
    return list(map(scheduled, found))


def loop_cycles(body: Sequence[Scheduled], wgmma_cycles: float) -> LoopCycles:
    """Follow one warp through the loop.

    Args:
        body: An iteration.
        wgmma_cycles: Cycles that the tensor cores need for 64 x 64 x 16 multiply-adds.
    """
    warp = _Warp(wgmma_cycles)
    for _ in range(REPEATS):
        warp.waited.clear()
        for instruction in body:
            warp.issue(instruction)
    stalls = sum(max(1, instruction.stall) for instruction in body)
    return LoopCycles(stalls, +warp.waited, sum(sass.base_name(one.name) == "BAR" for one in body))


class _Pending(NamedTuple):
    """A result that is not ready yet."""

    time: float
    name: str


class _Warp:
    """The time of one warp, and its pending results."""

    def __init__(self, wgmma_cycles: float) -> None:
        self.time = 0.0
        self.waited: Counter[str] = Counter()
        self._wgmma_cycles = wgmma_cycles
        self._pending: dict[int, list[_Pending]] = defaultdict(list)  # by scoreboard
        self._copies = 0.0  # when the last asynchronous copy arrives
        self._tensor_cores = 0.0  # when the tensor cores are free
        self._groups: list[_Pending] = []  # of wgmma

    def issue(self, instruction: Scheduled) -> None:
        """Wait until an instruction can be issued, and issue it."""
        name = sass.base_name(instruction.name)
        for scoreboard in instruction.waits:
            self._wait(self._pending[scoreboard], 0)
        if name == "DEPBAR":
            scoreboard, allowed = _numbers(instruction.operands)
            self._wait(self._pending[scoreboard], allowed)
        elif instruction.name.startswith("WARPGROUP.DEPBAR"):
            self._wait(self._groups, _numbers(instruction.operands)[1])
        elif name == "HGMMA":
            self._multiply(instruction)
        elif name == "LDGSTS":
            self._copies = max(self._copies, self.time + LATENCIES[name])
        if instruction.write != NO_SCOREBOARD:
            result = self._copies if name == "LDGDEPBAR" else self.time + LATENCIES.get(name, OTHER_LATENCY)
            self._add(instruction.write, result, "LDGSTS" if name == "LDGDEPBAR" else name)
        if instruction.read != NO_SCOREBOARD:
            self._add(instruction.read, self.time + OTHER_LATENCY, f"operands of {name}")
        self.time += max(1, instruction.stall)

    def _add(self, scoreboard: int, time: float, name: str) -> None:
        self._pending[scoreboard].append(_Pending(time, name))

    def _wait(self, pending: list[_Pending], allowed: int) -> None:
        """Wait until at most `allowed` results are missing, the newest."""
        for result in pending[: len(pending) - allowed]:
            if result.time > self.time:
                self.waited[result.name] += round(result.time - self.time)
                self.time = result.time
        del pending[: len(pending) - allowed]

    def _multiply(self, instruction: Scheduled) -> None:
        """Occupy the tensor cores; the last product of a group makes its results visible."""
        m, n, k = map(int, instruction.name.split(".")[1].split("x"))
        start = max(self.time, self._tensor_cores)
        self._tensor_cores = start + self._wgmma_cycles * (m * n * k) / (64 * 64 * 16)
        if "gsb" in instruction.operands:
            self._groups.append(_Pending(self._tensor_cores + PRODUCT_LATENCY, "HGMMA"))


def _numbers(operands: str) -> tuple[int, int]:
    """Return the scoreboard and the number of `SB0, 0x1` or `gsb0, 0x0`."""
    scoreboard, _, allowed = operands.partition(",")
    return int(re.sub(r"\D", "", scoreboard)), int(allowed.strip() or "0", 16)
