"""The tables, and the committed results."""

from __future__ import annotations

import itertools
import json
import os
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="needs Triton")
if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
    pytest.skip("the Triton interpreter and compiler cannot share a process", allow_module_level=True)

from beit_fast.kernels.aot.attention_variants import PRODUCTS
from beit_fast.kernels.aot.compile import CAPABILITIES
from beit_fast.kernels.aot.counts import __main__ as command
from beit_fast.kernels.aot.counts import measure, table
from beit_fast.kernels.aot.counts.executed import Conflict, LaunchCounts, LoopCounts
from beit_fast.kernels.aot.counts.fp32 import PRECISIONS, Fp32Row
from beit_fast.kernels.aot.counts.measure import LaunchRow, LoopRow, MachineCounts
from beit_fast.kernels.aot.counts.schedule import LoopCycles
from beit_fast.kernels.attention import configs
from beit_fast.kernels.common import gpu

EXECUTED = LoopCounts(
    {"matrix": 64.0}, 500.0, 400.0, [Conflict("st.shared.b32", "a.py:1:1 @[ b.py:2:2 ]", 100.0)], 64.0, 60.0, 2.0, 1.0
)
MACHINE = MachineCounts(128, 2048, 2, LoopCycles(700, Counter({"MUFU": 100}), 2), {"issue": 300.0, "lsu": 450.0}, 1.0)
ROW = LoopRow("forward", 80, (64, 64, 4, 2), EXECUTED, MACHINE)


@pytest.mark.parametrize(("programs", "cycles"), [(1, 800), (2, 450)])
def test_bound_is_the_larger_of_one_warp_and_busiest_pipe(programs: int, cycles: int) -> None:
    assert MACHINE.bound(programs) == cycles


def test_bound_of_a_larger_tile_is_per_unit() -> None:
    assert MACHINE._replace(tiles=4.0, pipes={"issue": 10.0}).bound(1) == 200


@pytest.mark.parametrize(
    ("capability", "registers", "shared", "warps", "programs"),
    [(80, 210, 24576, 4, 2), (80, 255, 24576, 4, 2), (80, 32, 81920, 4, 2), (86, 32, 65536, 4, 1), (86, 32, 0, 8, 6)],
)
def test_programs_per_sm(capability: int, registers: int, shared: int, warps: int, programs: int) -> None:
    """Registers, shared memory or warps decide."""
    assert measure.programs_per_sm(capability, registers, shared, warps) == programs


def test_markdown_has_every_table() -> None:
    page = table.markdown(
        [ROW],
        [LaunchRow("pack_bias", 80, LaunchCounts(9, 4, 90, 60, [Conflict("ld.shared", "c.py:3:3", 5.0)]))],
        [Fp32Row("forward", 90, "ieee", LaunchCounts(50, 20, 90, 60, []), 80)],
        "3.7.1",
        "abc",
    )
    assert "with Triton 3.7.1" in page
    assert "| forward | 80 | 64x64 4w 2s | 64 | 64 |" in page
    assert "| forward | 80 | st.shared.b32 | b.py:2 | 100 |" in page
    assert "| 700 | 100 | MUFU 100 | lsu 450 | 800 | 450 |" in page
    assert "| pack_bias | 80 | 9 | 4 | 90 | 60 | 1.50 |" in page
    assert "| pack_bias | 80 | ld.shared | c.py:3 | 5 |" in page
    assert "| forward | 90 | ieee | 50 | 20 | 40 |" in page


def test_conflicts_of_none_says_so() -> None:
    assert table.conflicts([ROW._replace(executed=EXECUTED._replace(conflicts=[]))]) == "None.\n"


def test_main_unknown_capability_exits(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["70"])
    assert "compute capabilities [70] are not supported (expected 80," in capsys.readouterr().err


def test_main_of_some_capabilities_does_not_replace_the_committed_counts(capsys: pytest.CaptureFixture[str]) -> None:
    before = (command.RESULTS / "counts.json").read_text()
    with pytest.raises(SystemExit):
        command.main(["80"])
    assert "give --results FOLDER" in capsys.readouterr().err
    assert (command.RESULTS / "counts.json").read_text() == before


def test_main_writes_both_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "measure", lambda capability: ([ROW._replace(capability=capability)], []))
    fp32 = Fp32Row("forward", 80, "ieee", LaunchCounts(50, 20, 90, 60, []), 80)
    monkeypatch.setattr(command, "fp32_rows", lambda capability: [fp32._replace(capability=capability)])
    assert command.main(["90", "80", "--results", str(tmp_path), "--commit", "abc"]) == 0
    found = json.loads((tmp_path / "counts.json").read_text())
    assert [row["capability"] for row in found["loops"]] == [90, 80]
    assert found["loops"][0]["machine"]["bounds"] == {"1": 800, "2": 450}
    assert [(row["capability"], row["multiply_adds"]) for row in found["fp32 launches"]] == [(90, 80), (80, 80)]
    assert "abc" in (tmp_path / "counts.md").read_text()


def test_committed_counts_have_the_shipped_tiles() -> None:
    """Run `make count-kernels` after a change of tiles."""
    rows = json.loads((command.RESULTS / "counts.json").read_text())["loops"]
    found = {(row["kernel"], row["capability"]): row["tile"] for row in rows if row["kernel"] in PRODUCTS}
    assert found == {
        (kernel, capability): list(
            configs.select(kernel, gpu.architecture_class(*divmod(capability, 10)), measure.HEAD_DIM, "half", False)
        )
        for kernel in PRODUCTS
        for capability in CAPABILITIES
    }


def test_committed_counts_have_fp32_in_both_precisions() -> None:
    rows = json.loads((command.RESULTS / "counts.json").read_text())["fp32 launches"]
    found = {(row["kernel"], row["capability"], row["precision"]) for row in rows}
    assert found == set(itertools.product((*PRODUCTS, "linear_gelu"), CAPABILITIES, PRECISIONS))
