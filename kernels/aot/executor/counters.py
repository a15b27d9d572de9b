"""Counts of a kernel's execution: instructions by pipe, shared-memory wavefronts and global sectors."""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from .dtypes import Array
from .ptx import Instruction
from .sites import LANES, Site

if TYPE_CHECKING:
    from .launch import Launch

BANKS = 32
BANK_BYTES = 4
WAVEFRONT = BANKS * BANK_BYTES
"""Bytes that shared memory delivers at once."""
SECTOR = 32
"""Bytes of a sector of global memory."""


class Key(NamedTuple):
    """An instruction of a kernel."""

    kernel: str
    name: str
    text: str
    source: str


@dataclasses.dataclass
class SharedCount:
    """Accesses to shared memory by one instruction."""

    requests: int = 0  # of warps
    wavefronts: int = 0
    ideal: int = 0  # wavefronts without bank conflicts
    bytes: int = 0  # by all threads

    @property
    def conflicts(self) -> int:
        return self.wavefronts - self.ideal


@dataclasses.dataclass
class GlobalCount:
    """Accesses to global memory by one instruction."""

    requests: int = 0  # of warps
    sectors: int = 0
    ideal: int = 0  # sectors that the distinct bytes of each request would fill
    bytes: int = 0  # by all threads


_PIPES = {
    "mma": "matrix",
    "wgmma": "matrix",
    "tcgen05": "matrix",
    "ex2": "special function",
    "lg2": "special function",
    "rcp": "special function",
    "rsqrt": "special function",
    "sqrt": "special function",
    "tanh": "special function",
    "sin": "special function",
    "cos": "special function",
    "ld": "load/store",
    "st": "load/store",
    "cp": "load/store",
    "ldmatrix": "load/store",
    "stmatrix": "load/store",
    "shfl": "load/store",
    "bra": "control",
    "ret": "control",
    "exit": "control",
    "bar": "synchronization",
    "barrier": "synchronization",
    "fence": "synchronization",
    "mbarrier": "synchronization",
    "elect": "control",
    "cvt": "conversion",
}
_WAITS = ("wait_group", "wait_all", "try_wait", "wait_ld", "wait_st")
_FLOATS = ("f16", "f16x2", "bf16", "bf16x2", "f32", "f32x2", "f64")


def pipe_of(instruction: Instruction) -> str:
    """Return the kind of execution unit. This is a property of the PTX; ptxas may choose another."""
    if any(name in _WAITS for name in instruction.modifiers) or "commit_group" in instruction.modifiers:
        return "synchronization"
    found = _PIPES.get(instruction.opcode)
    if found is not None:
        return found
    return "float" if instruction.modifiers and instruction.modifiers[-1] in _FLOATS else "integer"


class Counters:
    """Collects the counts of launches."""

    def __init__(self) -> None:
        self.kernel = ""
        self.shared: dict[Key, SharedCount] = defaultdict(SharedCount)
        self.global_memory: dict[Key, GlobalCount] = defaultdict(GlobalCount)
        self.pipes: dict[str, Counter[str]] = defaultdict(Counter)  # warp instructions by kernel and pipe
        self.names: dict[str, Counter[str]] = defaultdict(Counter)  # by kernel and instruction name
        self.sources: dict[str, Counter[tuple[str, str]]] = defaultdict(Counter)  # by kernel, source line and pipe

    def count_launch(self, launch: Launch) -> None:
        """Add the instructions of a launch."""
        for number, warps in launch.executed.items():
            block = launch.code.blocks[number]
            for instruction in launch.code.instructions[block.first : block.last + 1]:
                pipe = pipe_of(instruction)
                self.pipes[launch.kernel][pipe] += warps
                self.names[launch.kernel][instruction.name] += warps
                self.sources[launch.kernel][instruction.source, pipe] += warps

    def count_shared(self, site: Site, lanes: Array, places: Array, size: int, is_matrix: bool) -> None:
        """Add an access of `size` bytes by each of `lanes`."""
        count = self.shared[_key(site)]
        # A wavefront serves 32 accesses of up to 4 bytes, 16 of 8 bytes and 8 of 16 bytes.
        per_wavefront = min(LANES, WAVEFRONT // size)
        # Eight rows of ldmatrix or stmatrix make one matrix.
        phases = np.arange(len(places)) // 8 if is_matrix else lanes // per_wavefront
        count.requests += len(np.unique(lanes // LANES))
        count.bytes += len(places) * size
        count.ideal += len(np.unique(phases))
        count.wavefronts += _wavefronts(places, phases, size)

    def count_global(self, site: Site, addresses: Array, size: int) -> None:
        """Add an access of `size` bytes by each thread of the site."""
        count = self.global_memory[_key(site)]
        warps = site.numbers // LANES
        count.requests += len(np.unique(warps))
        count.bytes += len(addresses) * size
        sectors = np.unique(np.stack([warps, (addresses // np.uint64(SECTOR)).astype(np.int64)]), axis=1)
        count.sectors += sectors.shape[1]
        distinct = np.unique(np.stack([warps, addresses.astype(np.int64)]), axis=1)
        per_warp = np.bincount(distinct[0]) * size
        count.ideal += int(-(-per_warp // SECTOR).sum())


def _key(site: Site) -> Key:
    instruction = site.instruction
    return Key(site.reporter.kernel, instruction.name, instruction.text, instruction.source)


def _wavefronts(places: Array, phases: Array, size: int) -> int:
    """Return the number of wavefronts: for each phase the most distinct words in one bank."""
    words = (places[:, None] // BANK_BYTES + np.arange(max(1, size // BANK_BYTES))).reshape(-1)
    owners = np.repeat(phases, max(1, size // BANK_BYTES))
    distinct = np.unique(owners.astype(np.int64) << 32 | words)  # a word is delivered to all threads at once
    phase, bank = distinct >> 32, distinct % BANKS
    banks, counts = np.unique(phase * BANKS + bank, return_counts=True)
    starts = np.flatnonzero(np.diff(banks // BANKS, prepend=-1))
    return int(np.maximum.reduceat(counts, starts).sum())
