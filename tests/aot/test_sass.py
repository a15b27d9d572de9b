"""The readers of SASS and TTGIR: main loops, instruction costs, vector-load layouts."""

from __future__ import annotations

import os
from collections import Counter

import pytest

pytest.importorskip("triton", reason="needs the disassembler and compiler of Triton")
if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
    pytest.skip("the Triton interpreter and compiler cannot share a process", allow_module_level=True)

from beit_fast.kernels.aot import sass, ttgir_layouts

TWO_NESTED_LOOPS_AND_A_WAIT = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;
.L_x_0:
        /*0020*/                   HMMA.16816.F32.BF16 R8, R4, R6, R8 ;
        /*0030*/              @!P0 MUFU.EX2 R8, R8 ;
        /*0040*/               @P1 BRA `(.L_x_0) ;
        /*0050*/                   HMMA.16816.F32.BF16 R8, R4, R6, R8 ;
        /*0060*/              @UP0 UIADD3 UR4, UR4, 0x1, URZ ;
        /*0070*/                   BRA `(.L_x_1) ;
        /*0080*/                   BRA `(.L_x_2) ;
.L_x_2:
        /*0090*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR5], R2 ;
        /*00a0*/              @!P0 BRA `(.L_x_1) ;
        /*00b0*/                   EXIT ;
