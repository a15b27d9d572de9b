"""Register layouts of the bias loads, read from the compiler's TTGIR.

The vector loads of bias.load_bias_tile are right only if adjacent registers hold what one instruction loads. A layout
of Triton is linear over bits. Each bit of a register, lane or warp number adds (exclusive or) one basis vector (row,
column) to the position of the element.
"""

import re
import tempfile
from typing import Any, NamedTuple

from triton._C.libtriton import gluon_ir, ir
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend
from triton.experimental.gluon.language import SliceLayout

Bases = list[list[int]]


class BiasLoad(NamedTuple):
    """A load written as inline assembly."""

    assembly: str
    layout: str  # as Triton prints it
    registers: Bases  # basis vector of each bit of the register number
    others: Bases  # basis vectors of lanes and warps

    @property
    def vector(self) -> int:
        """Elements per instruction."""
        found = re.search(r"\.v(\d)\.", self.assembly)
        return int(found[1]) if found else 1


def bias_loads(ttgir: str, capability: int) -> list[BiasLoad]:
    """Return a module's distinct loads that are written as inline assembly."""
    context = ir.context()
    ir.load_dialects(context)
    make_backend(GPUTarget("cuda", capability, 32)).load_dialects(context)
    with tempfile.NamedTemporaryFile("w", suffix=".ttgir") as file:
        file.write(ttgir)
        file.flush()
        module = ir.parse_mlir_module(file.name, context)
    # The module holds no reference to its context.
    module.context = context
    builder = gluon_ir.GluonOpBuilder(context)
    operations: list[Any] = []
    module.walk(operations.append)
    # The compiler leaves copies of loads that nothing uses, which ptxas removes.
    used = {
        operation.get_operand(index).id() for operation in operations for index in range(operation.get_num_operands())
    }
    loads: list[BiasLoad] = []
    for operation in operations:
        if operation.get_name() != "tt.elementwise_inline_asm":
            continue
        assembly, result = operation.get_str_attr("asm_string"), operation.get_result(0)
        if assembly.startswith("ld.") and result.id() in used:
            load = _bias_load(builder, assembly, result)
            loads += [] if load in loads else [load]
    return loads


def _bias_load(builder: Any, assembly: str, result: Any) -> BiasLoad:
    tensor = str(result.get_type())
    dimensions = re.match(r"tensor<((?:\d+x)+)", tensor)
    assert dimensions is not None, tensor
    shape = [int(size) for size in dimensions[1].rstrip("x").split("x")]
    registers, others = _bases(builder, builder.get_gluon_layout_from_tensor(result), shape)
    return BiasLoad(assembly, tensor.partition(", ")[2].removesuffix(">"), registers, others)


def _bases(builder: Any, layout: Any, shape: list[int]) -> tuple[Bases, Bases]:
    """Return the basis vectors of registers, and of lanes and warps together."""
    # A slice is its parent with a sliced dimension of size 1, without the registers that repeat others.
    if isinstance(layout, SliceLayout):
        parent = [*shape[: layout.dim], 1, *shape[layout.dim :]]
        registers, others = _bases(builder, layout.parent, parent)
        registers, others = (
            [basis[: layout.dim] + basis[layout.dim + 1 :] for basis in part] for part in (registers, others)
        )
        return [basis for basis in registers if any(basis)], others
    linear = builder.to_linear_layout(layout._to_ir(builder), shape)
    return [list(basis) for basis in linear.reg_bases], [
        list(basis) for basis in (*linear.lane_bases, *linear.warp_bases)
    ]


def misplaced(load: BiasLoad) -> str | None:
    """Return the register layout error of a vector load, or None."""
    if load.vector not in (1, 2, 4):
        return f"vectors of {load.vector} are not supported (expected 1, 2 or 4): {load.assembly}"
    is_row = len(load.registers[0]) == 1 if load.registers else False
    # Adjacent registers must hold, for 2, columns c and c + 1 of one row, c even; for 4, these of tile row m and then
    # of row m + 8, with m % 16 < 8.
    wanted = {1: [], 2: [[0, 1]], 4: [[0, 1], [8, 0]]}[load.vector]
    if is_row:
        wanted = [basis[1:] for basis in wanted]
    bits = len(wanted)
    if load.registers[:bits] != wanted:
        return f"{load.layout}: registers advance by {load.registers[:bits]}, a vector of {load.vector} needs {wanted}"
    for basis in load.registers[bits:] + load.others:
        parts_columns = load.vector > 1 and basis[-1] & 1
        parts_rows = load.vector == 4 and basis[0] & 8
        if parts_columns or parts_rows:
            return f"{load.layout}: basis {basis} splits vectors of {load.vector}"
    return None
