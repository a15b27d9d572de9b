"""Tensor memory of sm_100 and the tcgen05 instructions in flight.

A product's sums and a store hold the pattern of values in flight until the kernel waits. It waits for products at the
mbarrier that a commit names, and for stores and loads with tcgen05.wait.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np

from .access_log import AccessLog
from .async_reads import CHUNK, Guard, Reader
from .dtypes import IN_FLIGHT, U16, U32, UNINITIALIZED, Array, has_pattern, holds_pattern, pattern
from .errors import AccessError, BarrierError, PipelineError, RaceError
from .shared_memory import BASE, SharedMemory
from .sites import Layout, Site

ROWS = 128
"""PTX calls them lanes."""
COLUMNS = 512
CELL = 4
"""Bytes of a cell, which is one row of one column."""


@dataclasses.dataclass(eq=False)
class Product:
    """A tcgen05.mma of one CTA that was not observed yet."""

    number: int
    cta: int  # among those that run together
    lane: int  # that issued it
    sums: Array  # cells
    operands: Array  # cells that it reads
    readers: list[Reader]  # of shared memory
    site: Site
    commit: int | None = None  # number of the commit behind it


@dataclasses.dataclass
class Mbarrier:
    """A barrier in shared memory on which commits arrive."""

    phase: int = 0
    was_polled: bool = False  # whether a thread asked for the current phase
    arrivals: list[int] = dataclasses.field(default_factory=list)  # commits that no thread observed yet
    landed: list[Product] = dataclasses.field(default_factory=list)  # of earlier phases, since the last CTA barrier


class _Store(NamedTuple):
    """A tcgen05.st in flight."""

    lanes: Array
    cells: Array
    values: Array
    site: Site


class _Load(NamedTuple):
    """A tcgen05.ld that may still read."""

    lanes: Array
    cells: Array
    site: Site


class TensorMemory:
    """Tensor memory of the CTAs that run together. A cell's number is `CTA * stride + column * ROWS + row`.

    Args:
        layout: The CTAs.
        columns: Upper bound of the columns that a CTA allocates.
        shared: Shared memory of the same CTAs, which products read.
    """

    def __init__(self, layout: Layout, columns: int, shared: SharedMemory) -> None:
        cta_count = len(layout.ctas)
        self._layout = layout
        self._shared = shared
        self._stride = columns * ROWS
        self._cells = np.full(cta_count * self._stride * 2, UNINITIALIZED, U16).view(U32)
        self._coming = np.zeros_like(self._cells)  # what products in flight leave
        self._writer = np.zeros(len(self._cells), np.int32)  # number of the product that will write a cell
        self._readers = np.zeros(len(self._cells), np.int16)  # products that read a cell
        self._log = AccessLog("tensor memory", cta_count, self._stride * CELL, layout.threads, CELL)
        self._guard = Guard(cta_count, self._stride, layout.threads)
        self._products: list[Product] = []
        self._stores: list[_Store] = []
        self._loads: list[_Load] = []
        self._barriers: dict[tuple[int, int], Mbarrier] = {}
        self._allocated = np.zeros(cta_count, np.int64)
        self._last_allocation: Site | None = None
        self._serial = 0

    # Allocation and addresses

    def allocate(self, cta: int, columns: int, site: Site) -> int:
        """Return the address of new columns."""
        first = int(self._allocated[cta])
        if (
            columns not in (32, 64, 128, 256, 512)
            or (first + columns) * ROWS > self._stride
            or first + columns > COLUMNS
        ):
            raise site.fault(AccessError, f"allocates {columns} columns of tensor memory", 0, f"{first} are in use")
        self._allocated[cta] += columns
        self._last_allocation = site
        return first

    def free(self, cta: int, columns: int, site: Site) -> None:
        if any(product.cta == cta for product in self._products):
            raise site.fault(PipelineError, "frees tensor memory that a product still uses", 0)
        cells = cta * self._stride + np.arange(int(self._allocated[cta]) * ROWS)
        lanes = np.broadcast_to(site.numbers[:1], cells.shape)
        self._log.check_now(cells * CELL, CELL, lanes, site.among(lanes), is_write=True)
        self._check_loaded(cells, lanes, site)
        self._allocated[cta] -= columns
        if self._allocated[cta] < 0:
            raise site.fault(AccessError, "frees more tensor memory than was allocated", 0)

    def cells(self, ctas: Array, rows: Array, columns: Array, site: Site) -> Array:
        """Return numbers of cells after a check. The first axis of the arguments is one thread of the site each."""
        outside = (columns < 0) | (columns >= self._allocated[ctas]) | (rows < 0) | (rows >= ROWS)
        if outside.any():
            index = np.unravel_index(int(np.argmax(outside)), outside.shape)
            row, column = (int(np.broadcast_to(part, outside.shape)[index]) for part in (rows, columns))
            where = f"row {row}, column {column}"
            raise site.fault(AccessError, "accesses tensor memory that is not allocated", int(index[0]), where)
        return np.asarray(ctas * self._stride + columns * ROWS + rows)

    def _where(self, cell: int) -> str:
        place = int(cell) % self._stride
        return f"row {place % ROWS}, column {place // ROWS} of tensor memory"

    # Loads and stores of threads

    def load(self, cells: Array, site: Site) -> Array:
        """Return uint32 `[threads, columns]`. Until its threads wait, the load may still read."""
        flat, lanes = self._flat(cells, site)
        self._log.add(flat * CELL, CELL, lanes, site)
        self._loads.append(_Load(lanes, flat, site))
        values = self._cells[flat]
        self._check_arrived(values, flat, lanes, "reads", site)
        self._check_observed(flat, lanes, "reads", site)
        if has_pattern(values, UNINITIALIZED):
            site.note("reads uninitialized tensor memory", int(holds_pattern(values, UNINITIALIZED).sum()))
        return values.reshape(cells.shape)

    def store(self, cells: Array, values: Array, site: Site) -> None:
        """Start to store uint32 `[threads, columns]`."""
        flat, lanes = self._flat(cells, site)
        self._log.add(flat * CELL, CELL, lanes, site, values.reshape(-1))
        self._check_arrived(self._cells[flat], flat, lanes, "writes", site)
        self._check_observed(flat, lanes, "writes", site)
        busy = self._readers[flat] > 0
        if busy.any():
            index = int(np.argmax(busy))
            product = next(one for one in self._products if (one.operands == flat[index]).any())
            others = [f"read by {product.site.instruction}"]
            problem = "writes tensor memory that a product may still read"
            site.among(lanes).report(PipelineError, problem, index, self._where(flat[index]), others)
        self._check_loaded(flat, lanes, site)
        self._cells[flat] = pattern(IN_FLIGHT, U32)[0]
        self._stores.append(_Store(lanes, flat, values.reshape(-1), site))

    @staticmethod
    def _flat(cells: Array, site: Site) -> tuple[Array, Array]:
        lanes = np.broadcast_to(site.numbers[:, None], cells.shape)
        return cells.reshape(-1), lanes.reshape(-1)

    def wait_for_loads(self, is_active: Array) -> None:
        """Handle tcgen05.wait::ld."""
        kept = [(load, ~is_active[load.lanes]) for load in self._loads]
        self._loads = [_Load(load.lanes[left], load.cells[left], load.site) for load, left in kept if left.any()]

    def wait_for_stores(self, is_active: Array) -> None:
        """Handle tcgen05.wait::st."""
        kept = []
        for store in self._stores:
            done = is_active[store.lanes]
            self._cells[store.cells[done]] = store.values[done]
            if not done.all():
                left = ~done
                kept.append(_Store(store.lanes[left], store.cells[left], store.values[left], store.site))
        self._stores = kept

    def _check_arrived(self, values: Array, flat: Array, lanes: Array, verb: str, site: Site) -> None:
        if (self._products or self._stores) and has_pattern(values, IN_FLIGHT):
            index = int(np.argmax(holds_pattern(values, IN_FLIGHT)))
            problem = f"{verb} tensor memory before the kernel waited for the instruction that writes it"
            raise site.among(lanes).fault(PipelineError, problem, index, self._where(flat[index]))

    def _check_observed(self, flat: Array, lanes: Array, verb: str, site: Site) -> None:
        index = self._guard.find(flat, lanes)
        if index is not None:
            problem = f"{verb} tensor memory of a product that this warp did not wait for"
            site.among(lanes).report(RaceError, problem, index, self._where(flat[index]))

    def _check_loaded(self, flat: Array, lanes: Array, site: Site) -> None:
        """Report writes to cells that a load may still read: the same thread has to wait, too."""
        for load in self._loads:
            busy = np.isin(flat, load.cells)
            if busy.any():
                index = int(np.argmax(busy))
                problem = "writes tensor memory that tcgen05.ld may still read"
                others = [f"read by {load.site.instruction}"]
                site.among(lanes).report(PipelineError, problem, index, self._where(flat[index]), others)

    # Products

    def read_operand(self, cells: Array, site: Site) -> Array:
        """Return uint32 cells that products multiply, `[threads, rows, columns]`."""
        flat = cells.reshape(-1)
        lanes = np.broadcast_to(site.numbers[:, None, None], cells.shape).reshape(-1)
        self._log.check_now(flat * CELL, CELL, lanes, site.among(lanes), is_write=False)
        values = self._cells[flat]
        self._check_arrived(values, flat, lanes, "multiplies", site)
        return values.reshape(cells.shape)

    def read_sums(self, cells: Array, site: Site) -> Array:
        """Return uint32 cells that products add to, `[threads, rows, columns]`."""
        flat = cells.reshape(-1)
        lanes = np.broadcast_to(site.numbers[:, None, None], cells.shape).reshape(-1)
        self._log.check_now(flat * CELL, CELL, lanes, site.among(lanes), is_write=True)
        self._check_loaded(flat, lanes, site)
        # Products of a CTA are executed in order, so sums of products in flight may be used.
        coming = self._writer[flat] != 0
        values = np.where(coming, self._coming[flat], self._cells[flat])
        waiting = np.where(coming, U32.type(0), self._cells[flat])
        self._check_arrived(waiting, flat, lanes, "adds to", site)
        return values.reshape(cells.shape)

    def start(self, sums: Array, values: Array, operands: Array | None, readers: list[Reader], site: Site) -> None:
        """Start the product of one thread; its results appear when a thread observes the commit."""
        self._serial += 1
        flat = sums.reshape(-1)
        read = np.zeros(0, np.int64) if operands is None else operands.reshape(-1)
        lane = int(site.numbers[0])
        self._products.append(Product(self._serial, lane // self._layout.threads, lane, flat, read, readers, site))
        self._coming[flat] = np.ascontiguousarray(values).reshape(-1).view(U32)
        self._cells[flat] = pattern(IN_FLIGHT, U32)[0]
        self._writer[flat] = self._serial
        self._readers[read] += 1

    def _land(self, product: Product) -> None:
        written = product.sums[self._writer[product.sums] == product.number]
        self._cells[written] = self._coming[written]
        self._writer[written] = 0
        self._readers[product.operands] -= 1
        self._shared.reads.finish(product.readers)

    # mbarriers

    def initialize(self, cta: int, address: int, site: Site) -> None:
        self._shared.barriers.begin(self._place(cta, address), site)
        self._barriers[cta, address] = Mbarrier()

    def invalidate(self, cta: int, address: int, site: Site) -> None:
        if self._barrier(cta, address, site).arrivals:
            raise site.fault(PipelineError, "invalidates an mbarrier on which a commit will arrive", 0)
        self._shared.barriers.end(self._place(cta, address))
        del self._barriers[cta, address]

    def _place(self, cta: int, address: int) -> int:
        return cta * self._shared.stride + address - BASE

    def commit(self, cta: int, address: int, site: Site) -> None:
        """Let the mbarrier complete a phase after all the thread's earlier products."""
        self._serial += 1
        lane = int(site.numbers[0])
        for product in self._products:
            if product.lane == lane and product.commit is None:
                product.commit = self._serial
        self._barrier(cta, address, site).arrivals.append(self._serial)

    def try_wait(self, cta: int, address: int, parity: int, warps: list[int], site: Site) -> bool:
        """Return whether the phase of this parity is over.

        `warps` of the CTA observe it. An event that may happen at any time happens as late as possible: when a thread
        asks for it.
        """
        barrier = self._barrier(cta, address, site)
        if barrier.phase & 1 == parity:
            # A kernel must be right if the first test comes too early, so it always does.
            if not barrier.arrivals or not barrier.was_polled:
                barrier.was_polled = bool(barrier.arrivals)
                return False
            self._complete(cta, barrier, warps)
        else:
            self._allow(barrier.landed, warps)
        return True

    def _complete(self, cta: int, barrier: Mbarrier, warps: list[int]) -> None:
        number = barrier.arrivals.pop(0)
        barrier.phase += 1
        barrier.was_polled = False
        done = [one for one in self._products if one.cta == cta and one.commit is not None and one.commit <= number]
        ended = set(map(id, done))
        self._products = [product for product in self._products if id(product) not in ended]
        for product in done:
            self._land(product)
        if len(warps) == self._layout.warps:
            return
        barrier.landed += done
        for product in done:
            for cells in (product.sums, product.operands):
                self._guard.close(cells, cta, warps[0])
            for reader in product.readers:
                self._shared.guard.close(reader.places // CHUNK, cta, warps[0])
        self._allow(done, warps[1:])

    def _allow(self, products: list[Product], warps: list[int]) -> None:
        """Let these warps access what ended products used."""
        for product in products:
            for warp in warps:
                for cells in (product.sums, product.operands):
                    self._guard.allow(cells, warp)
                for reader in product.readers:
                    self._shared.guard.allow(reader.places // CHUNK, warp)

    def _barrier(self, cta: int, address: int, site: Site) -> Mbarrier:
        barrier = self._barriers.get((cta, address))
        if barrier is None:
            raise site.fault(BarrierError, "uses an mbarrier that is not initialized", 0, f"address {address:#x}")
        return barrier

    def barrier(self, ctas: Array | None) -> None:
        """Handle a barrier of these CTAs; None for all."""
        self._log.barrier(ctas)
        self._guard.barrier(ctas)
        chosen = None if ctas is None else set(ctas.tolist())
        for (cta, _), barrier in self._barriers.items():
            if chosen is None or cta in chosen:
                barrier.landed.clear()
        for load in self._loads:  # they may continue to read behind the barrier
            self._log.add(load.cells * CELL, CELL, load.lanes, load.site)

    def finish(self) -> None:
        """Check the end of the CTAs."""
        self._log.barrier(None)
        if self._products:
            site = self._products[0].site
            raise site.fault(PipelineError, "a CTA ends without waiting for a product", 0)
        if self._stores:
            site = self._stores[0].site
            raise site.fault(PipelineError, "a CTA ends without waiting for a store to tensor memory", 0)
        if self._last_allocation is not None and self._allocated.any():
            raise self._last_allocation.fault(AccessError, "a CTA ends without freeing its tensor memory", 0)