"""

PLAIN_LOOPS = """
.L_x_0:
        /*0000*/                   FADD R0, R0, R1 ;
        /*0010*/               @P0 BRA `(.L_x_0) ;
.L_x_1:
        /*0020*/                   LDS.64 R2, [R1] ;
.L_x_2:
        /*0030*/                   FFMA R0, R1, R2, R0 ;
        /*0040*/                   FFMA R0, R1, R3, R0 ;
        /*0050*/               @P0 BRA `(.L_x_2) ;
        /*0060*/               @P1 BRA `(.L_x_1) ;
"""


def test_main_loop_is_first_loop_with_matrix_instruction() -> None:
    """Ignore the outer loop, the branch of a trailing wait, and forward branches."""
    loop = sass.main_loop(TWO_NESTED_LOOPS_AND_A_WAIT)
    assert loop == {"HMMA.16816.F32.BF16": 1, "MUFU.EX2": 1, "BRA": 1}


def test_main_loop_without_tensor_cores_has_most_multiply_adds() -> None:
    assert sass.main_loop(PLAIN_LOOPS) == {"FFMA": 2, "BRA": 1}


def test_main_loop_code_without_loop_is_empty() -> None:
    assert sass.main_loop("        /*0000*/                   EXIT ;\n") == {}
    assert sass.main_loop("") == {}


@pytest.mark.parametrize(
    ("instruction", "pipe"),
    [
        ("HGMMA.64x64x16.F32.BF16", "mma"),
        ("UTCHMMA", "mma"),
        ("MUFU.EX2", "xu"),
        ("LDGSTS.E.BYPASS.128", "lsu"),
        ("SHFL.BFLY", "lsu"),
        ("IMAD.MOV.U32", "fma"),
        ("FMNMX", "alu"),
        ("F2FP.BF16.F32.PACK_AB", "alu"),
        ("UIADD3.X", "uniform"),
        ("LDCU.64", "uniform"),
        ("UTCBAR", "other"),
        ("BRA", "other"),
    ],
)
def test_pipe_of_known_instruction_returns_pipe(instruction: str, pipe: str) -> None:
    assert sass.pipe_of(instruction) == pipe
    assert sass.is_known(instruction)


def test_pipe_of_unknown_instruction_returns_other() -> None:
    assert sass.pipe_of("NEWOP.X") == "other"
    assert not sass.is_known("NEWOP.X")


@pytest.mark.parametrize(
    ("instruction", "words"),
    [
        *(("LDG.E.128.CONSTANT", 4), ("LDG.E.64.CONSTANT", 2), ("LDG.E", 1), ("LDS.U8", 1), ("STS.128", 4)),
        *(("LDSM.16.M88.4", 4), ("LDSM.16.MT88.2", 2), ("LDSM.16.M88", 1), ("LDTM.x64", 1)),
    ],
)
def test_access_words_returns_words(instruction: str, words: int) -> None:
    assert sass.access_words(instruction) == words


def test_multiply_adds_matrix_instructions() -> None:
    """Four warps share an HGMMA; a UTCHMMA has its shape in a descriptor."""
    assert sass.multiply_adds(Counter({"HMMA.16816.F32": 2, "HMMA.1688.F32.TF32": 1})) == 2 * 2048 + 1024
    assert sass.multiply_adds(Counter({"HGMMA.64x64x16.F32.BF16": 1, "BRA": 1})) == 64 * 64 * 16 // 4
    assert sass.multiply_adds(Counter({"UTCHMMA": 4})) is None


def test_cycles_by_pipe_of_tile() -> None:
    """Cycles are per scheduler: 4 warps on 64 x 64 equal 8 warps on 128 x 64."""
    loop = Counter({"HGMMA.64x64x16.F32.BF16": 8, "MUFU.EX2": 32, "FFMA": 40, "LDG.E.128.CONSTANT": 8, "FMNMX": 30})
    products = 2 * 64 * 64 * 64
    work = sass.Work(90, 4, 64 * 64, products, False)
    by_pipe = sass.instructions_by_pipe(loop, work)
    assert by_pipe == {"mma": 8, "xu": 32, "lsu": 8, "alu": 30, "fma": 40, "uniform": 0, "other": 0}
    cycles = sass.cycles_by_pipe(loop, work)
    assert cycles == {"issue": 118, "mma": 256, "xu": 256, "lsu": 128, "alu": 60, "fma": 40}
    assert sass.bound(cycles) == "mma"
    larger = sass.Work(90, 8, 128 * 64, 2 * products, False)
    assert sass.cycles_by_pipe(loop, larger) == cycles
    fewer_warps = sass.Work(90, 4, 128 * 64, 2 * products, False)
    assert sass.cycles_by_pipe(loop, fewer_warps)["issue"] == 59


def test_cycles_by_pipe_without_shapes_and_in_tf32() -> None:
    products = 2 * 64 * 64 * 64
    work = sass.Work(100, 4, 64 * 64, products, False)
    assert sass.cycles_by_pipe(Counter({"UTCHMMA": 8}), work)["mma"] == 128
    half_rate = work._replace(tf32=True)
    assert sass.cycles_by_pipe(Counter({"UTCHMMA": 8}), half_rate)["mma"] == 256
    assert sass.cycles_by_pipe(Counter({"FFMA": 8}), work)["mma"] == 0


MODULE = """
#layout = {layout}
module attributes {{"ttg.num-ctas" = 1 : i32, "ttg.num-warps" = 4 : i32, ttg.target = "cuda:90",
                    "ttg.threads-per-warp" = 32 : i32}} {{
  tt.func public @kernel(%addresses: tensor<{shape}x!tt.ptr<f32>, #layout>,
                         %out: tensor<{shape}x!tt.ptr<f32>, #layout>) {{
    %dead = tt.elementwise_inline_asm "ld.global.nc.v8.f32 ..." {{constraints = "=f,l", packed_element = 1 : i32,
      pure = false}} %addresses : tensor<{shape}x!tt.ptr<f32>, #layout> -> tensor<{shape}xf32, #layout>
    %bias = tt.elementwise_inline_asm "ld.global.nc{width}.f32 ..." {{constraints = "=f,l", packed_element = 1 : i32,
      pure = true}} %addresses : tensor<{shape}x!tt.ptr<f32>, #layout> -> tensor<{shape}xf32, #layout>
    tt.store %out, %bias : tensor<{shape}x!tt.ptr<f32>, #layout>
    tt.return
  }}
}}
"""
MMA_2 = "#ttg.nvidia_mma<{versionMajor = 2, versionMinor = 0, warpsPerCTA = [4, 1], instrShape = [16, 8]}>"
MMA_3 = "#ttg.nvidia_mma<{versionMajor = 3, versionMinor = 0, warpsPerCTA = [4, 1], instrShape = [16, 64, 16]}>"


def blocked(rows: int, columns: int) -> str:
    return (
        f"#ttg.blocked<{{sizePerThread = [{rows}, {columns}], threadsPerWarp = [4, 8], warpsPerCTA = [4, 1], "
        "order = [1, 0]}>"
    )


def slice_of(layout: str) -> str:
    return f"#ttg.slice<{{dim = 0, parent = {layout}}}>"


@pytest.mark.parametrize(
    ("layout", "width", "is_right"),
    [
        (MMA_2, ".v4", True),
        (MMA_3, ".v4", True),
        (MMA_3, ".v2", True),
        (blocked(1, 1), "", True),
        (blocked(1, 2), ".v2", True),
        (slice_of(MMA_3), ".v2", True),
        (slice_of(blocked(1, 2)), ".v2", True),
        (blocked(1, 1), ".v2", False),
        (blocked(2, 1), ".v2", False),
        (blocked(1, 1), ".v4", False),
        (blocked(1, 4), ".v4", False),
        (blocked(2, 2), ".v4", False),
        (slice_of(blocked(4, 1)), ".v2", False),
        (MMA_3, ".v8", False),
    ],
)
def test_misplaced_vector_loads_against_layout(layout: str, width: str, is_right: bool) -> None:
    """Ignore unused loads: the first load of the module, which no layout fits."""
    shape = "64" if "slice" in layout else "64x64"
    (load,) = ttgir_layouts.bias_loads(MODULE.format(layout=layout, width=width, shape=shape), 90)
    assert load.vector == int(width.removeprefix(".v") or 1)
    assert (ttgir_layouts.misplaced(load) is None) is is_right
