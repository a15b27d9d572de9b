"""CUDA kernels compiled by nvcc for sm_80, sm_90 and sm_100, without a GPU.

No kernel spills registers to local memory. Each kernel multiplies on tensor cores, or with FMA in fp32.
Two blocks fit on a multiprocessor of any GPU from sm_80 on.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

from ..support.nvcc import NVCC, PATCH_EMBED, compiled, needs_nvcc, run_nvcc

CAPABILITIES = (80, 90, 100)
FILES = ("half", "single")
SMALLEST_SHARED_MEMORY = 99 * 1024  # of a multiprocessor, on sm_86, 89 and 120
REGISTERS = 64 * 1024
THREADS = 128


def test_nvcc_if_required_is_found() -> None:
    assert NVCC or os.environ.get("BEIT_FAST_REQUIRE_NVCC") != "1", (
        "BEIT_FAST_REQUIRE_NVCC=1 is set, and nvcc is missing"
    )


class Kernel(NamedTuple):
    """One compiled kernel for one architecture. Sizes are in bytes."""

    name: str  # arithmetic and rows of the tile
    capability: int
    registers: int
    stack: int
    local: int
    shared: int
    instructions: Counter[str]
    loop: Counter[str]  # instructions of the loop that multiplies


@pytest.fixture(scope="module")
def kernels() -> list[Kernel]:
    """All kernels for all architectures."""
    jobs = [(file, capability) for capability in CAPABILITIES for file in FILES]
    with ThreadPoolExecutor(2) as pool:
        cubins = list(pool.map(lambda job: compiled(*job), jobs))
    return [
        kernel for (_, capability), cubin in zip(jobs, cubins, strict=True) for kernel in inspect(cubin, capability)
    ]


def inspect(cubin: Path, capability: int) -> list[Kernel]:
    """Read the kernels of a cubin with the tools of Triton."""
    from triton import knobs

    from beit_fast.kernels.aot import sass

    command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(cubin)]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    codes = re.split(r"\.section\s+\.text\.(\w+)", sass.disassemble(cubin.read_bytes()))
    code_of = dict(zip(codes[1::2], codes[2::2], strict=True))
    found = []
    for symbol, facts in re.findall(r"Function (\w*patch_embed_kernel\w*):\s*(.*)", usage):
        sizes = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", facts)}
        numbers = re.search(r"ArithmeticE(\d)ENS0_4TileILi(\d+)E", symbol)
        assert numbers is not None, symbol
        name = f"{('float16', 'bfloat16', 'tf32', 'float32')[int(numbers[1])]} {numbers[2]}"
        instructions = Counter(re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)", code_of[symbol]))
        loop = sass.main_loop(code_of[symbol])
        resources = (sizes["REG"], sizes["STACK"], sizes["LOCAL"], sizes["SHARED"])
        found.append(Kernel(name, capability, *resources, instructions, loop))
    return found


def names_of(kernel: Kernel) -> Counter[str]:
    """Count instructions without their modifiers."""
    names: Counter[str] = Counter()
    for instruction, count in kernel.instructions.items():
        names[instruction.partition(".")[0]] += count
    return names


@needs_nvcc
def test_kernels_of_every_arithmetic_and_tile_are_compiled(kernels: list[Kernel]) -> None:
    expected = {
        f"{arithmetic} {rows}" for arithmetic in ("float16", "bfloat16", "tf32", "float32") for rows in (64, 128)
    }
    for capability in CAPABILITIES:
        assert {kernel.name for kernel in kernels if kernel.capability == capability} == expected


@needs_nvcc
def test_kernels_do_not_spill_registers(kernels: list[Kernel]) -> None:
    for kernel in kernels:
        assert (kernel.stack, kernel.local) == (0, 0), kernel
        assert not {"LDL", "STL"} & names_of(kernel).keys(), kernel


@needs_nvcc
def test_kernels_fit_two_blocks_on_every_multiprocessor(kernels: list[Kernel]) -> None:
    """Registers allow four blocks of the small tile.

    CUDA reserves 1 KiB of shared memory for each block.
    """
    for kernel in kernels:
        blocks = 2 if kernel.name.endswith("128") else 4
        assert blocks * THREADS * -(-kernel.registers // 8) * 8 <= REGISTERS, kernel
        assert 2 * (kernel.shared + 1024) <= SMALLEST_SHARED_MEMORY, kernel


@needs_nvcc
@pytest.mark.parametrize(
    ("name", "instruction"),
    [("float16", "HMMA.16816.F32"), ("bfloat16", "HMMA.16816.F32.BF16"), ("tf32", "HMMA.1688.F32.TF32")],
)
def test_kernels_multiply_on_tensor_cores(kernels: list[Kernel], name: str, instruction: str) -> None:
    """A warp step covers a quarter of the tile and 64 bytes of depth."""
    for kernel in kernels:
        arithmetic, rows = kernel.name.split()
        if arithmetic != name:
            continue
        assert kernel.loop[instruction] == {"128": 64, "64": 32}[rows], kernel
        loads = sum(count for load, count in kernel.loop.items() if load.startswith("LDSM"))
        assert loads == 16, kernel


@needs_nvcc
def test_kernels_in_float32_do_not_round_operands(kernels: list[Kernel]) -> None:
    """The loop adds four depths for each slab, and loads four numbers."""
    for kernel in kernels:
        if not kernel.name.startswith("float32"):
            continue
        assert "HMMA" not in names_of(kernel)
        rows, columns, slabs = {"128": (8, 16, 1), "64": (4, 8, 2)}[kernel.name.split()[1]]
        fused = sum(count * (2 if name == "FFMA2" else 1) for name, count in kernel.loop.items() if "FFMA" in name)
        assert fused >= slabs * 4 * rows * columns, kernel
        assert kernel.loop["LDS.128"] >= slabs * (rows + columns), kernel


@needs_nvcc
def test_kernels_read_memory_by_vectors(kernels: list[Kernel]) -> None:
    """Loads have 16 bytes, or 8 or 4 bytes for uint8 pixels."""
    for kernel in kernels:
        assert kernel.instructions["LDG.E.128.CONSTANT"] > 0, kernel
        assert any(name.startswith("LDGSTS") and "128" in name for name in kernel.loop | kernel.instructions), kernel
        narrow = "LDG.E.CONSTANT" if "32" in kernel.name else "LDG.E.64.CONSTANT"
        assert kernel.instructions[narrow] > 0, kernel


@needs_nvcc
def test_operator_compiles_against_stable_abi(tmp_path: Path) -> None:
    source = str(PATCH_EMBED / "operator.cu")
    run_nvcc("-c", "-arch=sm_90", "-Xcompiler", "-fPIC", "-o", str(tmp_path / "operator.o"), source)
