"""tcgen05.mma: products whose sums are in tensor memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from .. import descriptors, fragments
from ..async_reads import Reader
from ..dtypes import F32, PRED, U32, U64, Array
from ..ptx import Address, Instruction
from ..sites import Site
from ..slots import Slots
from .barriers import tensor_of
from .memory import address_of

if TYPE_CHECKING:
    from ..machine import Machine

_COLUMNS = 8
"""Columns of tensor memory that hold the 32 bytes of K of an operand A."""


def build(instruction: Instruction, slots: Slots) -> Callable[[Machine], None]:
    """Return the step of a tcgen05.mma of one CTA."""
    instruction.allow("mma", "cta_group_1", "kind_f16", "kind_tf32")
    if len(instruction.operands) != 5:
        raise instruction.unsupported()
    return _Multiply(instruction, slots)


class _Multiply:
    """The step. The active threads belong to different CTAs."""

    def __init__(self, instruction: Instruction, slots: Slots) -> None:
        self._instruction = instruction
        self._kind = instruction.modifiers[-1].removeprefix("kind_")
        self._sums = address_of(instruction, 0, slots, U32)
        # A is in tensor memory or in shared memory.
        in_tensor_memory = isinstance(instruction.operand(1), Address)
        self._a_address = address_of(instruction, 1, slots, U32) if in_tensor_memory else None
        self._a_descriptor = -1 if in_tensor_memory else slots.operand(instruction, 1, U64)
        self._b_descriptor = slots.operand(instruction, 2, U64)
        self._shape = slots.operand(instruction, 3, U32)
        self._accumulates = slots.operand(instruction, 4, PRED)

    def __call__(self, machine: Machine) -> None:
        tensor, registers = tensor_of(machine, self._instruction), machine.registers
        site = machine.site(self._instruction)
        if len(np.unique(site.slots)) != len(site.numbers):
            raise self._instruction.unsupported("several threads of a CTA execute it together")
        shape = self._read_shape(machine, site)
        readers: list[list[Reader]] = [[] for _ in site.numbers]
        operands: Array | None = None
        if self._a_address is not None:
            if shape.transposed[0]:
                raise self._instruction.unsupported("an operand in tensor memory is transposed")
            operands = self._cells(machine, site, self._a_address(machine), shape.rows, _COLUMNS)
            words = tensor.read_operand(operands, site)
            a = fragments.unpack(words, shape.kind).reshape(len(words), shape.rows, -1)
        else:
            a = self._read_shared(machine, site, self._a_descriptor, shape, readers, is_b=False)
        b = self._read_shared(machine, site, self._b_descriptor, shape, readers, is_b=True)
        sums = self._cells(machine, site, self._sums(machine), shape.rows, shape.columns)
        before = tensor.read_sums(sums, site).view(F32)
        products = np.matmul(a, b.swapaxes(1, 2))
        accumulates = site.active(registers.read(self._accumulates, PRED))[:, None, None]
        results = np.where(accumulates, products + before, products)
        for place, lane in enumerate(site.numbers.tolist()):
            read = None if operands is None else operands[place]
            tensor.start(sums[place], results[place], read, readers[place], site.among(np.array([lane])))

    def _read_shape(self, machine: Machine, site: Site) -> descriptors.Shape:
        found = np.unique(site.active(machine.registers.read(self._shape, U32)))
        if len(found) != 1:
            raise self._instruction.unsupported("CTAs have different instruction descriptors")
        return descriptors.instruction_shape(int(found[0]), self._kind)

    def _read_shared(
        self, machine: Machine, site: Site, slot: int, shape: descriptors.Shape, readers: list[list[Reader]], is_b: bool
    ) -> Array:
        """Return an operand, fp32 `[threads, long axis, K]`, and add its readers."""
        values = site.active(machine.registers.read(slot, U64))
        long_axis, transposed = shape.columns if is_b else shape.rows, shape.transposed[is_b]
        addresses = descriptors.operand_addresses(values, long_axis, fragments.ELEMENTS[shape.kind], transposed)
        chunks = []
        for place, lane in enumerate(site.numbers.tolist()):
            own = addresses[place].reshape(-1)
            one = site.among(np.full(len(own), lane))
            places = machine.shared.place(own, descriptors.CHUNK, one)
            found, reader = machine.shared.load_async(places, 1, one, is_waited_by_thread=False)
            chunks.append(found)
            readers[place].append(reader)
        return descriptors.chunks_to_operand(np.stack(chunks).reshape(addresses.shape), shape.kind, transposed)

    def _cells(self, machine: Machine, site: Site, addresses: Array, rows: int, columns: int) -> Array:
        """Return cells `[threads, rows, columns]`. A product of 64 rows uses half of the 32 rows of each warp."""
        row = np.arange(rows)
        row = row if rows == 128 else row // 16 * 32 + row % 16
        start = site.active(addresses).astype(np.int64)[:, None, None]
        tensor = tensor_of(machine, self._instruction)
        ctas = site.slots[:, None, None]
        return tensor.cells(ctas, (start >> 16) + row[None, :, None], (start & 0xFFFF) + np.arange(columns), site)
