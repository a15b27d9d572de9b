"""wgmma products in flight: registers that must not be used until their warpgroup waits."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from .dtypes import F32, Array
from .errors import PipelineError
from .ptx import Instruction
from .registers import RegisterFile
from .shared_memory import SharedMemory
from .sites import Reporter, Site

WARPGROUP_LANES = 128
OPEN = -1
"""Group of a product that its warpgroup did not commit yet."""
DONE = -2
"""Group of a product that landed, or that another warpgroup started."""


@dataclasses.dataclass
class Product:
    """A wgmma of some warpgroups."""

    slots: set[int]  # registers that it writes
    group: Array  # for each warpgroup: groups that it had committed before, OPEN or DONE
    site: Site


class WarpgroupProducts:
    """The products in flight of all warpgroups that run together."""

    def __init__(self, registers: RegisterFile, shared: SharedMemory, reporter: Reporter) -> None:
        self._registers = registers
        self._shared = shared
        self._reporter = reporter
        self._products: list[Product] = []
        self._committed = np.zeros(-(-registers.lane_count // WARPGROUP_LANES), np.int64)
        self._fenced: list[Array] = []

    def _active_groups(self) -> Array:
        mask = self._registers.mask
        if mask is None:
            return np.ones(len(self._committed), bool)
        padded = np.zeros(len(self._committed) * WARPGROUP_LANES, bool)
        padded[: len(mask)] = mask
        return np.asarray(padded.reshape(-1, WARPGROUP_LANES).any(1))

    def fence(self) -> None:
        """Handle wgmma.fence: wgmma may read and write the registers as they are now."""
        self._fenced = list(self._registers.values)  # a write replaces the array

    def check_fence(self, operands: Sequence[int], sums: Sequence[int], instruction: Instruction) -> None:
        """Note operands that were written behind the last wgmma.fence."""
        # LLVM moves computations behind the fence; ptxas places the fence anew, so this is not a fault.
        if self._registers.mask is not None:
            return  # arrays then hold what other warpgroups wrote, too
        for slot in (*operands, *sums):
            fenced = self._fenced and self._fenced[slot] is self._registers.values[slot]
            if not fenced and not self._registers.is_flying(slot):
                self._reporter.note("an operand of wgmma is written behind wgmma.fence", instruction)

    def start(self, slots: Sequence[int], values: Array, warps: Array, site: Site) -> None:
        """Start a product of the active warpgroups. Its sums are fp32 `[registers, warps, 32]`."""
        self._registers.launch_fragments(slots, warps, values.astype(F32, copy=False))
        group = np.where(self._active_groups(), OPEN, DONE)
        self._products.append(Product(set(slots), group, site))

    def rename(self, target: int, sources: Sequence[int]) -> None:
        """Note that registers in flight were moved."""
        for product in self._products:
            if not product.slots.isdisjoint(sources):
                product.slots.add(target)

    def commit(self, is_active: Array) -> None:
        """Handle wgmma.commit_group."""
        self._shared.reads.commit(is_active)
        active = self._active_groups()
        for product in self._products:
            product.group = np.where(active & (product.group == OPEN), self._committed, product.group)
        self._committed += active

    def wait(self, allowed: int, is_active: Array) -> None:
        """Handle wgmma.wait_group."""
        self._shared.reads.wait(allowed, is_active)
        active = self._active_groups()
        ends = [
            active & (product.group >= 0) & (product.group < self._committed - allowed) for product in self._products
        ]
        for number, (product, end) in enumerate(zip(self._products, ends, strict=True)):
            if end.any():
                product.group = np.where(end, DONE, product.group)
                self._land(product, end, self._products[number + 1 :])
        self._products = [product for product in self._products if (product.group != DONE).any()]

    def _land(self, product: Product, end: Array, later: list[Product]) -> None:
        """Let the warpgroups `end` use registers that no later product writes again."""
        registers = self._registers
        before = registers.mask
        waiting = [other for other in later if (end & (other.group != DONE)).any()]
        kept: set[int] = set().union(*(other.slots for other in waiting))
        lanes = np.repeat(end, WARPGROUP_LANES)[: registers.lane_count]
        registers.mask = None if lanes.all() else lanes
        for slot in product.slots - kept:
            registers.land(slot)
        registers.mask = before

    def finish(self) -> None:
        """Check the end of the CTAs."""
        if self._products:
            site = self._products[0].site
            raise site.fault(PipelineError, "a CTA ends without waiting for wgmma", 0)
