"""CTAs in execution: registers, active threads, branches, barriers and turns of warps.

All threads of several CTAs run together. A register is one array over all of them, and an instruction is one call. Each
thread has a position, which is a basic block. The machine executes the first block in the program at which a thread
that may run stands, with all threads that stand there. So threads that diverge meet where their paths join.
"""

from __future__ import annotations

from collections import Counter

import numpy as np

from . import undefined
from .dtypes import PRED, U32, Array
from .errors import BarrierError, Hazard, KernelError, PipelineError, UnsupportedInstructionError
from .global_memory import GlobalMemory
from .instructions import named
from .kernel_code import Block, Code
from .local_memory import LocalMemory
from .ptx import Instruction
from .registers import RegisterFile
from .schedule import Schedule, Turns
from .shared_memory import SharedMemory
from .sites import LANES, Layout, Reporter, Site
from .tensor_loads import TensorLoads
from .tensor_memory import TensorMemory
from .warpgroup_products import WarpgroupProducts

MAXIMUM_POLLS = 2000
"""Consecutive failed polls after which threads wait for an event that does not come."""


class Machine:
    """Some CTAs of a launch.

    Args:
        code: The kernel.
        layout: The CTAs.
        memory: Global memory of the launch.
        parameters: The block of parameters, as bytes.
        dynamic_shared: Bytes of shared memory besides the variables of fixed size.
        schedule: The order of warps.
        hazards: Counts of hazards, or None to raise the first.
    """

    def __init__(
        self,
        code: Code,
        layout: Layout,
        memory: GlobalMemory,
        parameters: Array,
        dynamic_shared: int,
        schedule: Schedule,
        hazards: Counter[Hazard] | None,
    ) -> None:
        self.code = code
        self.layout = layout
        self.memory = memory
        memory.begin(layout)
        self.parameters = parameters
        self.reporter = Reporter(code.function.name, hazards)
        self.lane_count = len(layout.ctas) * layout.threads
        self.all_lanes = np.arange(self.lane_count)
        self.all_warps = np.arange(self.lane_count // LANES)
        self._everyone = np.ones(self.lane_count, bool)
        size = -(-code.static_shared // 16) * 16 + dynamic_shared if dynamic_shared else code.static_shared
        self.shared = SharedMemory(layout, size, code.granule, code.has_async_proxy)
        self.local = LocalMemory(self.lane_count, code.local_bytes)
        self.tensor = TensorMemory(layout, code.tensor_columns, self.shared) if code.tensor_columns else None
        self.registers = RegisterFile(code.slots.kinds, self.lane_count, self._note, self._register_fault)
        self.loads = TensorLoads(self.registers)
        self.products = WarpgroupProducts(self.registers, self.shared, self.reporter)
        self.operand_cache: dict[object, tuple[list[Array], Array]] = {}  # of mma: registers and their matrix
        self.executed: Counter[int] = Counter()  # warps by block
        self.cursor = 0  # of the instruction in its block
        self._block = code.blocks[0]
        self._turns = Turns(schedule, int(layout.ctas[0]), len(layout.ctas), layout.threads, code.group)
        self._position = np.zeros(self.lane_count, np.int64)  # block of each thread; the end if it returned
        self._waiting = np.zeros(self.lane_count, bool)
        self._common: int | None = 0  # the block of all threads, if they stand at one
        self._failed_polls = 0
        self._set_special_registers()

    def _set_special_registers(self) -> None:
        for slot, value in self.code.slots.constants.items():
            self.registers.set(slot, value)
        threads = self.all_lanes % self.layout.threads
        ctas = np.repeat(self.layout.ctas, self.layout.threads)
        for name, numbers, extents in (("tid", threads, self.layout.block), ("ctaid", ctas, self.layout.grid)):
            for axis, extent in zip("xyz", extents, strict=True):
                self._set_special(f"%{name}.{axis}", numbers % extent if extent > 1 else np.zeros(1))
                self._set_special(f"%n{name}.{axis}", np.array([extent]))
                numbers = numbers // extent
        self._set_special("%laneid", threads % LANES)

    def _set_special(self, name: str, values: Array) -> None:
        self.registers.set(self.code.slots.register(name), values.astype(U32))

    # Execution

    def run(self) -> None:
        """Run until all threads have returned."""
        blocks, registers = self.code.blocks, self.registers
        with np.errstate(all="ignore"):
            while (number := self._next_block()) is not None:
                block = self._block = blocks[number]
                mask = registers.mask
                warps = len(self.all_warps) if mask is None else int(mask.reshape(-1, LANES).any(1).sum())
                self.executed[number] += warps
                try:
                    for self.cursor, step in enumerate(block.steps):
                        step(self)
                        if registers.undefined:
                            undefined.follow(self)
                except UnsupportedInstructionError as error:
                    raise named(error, self.instruction) from error
                self.cursor = len(block.steps)
                self._leave(number, block)
        self.shared.finish()
        self.products.finish()
        if self.tensor is not None:
            self.tensor.finish()

    def _next_block(self) -> int | None:
        """Choose a block and the threads that execute it; None at the end."""
        end = len(self.code.blocks)
        if self._common is not None and self._turns.is_lockstep:
            self.registers.mask = None
            return None if self._common == end else self._common
        ready = ~self._waiting & (self._position < end)
        if not ready.any():
            if self._waiting.any():
                raise self._barrier_fault("threads wait at a barrier that other threads of their CTA do not reach")
            return None
        runs = self._turns.choose(ready)
        first = int(self._position[runs].min())
        mask = runs & (self._position == first)
        self.registers.mask = None if mask.all() else mask
        return first

    def _leave(self, number: int, block: Block) -> None:
        following, end = number + 1, len(self.code.blocks)
        final = block.exit
        if final is None:
            self._go(following)
        elif final.opcode in ("bar", "barrier"):
            self._arrive(following)
        else:
            target = block.target if final.opcode == "bra" else end
            self._go(target if block.predicate < 0 else self._branch(block, final, target, following))

    def _branch(self, block: Block, final: Instruction, target: int, following: int) -> int | Array:
        taken = self.registers.read(block.predicate, PRED) != final.negated
        for lanes in self.registers.take_undefined().values():
            undefined.report(self, final, "a branch", lanes)
        if taken.all():
            return target
        if not taken.any():
            return following
        if "uni" in final.modifiers:
            self._check_together(taken, final)
        return np.where(taken, target, following)

    def _check_together(self, taken: Array, final: Instruction) -> None:
        """Report a warp that parts at `bra.uni` or `ret.uni`."""
        goes, stays = (part.reshape(-1, LANES) for part in (taken & self.is_active, ~taken & self.is_active))
        parted = goes.any(1) & stays.any(1)
        if parted.any():
            warp = int(np.argmax(parted))
            site = self.site(final, np.array([warp * LANES + int(np.argmax(stays[warp]))]))
            problem = "only some threads of a warp take a branch that is marked as uniform (.uni)"
            site.report(BarrierError, problem, 0, "it does not take the branch")

    def _go(self, block: int | Array) -> None:
        """Move the active threads."""
        mask = self.registers.mask
        if mask is None:
            self._position[:] = block
        else:
            self._position = np.where(mask, block, self._position)
        if mask is None and isinstance(block, int):
            self._common = block
        else:
            self._find_common()

    def _find_common(self) -> None:
        first = int(self._position[0])
        together = not self._waiting.any() and bool((self._position == first).all())
        self._common = first if together else None

    def _arrive(self, following: int) -> None:
        """Let the active threads wait for all threads of their CTA."""
        mask = self.registers.mask
        if mask is None:
            self._release(None)
            self._go(following)
            return
        self._position[mask] = following
        self._waiting |= mask
        threads = self.layout.threads
        waiting, position = self._waiting.reshape(-1, threads), self._position.reshape(-1, threads)
        complete = waiting.all(1)
        if (complete & (position != position[:, :1]).any(1)).any():
            raise self._barrier_fault("threads of one CTA wait at different barriers")
        if complete.any():
            self._release(None if complete.all() else np.flatnonzero(complete))
            self._waiting &= ~np.repeat(complete, threads)
        self._find_common()

    def _release(self, ctas: Array | None) -> None:
        self._turns.end(ctas)
        self.memory.barrier(ctas)
        self.shared.barrier(ctas)
        if self.tensor is not None:
            self.tensor.barrier(ctas)

    # Threads

    def narrow(self, predicate: int, wanted: bool) -> bool:
        """Keep the active threads whose predicate is as wanted; return whether there are any."""
        kept = self.registers.read(predicate, PRED)
        kept = kept if wanted else ~kept
        mask = self.registers.mask
        if mask is not None:
            kept = kept & mask
        if kept.all():
            return True
        self.registers.mask = np.broadcast_to(kept, self.lane_count)
        return bool(kept.any())

    @property
    def is_active(self) -> Array:
        """Whether each thread is active."""
        mask = self.registers.mask
        return self._everyone if mask is None else mask

    def site(self, instruction: Instruction, lanes: Array | None = None) -> Site:
        """Return the active threads, or others, at an instruction."""
        if lanes is None and self.registers.mask is not None:
            lanes = np.flatnonzero(self.registers.mask)
        return Site(self.layout, self.reporter, instruction, lanes, self.all_lanes)

    def whole_warps(self, instruction: Instruction) -> Array:
        """Return the numbers of the active warps.

        Raises:
            BarrierError: If only some threads of a warp are active.
        """
        mask = self.registers.mask
        if mask is None:
            return self.all_warps
        lanes = mask.reshape(-1, LANES)
        some = lanes.any(1)
        if not lanes[some].all():
            warp = int(np.argmax(some & ~lanes.all(1)))
            missing = int(np.argmin(lanes[warp]))
            site = self.site(instruction, np.array([warp * LANES + missing]))
            raise site.fault(BarrierError, "not all threads of a warp execute the instruction", 0, "it is missing")
        return np.flatnonzero(some)

    def lanes_of(self, warps: Array, count: int = LANES) -> Array:
        """Return the first threads of each warp."""
        return np.asarray((warps[:, None] * LANES + np.arange(count)).reshape(-1))

    def move_in_flight(self, target: int, sources: list[int], values: Array, instruction: Instruction) -> None:
        """Move registers that an asynchronous instruction has yet to write."""
        # LLVM emits such moves, and ptxas removes them.
        self.reporter.note(
            "a register is moved before the kernel waited for the instruction that writes it", instruction
        )
        self.registers.launch(target, values)
        self.products.rename(target, sources)

    # Polling

    def poll(self, instruction: Instruction, complete: Array) -> None:
        """Note a test for an event of another warp or a product. `complete` has one element per thread."""
        waits = self.is_active & ~complete
        self._failed_polls = 0 if (complete & self.is_active).any() else self._failed_polls + 1
        if self._failed_polls > MAXIMUM_POLLS:
            raise self.site(instruction).fault(BarrierError, "threads wait for an event that does not happen", 0)
        self._turns.end(np.flatnonzero(waits) // self.layout.threads)

    # Messages

    @property
    def instruction(self) -> Instruction:
        """The instruction in execution."""
        return self.code.instructions[min(self._block.first + self.cursor, self._block.last)]

    def _note(self, problem: str) -> None:
        self.reporter.note(problem, self.instruction)

    def _register_fault(self, slot: int, problem: str) -> Exception:
        site = self.site(self.instruction)
        return site.fault(PipelineError, f"{self.code.slots.names[slot]} {problem}", 0)

    def _barrier_fault(self, problem: str) -> KernelError:
        lane = int(np.flatnonzero(self._waiting)[0])
        barrier = self.code.blocks[int(self._position[lane]) - 1].exit
        assert barrier is not None
        return self.site(barrier, np.array([lane])).fault(BarrierError, problem, 0)
