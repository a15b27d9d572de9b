"""The counts as Markdown and as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from .. import sass
from .fp32 import Fp32Row
from .measure import LaunchRow, LoopRow

EXECUTED_COLUMNS = (
    "kernel", "sm", "tile", "PTX issued", "matrix", "load/store", "special", "float", "integer", "conversion",
    "control", "sync", "shared wavefronts", "ideal", "sectors", "ideal", "KiB from L2", "barriers", "waits",
)  # fmt: skip
PIPES = (
    "matrix", "load/store", "special function", "float", "integer", "conversion", "control", "synchronization",
)  # fmt: skip
MACHINE_COLUMNS = (
    "kernel", "sm", "tile", "registers", "shared KiB", "programs", "stalls", "waits", "waits for", "busiest pipe",
    "bound, 1 program", "bound, 2 programs",
)  # fmt: skip
FP32_COLUMNS = ("kernel", "sm", "precision", "shared wavefronts", "ideal", "cycles of multiply-adds")
LAUNCH_COLUMNS = ("kernel", "sm", "shared wavefronts", "ideal", "sectors", "ideal", "ratio")

HEADER = """# Counted, with Triton {triton}

Written by `make count-kernels` at commit {commit}. docs/counts.md explains the tables. bf16, heads of 64, the bias of a
window of even width. Main loops are counted for 64 x 64 scores; linear_gelu for 64 x 64 results and one step. Nothing
here was measured on a GPU.
"""


FP32_HEADER = """The same shapes in fp32. Cycles are those of an SM of compute capability 8.0. A wavefront takes one.

"""


def markdown(
    loops: Sequence[LoopRow], launches: Sequence[LaunchRow], fp32: Sequence[Fp32Row], triton: str, commit: str
) -> str:
    """Return the page with all tables."""
    parts = [
        HEADER.format(triton=triton, commit=commit),
        "## Main loops, executed\n\n" + _table(EXECUTED_COLUMNS, map(_executed_cells, loops)),
        "## Bank conflicts of main loops\n\n" + conflicts(loops),
        "## Main loops in machine code\n\n" + _table(MACHINE_COLUMNS, map(_machine_cells, loops)),
        "## Whole launches\n\n" + _table(LAUNCH_COLUMNS, map(_launch_cells, launches)),
        "## Bank conflicts of whole launches\n\n" + conflicts(launches),
        "## Whole launches in fp32\n\n" + FP32_HEADER + _table(FP32_COLUMNS, map(_fp32_cells, fp32)),
    ]
    return "\n".join(parts)


def to_json(
    loops: Sequence[LoopRow], launches: Sequence[LaunchRow], fp32: Sequence[Fp32Row], triton: str, commit: str
) -> str:
    """Return all numbers as JSON."""
    rows = []
    for row in loops:
        machine = row.machine
        bounds = {str(programs): round(machine.bound(programs), 1) for programs in (1, 2)}
        cycles = {"stalls": machine.cycles.stalls, "waits": machine.cycles.waits, "barriers": machine.cycles.barriers}
        rows.append(
            {
                **_names(row),
                "tile": row.tile,
                "executed": _rounded(row.executed._asdict()),
                "machine": _rounded({**machine._asdict(), "cycles": cycles, "bounds": bounds}),
            }
        )
    whole = [_rounded({**_names(row), **row.counts._asdict()}) for row in launches]
    in_fp32 = [
        _rounded(
            {**_names(row), "precision": row.precision, "multiply_adds": row.multiply_adds, **row.counts._asdict()}
        )
        for row in fp32
    ]
    head = f'"triton": {json.dumps(triton)},\n"commit": {json.dumps(commit)}'
    lists = (
        f'"{name}": [\n' + ",\n".join(map(json.dumps, found)) + "\n]"
        for name, found in (("loops", rows), ("launches", whole), ("fp32 launches", in_fp32))
    )
    sources = json.dumps({row.kernel: row.source for row in launches})
    return "{\n" + ",\n".join([head, f'"sources": {sources}', *lists]) + "\n}\n"


def _names(row: LoopRow | LaunchRow | Fp32Row) -> dict[str, Any]:
    return {"kernel": row.kernel, "capability": row.capability}


def _rounded(values: Any) -> Any:
    if isinstance(values, dict):
        return {name: _rounded(value) for name, value in values.items()}
    if isinstance(values, list | tuple):
        return [_rounded(value) for value in values]
    return round(values, 2) if isinstance(values, float) else values


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [list(columns), ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def tile_text(tile: Sequence[int]) -> str:
    """Return a tile as text: "64x64 4w 2s"."""
    *sizes, warps, stages = tile
    return f"{'x'.join(map(str, sizes))} {warps}w {stages}s"


def _executed_cells(row: LoopRow) -> list[str]:
    found = row.executed
    pipes = [found.pipes.get(pipe, 0.0) for pipe in PIPES]
    numbers = [
        sum(found.pipes.values()), *pipes, found.wavefronts, found.ideal_wavefronts, found.sectors, found.ideal_sectors,
    ]  # fmt: skip
    return [
        row.kernel, str(row.capability), tile_text(row.tile), *(f"{number:.0f}" for number in numbers),
        f"{found.l2_bytes / 1024:.1f}", f"{found.barriers:.1f}", f"{found.waits:.1f}",
    ]  # fmt: skip


def _machine_cells(row: LoopRow) -> list[str]:
    machine = row.machine
    busiest = sass.bound(machine.pipes)
    causes = ", ".join(f"{name} {cycles}" for name, cycles in machine.cycles.waits.most_common())
    return [
        row.kernel, str(row.capability), tile_text(row.tile), str(machine.registers), f"{machine.shared / 1024:.0f}",
        str(machine.programs), str(machine.cycles.stalls), str(machine.cycles.waits.total()), causes,
        f"{busiest} {machine.pipes[busiest]:.0f}", f"{machine.bound(1):.0f}", f"{machine.bound(2):.0f}",
    ]  # fmt: skip


def _launch_cells(row: LaunchRow) -> list[str]:
    counts = row.counts
    ratio = counts.sectors / counts.ideal_sectors
    numbers = [counts.wavefronts, counts.ideal_wavefronts, counts.sectors, counts.ideal_sectors]
    return [row.kernel, str(row.capability), *map(str, numbers), f"{ratio:.2f}"]


def _fp32_cells(row: Fp32Row) -> list[str]:
    numbers = [row.counts.wavefronts, row.counts.ideal_wavefronts, row.multiply_add_cycles]
    return [row.kernel, str(row.capability), row.precision, *(f"{number:.0f}" for number in numbers)]


def line_of(source: str) -> str:
    """Return the line of the kernel's file: "b.py:2" of "a.py:1:1 @[ b.py:2:2 ]"."""
    *_, outermost = source.replace("]", " ").split()
    return outermost.rpartition(":")[0]


def conflicts(rows: Sequence[LoopRow | LaunchRow]) -> str:
    """Return the table of the instructions that cause bank conflicts."""
    found = []
    for row in rows:
        counts = row.executed if isinstance(row, LoopRow) else row.counts
        found += [
            [row.kernel, str(row.capability), one.name, line_of(one.source), f"{one.extra:.0f}"]
            for one in counts.conflicts
        ]
    if not found:
        return "None.\n"
    return _table(("kernel", "sm", "instruction", "line", "more wavefronts"), found)
