"""Registers of warpgroup products in the machine code of sm_90."""

from __future__ import annotations

import itertools
import os
import re

import pytest

pytest.importorskip("triton", reason="needs Triton")
if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
    pytest.skip("the Triton interpreter and compiler cannot share a process", allow_module_level=True)

from beit_fast.kernels.aot import in_flight, sass
from beit_fast.kernels.aot.attention_variants import PRODUCTS, Variant, bias_layouts, shipped
from beit_fast.kernels.aot.compile import compile_variant

PRODUCT = "HGMMA.64x16x16.F32.BF16 R8, R24, gdesc[UR4], R8"
WAIT = "WARPGROUP.DEPBAR.LE gsb0, 0x0"


def machine_code(*lines: str) -> str:
    """Return lines as nvdisasm prints them; labels end with a colon."""
    return "\n".join(
        line if line.endswith(":") else f"        /*{16 * n:04x}*/      {line} ;" for n, line in enumerate(lines)
    )


def test_find_accesses_behind_the_wait_finds_none() -> None:
    code = machine_code(
        "FADD R8, R1, R2", "MOV R24, R3", f"{PRODUCT}, gsb0", "FADD R1, R16, R24", WAIT, "FADD R24, R8, R15"
    )
    assert in_flight.find_accesses(code) == []
    assert in_flight.count_products(code) == 1


@pytest.mark.parametrize(
    ("instruction", "registers"),
    [
        ("FADD R1, R15, R2", "R15"),  # reads a sum
        ("MOV R8, R2", "R8"),  # writes a sum
        ("MOV R27, R2", "R27"),  # writes a factor
        ("LDS.128 R4, [R1]", ""),
        ("LDS.128 R5, [R1]", "R8"),
        ("STG.E.128 desc[UR2][R6.64], R12", "R12, R13, R14, R15"),
        ("STG.E desc[UR2][R14.64], R1", "R14, R15"),
        ("HGMMA.64x16x16.F32.BF16 R32, R12, gdesc[UR4], R32", "R12, R13, R14, R15"),
        ("HGMMA.64x16x16.F32.BF16 R8, R40, gdesc[UR4], R8", ""),  # adds to the same sums
    ],
)
def test_find_accesses_before_the_wait_names_instruction_and_registers(instruction: str, registers: str) -> None:
    found = in_flight.find_accesses(machine_code(f"{PRODUCT}, gsb0", instruction, WAIT))
    assert found == ([f"{instruction}: {registers}"] if registers else [])


def test_find_accesses_keeps_the_groups_that_a_wait_leaves() -> None:
    second = "HGMMA.64x16x16.F32.BF16 R32, gdesc[UR8], gdesc[UR4], R32, gsb0"
    lines = [f"{PRODUCT}, gsb0", second, "WARPGROUP.DEPBAR.LE gsb0, 0x1", "FADD R1, R8, R2", "FADD R1, R32, R2", WAIT]
    assert in_flight.find_accesses(machine_code(*lines)) == ["FADD R1, R32, R2: R32"]


def test_find_accesses_of_a_group_without_an_end_is_in_flight_behind_a_wait() -> None:
    assert in_flight.find_accesses(machine_code(PRODUCT, WAIT, "FADD R1, R8, R2")) == ["FADD R1, R8, R2: R8"]


@pytest.mark.parametrize("branch", ["@P0 BRA `(.L_x_1)", "BRA P0, `(.L_x_1)"])
def test_find_accesses_follows_branches(branch: str) -> None:
    loop = machine_code(".L_x_1:", "MOV R24, R3", f"{PRODUCT}, gsb0", branch, WAIT, "EXIT")
    assert in_flight.find_accesses(loop) == ["MOV R24, R3: R24"]
    skipped = machine_code(f"{PRODUCT}, gsb0", "BRA `(.L_x_1)", "FADD R1, R8, R2", ".L_x_1:", WAIT, "EXIT")
    assert in_flight.find_accesses(skipped) == []


def variant(kernel: str, head_dim: int = 32, dtype: str = "bf16", dropout: bool = False) -> Variant:
    precision = "tf32" if dtype == "fp32" else "ieee"
    layout = bias_layouts(90, dtype)[0]
    return shipped(Variant(kernel, 90, None, dtype, precision, head_dim, layout, dropout=dropout))


def check_machine_code(one: Variant) -> str:
    code = sass.disassemble(compile_variant(one).cubin)
    assert in_flight.find_accesses(code) == []
    return code


@pytest.mark.parametrize("kernel", PRODUCTS)
def test_compiled_kernels_leave_registers_in_flight_alone(kernel: str) -> None:
    code = check_machine_code(variant(kernel))
    assert in_flight.count_products(code) > 0
    # Without the waits, the same code is wrong.
    assert in_flight.find_accesses(re.sub(r"WARPGROUP\.DEPBAR\S* .*;", "NOP ;", code))


@pytest.mark.slow
@pytest.mark.parametrize("kernel", PRODUCTS)
def test_every_compiled_tile_leaves_registers_in_flight_alone(kernel: str) -> None:
    shapes = itertools.product((32, 80), ("bf16", "fp32"), (False, True))
    counts = [in_flight.count_products(check_machine_code(variant(kernel, *shape))) for shape in shapes]
    assert sum(count > 0 for count in counts) > len(counts) // 2
