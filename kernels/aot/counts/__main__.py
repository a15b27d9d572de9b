"""Count every shipped kernel for every GPU: `python -m beit_fast.kernels.aot.counts`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import triton
from tqdm import tqdm

from ..compile import CAPABILITIES, capabilities_error, require_compiler
from .fp32 import Fp32Row, fp32_rows
from .measure import LaunchRow, LoopRow, measure
from .table import markdown, to_json

RESULTS = Path(__file__).resolve().parent / "results"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return 0."""
    parser = argparse.ArgumentParser(prog="python -m beit_fast.kernels.aot.counts", description=__doc__)
    parser.add_argument("capabilities", nargs="*", type=int, default=list(CAPABILITIES), help="such as 80 90")
    parser.add_argument("--commit", default="unknown", help="recorded with the results")
    parser.add_argument("--results", type=Path, help="folder to write counts.md and counts.json to; here by default")
    options = parser.parse_args(argv)
    if error := capabilities_error(options.capabilities):
        parser.error(error)
    folder = options.results or RESULTS
    if options.results is None and set(options.capabilities) != set(CAPABILITIES):
        parser.error("counts of some compute capabilities do not replace those of all: give --results FOLDER")
    try:
        require_compiler()
        folder.mkdir(parents=True, exist_ok=True)
    except (RuntimeError, OSError) as problem:
        parser.error(str(problem))
    torch.manual_seed(0)
    loops: list[LoopRow] = []
    launches: list[LaunchRow] = []
    fp32: list[Fp32Row] = []
    for capability in tqdm(options.capabilities, desc="counting", disable=not sys.stderr.isatty()):
        more_loops, more_launches = measure(capability)
        loops += more_loops
        launches += more_launches
        fp32 += fp32_rows(capability)
    loops.sort(key=lambda row: row.kernel)
    launches.sort(key=lambda row: row.kernel)
    fp32.sort(key=lambda row: row.kernel)
    page = markdown(loops, launches, fp32, triton.__version__, options.commit)
    (folder / "counts.md").write_text(page)
    (folder / "counts.json").write_text(to_json(loops, launches, fp32, triton.__version__, options.commit))
    print(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
