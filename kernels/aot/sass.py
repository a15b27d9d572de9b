"""Resources of a cubin, and instructions and cycles of its main loop.

The unit is one 64 x 64 tile of scores on one streaming multiprocessor (SM). An iteration of the main loop computes a
tile of BLOCK_M x BLOCK_N with `warps` warps, which all execute every instruction of the loop. An instruction is
therefore issued `warps / (BLOCK_M * BLOCK_N / 4096)` times per unit. Cycles are a lower bound: the largest of the
cycles of issue and of each pipe. Dependencies and latencies add to it.
"""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from triton import knobs

PIPES = ("mma", "xu", "lsu", "alu", "fma", "uniform", "other")

NAMES = {
    "xu": "BREV F2F F2I FLO FRND I2F I2I MUFU POPC",
    "lsu": "ATOM ATOMG ATOMS LD LDC LDG LDGSTS LDL LDS LDSM LDTM MATCH RED SHFL ST STG STL STS STSM STTM",
    "fma": "FADD FADD2 FADD32I FFMA FFMA2 FFMA32I FHFMA FMUL FMUL2 FMUL32I FSWZADD HADD2 HFMA2 HMUL2 IDP IMAD",
    "alu": """BMSK F2FP FCHK FMNMX FMNMX3 FSEL FSET FSETP HMNMX2 HSETP2 I2FP IABS IADD IADD3 IMNMX IMNMX3 ISETP LEA LEPC
        LOP LOP3 MOV MOV32I P2R PLOP3 PRMT R2P SEL SGXT SHF SHL SHR VIADD VIADDMNMX VIMNMX VIMNMX3""",
    "uniform": "LDCU R2UR S2UR VOTEU",
    "other": """ACQBULK ARRIVES BAR BMOV BPT BRA BREAK BRX BSSY BSYNC CALL CCTL CS2R DEPBAR ELECT ERRBAR EXIT FENCE JMP
        LDGDEPBAR MEMBAR NANOSLEEP NOP PMTRIG PREEXIT REDUX RET S2R SYNCS UTCATOMSWS UTCBAR VOTE WARPGROUP WARPSYNC
        YIELD""",
}
PIPE_OF = {name: pipe for pipe, names in NAMES.items() for name in names.split()}
MATRIX = re.compile(r"(H|HG|I|QG|UTC\w*)MMA")
LINE = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@(!?\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*(?:;.*)?$")
LABEL = re.compile(r"(\.L_x_\d+):")
TARGET = re.compile(r"`\((\.L_x_\d+)\)")
ENCODING = re.compile(r"\s+/\* 0x([0-9a-f]{16}) \*/")


class Line(NamedTuple):
    """One instruction of machine code."""

    name: str  # with modifiers
    operands: str
    guard: str | None
    encoding: int = 0  # upper half, if it was disassembled with "-hex"
    target: int = -1  # number of the instruction that a branch goes to


class Resources(NamedTuple):
    """Resources of one program."""

    registers: int  # of a thread
    stack: int  # bytes
    local: int  # bytes


class Rates(NamedTuple):
    """Throughput of one SM per cycle."""

    matrix: int  # fp16 multiply-adds
    fma: int  # lanes
    alu: int  # lanes


# NVIDIA's CUDA C++ Best Practices Guide, "Throughput of Native Arithmetic Instructions", has fma and alu; 10.0 and 12.0
# take the largest alu rate of their class, so that the bound stays a lower one. The whitepapers of A100 (GA100), H100
# (GH100) and later have the dense matrix rates with fp32 accumulation. GeForce parts of 8.6, 8.9 and 12.0 have half of
# these; tf32 has half of fp16.
RATES = {
    80: Rates(1024, 64, 64),
    86: Rates(512, 128, 64),
    89: Rates(512, 128, 64),
    90: Rates(2048, 128, 64),
    100: Rates(4096, 128, 128),
    120: Rates(512, 128, 128),
}
# Each scheduler issues one warp instruction a cycle (compute capability 8.0 and later). The guide has 16 results a
# cycle for exp2 and conversions. The whitepapers have 32 load/store lanes of 4 bytes; bank conflicts, uncoalesced
# addresses, and shared memory that wgmma reads are not counted.
SCHEDULERS = 4
XU_LANES = 16
LSU_LANES = 32
WARP = 32


class Work(NamedTuple):
    """The work of an iteration of a main loop."""

    capability: int
    warps: int
    scores: int  # BLOCK_M * BLOCK_N
    multiply_adds: int  # of all its matrix products
    tf32: bool


def resources(cubin: bytes) -> Resources:
    """Return registers, stack and local memory of a cubin's only kernel."""
    usage = _run_on(cubin, knobs.nvidia.cuobjdump.path, "--dump-resource-usage")
    fields = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    return Resources(fields["REG"], fields["STACK"], fields["LOCAL"])


def disassemble(cubin: bytes, *options: str) -> str:
    """Return the machine code of a cubin as nvdisasm prints it; "-hex" adds encodings."""
    return _run_on(cubin, knobs.nvidia.nvdisasm.path, "-c", *options)


def _run_on(cubin: bytes, *command: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([*command, file.name], check=True, capture_output=True, text=True).stdout


def main_loop(disassembly: str) -> Counter[str]:
    """Count the instructions, with modifiers, of the loop that multiplies matrices; empty if there is none."""
    # Choose the innermost loop around a matrix instruction: on sm_100, barrier waits after the code branch back as
    # well. Without tensor cores, choose the shortest loop with the most FFMA.
    code = parse(disassembly)
    bodies = [[line.name for line in code[first : last + 1]] for first, last in loops(code)]
    with_matrices = [body for body in bodies if any(MATRIX.match(name) for name in body)]
    if with_matrices:
        return Counter(with_matrices[0])
    fused = [sum(base_name(name) in ("FFMA", "FFMA2") for name in body) for body in bodies]
    candidates = [body for body, count in zip(bodies, fused, strict=True) if count == max(fused) > 0]
    candidates.sort(key=len)
    return Counter(candidates[0] if candidates else [])


def parse(disassembly: str) -> list[Line]:
    """Return the instructions of what nvdisasm prints."""
    code: list[Line] = []
    labels: dict[str, int] = {}
    for text in disassembly.splitlines():
        if label := LABEL.match(text):
            labels[label[1]] = len(code)
        elif found := LINE.match(text):
            code.append(Line(found[2], found[3], found[1]))
        elif code and (found := ENCODING.match(text)):
            code[-1] = code[-1]._replace(encoding=int(found[1], 16))
    return [
        line._replace(target=labels[target[1]])
        if base_name(line.name) == "BRA" and (target := TARGET.search(line.operands))
        else line
        for line in code
    ]


def loops(code: Sequence[Line]) -> list[tuple[int, int]]:
    """Return (first, last) of each loop in the order of their ends."""
    # A loop is the code between a label and a branch back to it.
    return [(line.target, place) for place, line in enumerate(code) if 0 <= line.target <= place]


def base_name(instruction: str) -> str:
    """Return the name without modifiers: LDG of LDG.E.128."""
    return instruction.partition(".")[0]


def pipe_of(instruction: str) -> str:
    """Return the pipe, one of PIPES, that executes an instruction."""
    name = base_name(instruction)
    if MATRIX.fullmatch(name):
        return "mma"
    return PIPE_OF.get(name, "uniform" if name.startswith("U") else "other")


def is_known(instruction: str) -> bool:
    """Whether `pipe_of` knows an instruction; unknown ones count as "other"."""
    return pipe_of(instruction) != "other" or base_name(instruction) in PIPE_OF


def instructions_by_pipe(loop: Counter[str], work: Work) -> dict[str, float]:
    """Return warp instructions per scheduler and 64 x 64 tile, by pipe."""
    counts = dict.fromkeys(PIPES, 0.0)
    for instruction, count in loop.items():
        counts[pipe_of(instruction)] += count * _issues(work) / SCHEDULERS
    return counts


def cycles_by_pipe(loop: Counter[str], work: Work) -> dict[str, float]:
    """Return lower bounds of cycles per 64 x 64 tile, by pipe."""
    rates = RATES[work.capability]
    lanes = {"xu": XU_LANES, "alu": rates.alu, "fma": rates.fma}
    cycles = dict.fromkeys(("issue", "mma", "xu", "lsu", "alu", "fma"), 0.0)
    for instruction, count in loop.items():
        pipe = pipe_of(instruction)
        cycles["issue"] += count * _issues(work) / SCHEDULERS
        if pipe in lanes:
            cycles[pipe] += count * _issues(work) * WARP / lanes[pipe]
        elif pipe == "lsu":
            cycles["lsu"] += count * _issues(work) * access_words(instruction) * WARP / LSU_LANES
    if any(pipe_of(instruction) == "mma" for instruction in loop):
        in_loop = multiply_adds(loop)
        total = work.multiply_adds if in_loop is None else in_loop * work.warps
        cycles["mma"] = total / (rates.matrix / (2 if work.tf32 else 1)) / (work.scores / 4096)
    return cycles


def bound(cycles: dict[str, float]) -> str:
    """Return the name of the largest of the cycles."""
    return max(cycles, key=lambda name: cycles[name])


def _issues(work: Work) -> float:
    """Return the issues of a loop instruction per 64 x 64 scores."""
    return work.warps / (work.scores / 4096)


def access_words(instruction: str) -> int:
    """Return the words of 4 bytes per lane that an access moves."""
    # Tensor memory has its own port, and counts as one word.
    if base_name(instruction) in ("LDSM", "STSM"):
        return int(instruction[-1]) if instruction.endswith((".2", ".4")) else 1
    if base_name(instruction) in ("LDTM", "STTM"):
        return 1
    modifiers = instruction.split(".")
    return 4 if "128" in modifiers else 2 if "64" in modifiers else 1


def multiply_adds(loop: Counter[str]) -> int | None:
    """Return the multiply-adds of one warp's matrix instructions, or None."""
    # None if names have no shape, as on sm_100.
    # HMMA.16816 is 16 x 8 x 16 by one warp; HGMMA.64x64x16 is 64 x 64 x 16 by four.
    total = 0
    for instruction, count in loop.items():
        if pipe_of(instruction) != "mma":
            continue
        shape = instruction.split(".")[1] if "." in instruction else ""
        if base_name(instruction) == "HGMMA":
            m, n, k = map(int, shape.split("x"))
            total += count * m * n * k // 4
        elif base_name(instruction) == "HMMA":
            total += count * 16 * 8 * int(shape.removeprefix("168"))
        else:
            return None
    return total
