"""Control codes of machine code, and the cycles of a loop that follow from them."""

from __future__ import annotations

from collections import Counter

import pytest

pytest.importorskip("triton", reason="needs Triton")

from beit_fast.kernels.aot import sass
from beit_fast.kernels.aot.counts import schedule
from beit_fast.kernels.aot.counts.schedule import NO_SCOREBOARD, LoopCycles, Scheduled

DISASSEMBLY = """
.L_x_7:
        /*0180*/                   MUFU.RCP R0, R0 ;                                    /* 0x0000000000007308 */
                                                                                        /* 0x008ef00000001000 */
        /*0190*/              @!P0 I2F.RP R3, UR17 ;                                    /* 0x0000001100037d06 */
                                                                                        /* 0x020f620008209400 */
.L_x_8:
        /*01a0*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;                /* 0x0ffffffe00027810 */
                                                                                        /* 0x008fc40007ffe0ff */
        /*01b0*/               @P1 BRA `(.L_x_8) ;                                      /* 0x0000000500007213 */
                                                                                        /* 0x002fca0000000000 */
        /*01c0*/                   BRA `(.L_x_7) ;                                      /* 0x0000000500007213 */
                                                                                        /* 0x000fca0000000000 */
"""


def one(
    name: str, operands: str = "", stall: int = 1, write: int = NO_SCOREBOARD, read: int = NO_SCOREBOARD, wait: str = ""
) -> Scheduled:
    """Make an instruction; `wait` has the digits of the scoreboards."""
    return Scheduled(name, operands, stall, write, read, tuple(map(int, wait)))


def cycles(*body: Scheduled) -> LoopCycles:
    return schedule.loop_cycles(body, wgmma_cycles=32)


def test_parse_decodes_stalls_and_scoreboards() -> None:
    code = sass.parse(DISASSEMBLY)
    instructions, loops = [schedule.scheduled(line) for line in code], sass.loops(code)
    assert instructions[0] == Scheduled("MUFU.RCP", "R0, R0", 8, 3, 7, (3,))
    assert instructions[1] == Scheduled("I2F.RP", "R3, UR17", 1, 5, 7, (5,))
    assert [instruction.name for instruction in instructions] == [
        "MUFU.RCP", "I2F.RP", "HMMA.16816.F32.BF16", "BRA", "BRA",
    ]  # fmt: skip
    assert loops == [(2, 3), (0, 4)]


def test_main_loop_returns_innermost_with_products() -> None:
    assert [instruction.name for instruction in schedule.main_loop(DISASSEMBLY)] == ["HMMA.16816.F32.BF16", "BRA"]
    assert schedule.main_loop(DISASSEMBLY.replace("HMMA", "FMUL")) == []


def test_loop_cycles_adds_stalls_of_at_least_one() -> None:
    found = cycles(one("FADD", stall=4), one("FMUL", stall=0), one("BAR.SYNC", stall=5))
    assert found == LoopCycles(stalls=10, waits=Counter(), barriers=1)
    assert found.total == 10


def test_loop_cycles_waits_for_a_result() -> None:
    found = cycles(one("MUFU.EX2", stall=2, write=1), one("FADD", wait="1"))
    assert found.waits == {"MUFU": schedule.LATENCIES["MUFU"] - 2}
    assert found.total == schedule.LATENCIES["MUFU"] + 1


def test_loop_cycles_waits_until_operands_are_read() -> None:
    found = cycles(one("STG.E", read=2), one("FADD", wait="2"))
    assert found.waits == {"operands of STG": schedule.OTHER_LATENCY - 1}


@pytest.mark.parametrize(("groups", "waits"), [(0, True), (1, False)])
def test_loop_cycles_waits_for_copies_of_the_group(groups: int, waits: bool) -> None:
    """Two stages wait for the copies of the last iteration; three for those of the iteration before it."""
    copies = [one("LDGSTS.E.BYPASS.128", "[R1], [R2.64]"), one("LDGDEPBAR", write=0)]
    work = [one("FADD", stall=15)] * 10
    found = cycles(one("DEPBAR.LE", f"SB0, 0x{groups}"), *work, *copies)
    # The copies are issued one cycle before the scoreboard is set, and the loop goes on one cycle later.
    expected = {"LDGSTS": schedule.LATENCIES["LDGSTS"] - 2} if waits else {}
    assert found.waits == expected


def test_loop_cycles_waits_for_products_of_the_tensor_cores() -> None:
    products = [
        one("HGMMA.64x64x16.F32.BF16", "R24, gdesc[UR8], R24"),
        one("HGMMA.64x64x16.F32.BF16", "R24, R24, gsb0"),
    ]
    found = cycles(*products, one("WARPGROUP.DEPBAR.LE", "gsb0, 0x0"))
    assert found.waits == {"HGMMA": 2 * 32 + schedule.PRODUCT_LATENCY - 2}
