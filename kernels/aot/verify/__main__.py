"""Run the table of cases, or the quick one: `python -m beit_fast.kernels.aot.verify`."""

from __future__ import annotations

import argparse
import concurrent.futures
import functools
import itertools
import multiprocessing
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import triton
from tqdm import tqdm

from ..compile import CAPABILITIES, require_compiler
from .cases import Case
from .check import SCHEDULES, check
from .loops import checked_kernels
from .result_files import FOLDER, Results, Row, checked_sources, read, result_file
from .sources import MODULES, source_hash
from .table import cases_of, is_refused, quick_cases


class Totals(NamedTuple):
    """What rows of results add up to."""

    launches: int = 0
    wrong: int = 0
    hazards: int = 0

    def __add__(self, other: object) -> Totals:
        assert isinstance(other, Totals)
        return Totals(*(one + two for one, two in zip(self, other, strict=True)))

    def __str__(self) -> str:
        return f"{self.launches} launches, {self.wrong} wrong, {self.hazards} hazards"


def totals(row: Row) -> Totals:
    return Totals(row["launches"], len(row["wrong"]), sum(sum(counts.values()) for counts in row["hazards"].values()))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return 0 if nothing is missing, and nothing wrong that is not refused."""
    options = _parse(argv)
    require_compiler()
    if options.quick:
        return _run_quick(options)
    if options.summary is None:
        _run_table(options)
    return _summarize(options.summary or [triton.__version__], options)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m beit_fast.kernels.aot.verify", description=__doc__)
    parser.add_argument("capabilities", nargs="*", type=int, default=list(CAPABILITIES), help="such as 80 90")
    parser.add_argument("--jobs", type=int, default=1, help="number of processes")
    parser.add_argument("--quick", action="store_true", help="one case of each kernel and layout; writes nothing")
    parser.add_argument("--summary", nargs="+", metavar="TRITON", help="run nothing; add up results of these releases")
    parser.add_argument("--results", type=Path, default=FOLDER, help="folder of results")
    parser.add_argument("--only", default="", help="run the cases whose name contains this text")
    return parser.parse_args(argv)


def _run_table(options: argparse.Namespace) -> None:
    """Run the cases without a current result, and write each as it ends."""
    version = triton.__version__
    tables = {capability: cases_of(capability, version) for capability in options.capabilities}
    results = {capability: Results(version, capability, cases, options.results) for capability, cases in tables.items()}
    # Architectures take turns, so that an interrupted run has seen something of each.
    in_turns = [case for cases in itertools.zip_longest(*tables.values()) for case in cases if case is not None]
    missing = [
        case for case in in_turns if options.only in str(case) and results[case.capability].current(case) is None
    ]
    capability_of = {str(case): case.capability for case in missing}
    for row in tqdm(_checked(missing, len(SCHEDULES), options.jobs), f"Triton {version}", len(missing)):
        results[capability_of[row["case"]]].add(row)


def _run_quick(options: argparse.Namespace) -> int:
    cases = [case for capability in options.capabilities for case in quick_cases(capability)]
    by_name = {str(case): case for case in cases}
    rows = list(tqdm(_checked(cases, 2, options.jobs), f"Triton {triton.__version__}", len(cases)))
    checked = {
        pair
        for capability in CAPABILITIES
        for pair in checked_sources(read(result_file(triton.__version__, capability, options.results)))
    }
    outdated = [name for name in MODULES if (name, source_hash(name)) not in checked]
    for name in outdated:
        print(f"{name}: the committed results are of another source; run `make verify-compiled`")
    status = _report([(by_name[row["case"]], triton.__version__, row) for row in rows])
    return status or int(bool(outdated))


def _checked(cases: Sequence[Case], orders: int, jobs: int) -> Iterator[Row]:
    """Yield the rows of the cases as they end."""
    run = functools.partial(check, schedules=SCHEDULES[:orders])
    if jobs == 1:
        yield from map(run, cases)
        return
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(jobs, mp_context=context) as pool:
        for future in concurrent.futures.as_completed([pool.submit(run, case) for case in cases]):
            yield future.result()


def _summarize(versions: Sequence[str], options: argparse.Namespace) -> int:
    """Add up the results of some releases of Triton."""
    rows, missing = [], 0
    for version, capability in itertools.product(versions, options.capabilities):
        results = Results(version, capability, cases_of(capability, version), options.results)
        for case in results.cases:
            row = results.current(case)
            missing += row is None
            if row is not None:
                rows.append((case, version, row))
    distinct = {entry for case, _, _ in rows for entry in checked_kernels(case)}
    print(f"{len(distinct)} distinct cases of a kernel whose loop runs twice and ends with a ragged step")
    if missing:
        print(f"{missing} of {missing + len(rows)} cases have not run with the kernels as they are")
    return _report(rows) or int(missing > 0)


def _report(rows: Sequence[tuple[Case, str, Row]]) -> int:
    """Print what is wrong, by pairs of GPU and Triton, and the totals as the last line."""
    served, refused = Totals(), Totals()
    for case, version, row in rows:
        if is_refused(case, version):
            refused += totals(row)
            continue
        served += totals(row)
        for text in (*row["wrong"], *row["hazards"]):
            print(f"Triton {version}, {case}: {text}")
    if refused.launches:
        print(f"refused pairs, recorded only: {refused}")
    print(served)
    return int(served.wrong + served.hazards > 0)


if __name__ == "__main__":
    sys.exit(main())
