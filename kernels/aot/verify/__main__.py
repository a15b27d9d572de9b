"""Run the table of cases, or the quick one: `python -m beit_fast.kernels.aot.verify`."""

from __future__ import annotations

import argparse
import concurrent.futures
import functools
import itertools
import multiprocessing
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import triton
from tqdm import tqdm

from ..compile import CAPABILITIES, capabilities_error, require_compiler
from ..nvcc import MISSING, nvcc_version
from .cases import Case, PatchCase
from .check import SCHEDULES, check
from .loops import checked_kernels
from .patch_table import patch_cases
from .result_files import FOLDER, Results, read, result_file
from .rows import Row, checked_sources
from .sources import MODULES, source_hash
from .table import cases_of, is_refused, quick_cases, table


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
    parser = _parser()
    options = parser.parse_args(argv)
    options.capabilities = list(dict.fromkeys(options.capabilities))
    options.summary = list(dict.fromkeys(options.summary or []))
    if error := _options_error(options):
        parser.error(error)
    try:
        require_compiler()
        if options.quick:
            return _run_quick(options)
        if not options.summary:
            _run_table(options)
        return _summarize(options.summary or [triton.__version__], options)
    except (ValueError, RuntimeError) as problem:  # a damaged file, or Triton's interpreter
        parser.error(str(problem))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m beit_fast.kernels.aot.verify", description=__doc__)
    parser.add_argument("capabilities", nargs="*", type=int, default=list(CAPABILITIES), help="such as 80 90")
    parser.add_argument("--jobs", type=int, default=1, help="number of processes")
    parser.add_argument("--quick", action="store_true", help="one case of each kernel and layout; writes nothing")
    parser.add_argument("--summary", nargs="+", metavar="TRITON", help="run nothing; add up results of these releases")
    parser.add_argument("--results", type=Path, default=FOLDER, help="folder of results")
    parser.add_argument("--only", default="", help="run and add up the cases whose name contains this text")
    return parser


def _options_error(options: argparse.Namespace) -> str | None:
    """Return what is wrong with the options, None if nothing is."""
    if error := capabilities_error(options.capabilities):
        return error
    if no_releases := [text for text in options.summary if not re.fullmatch(r"\d+\.\d+\.\d+", text)]:
        return (
            f"--summary takes releases of Triton, such as 3.9.0, and not {', '.join(no_releases)}; "
            "compute capabilities stand before it"
        )
    if options.jobs < 1:
        return f"--jobs is {options.jobs} (expected 1 or more)"
    if options.quick and (options.only or options.summary):
        return "--quick runs its own cases: --only and --summary do not go with it"
    names = [
        str(case) for capability in options.capabilities for case in [*table(capability), *patch_cases(capability)]
    ]
    if not any(options.only in name for name in names):
        return f"no case contains {options.only!r}; the first one is {names[0]!r}"
    return None


def _run_table(options: argparse.Namespace) -> None:
    """Run the cases without a current result. Each result is written as its case ends."""
    version, nvcc = triton.__version__, nvcc_version()
    files = [
        Results(version, capability, cases_of(capability, version), options.results)
        for capability in options.capabilities
    ]
    if nvcc is not None:
        files += [_nvcc_results(nvcc, capability, options.results) for capability in options.capabilities]
    elif any(patch_cases(capability) for capability in options.capabilities):
        print(f"{MISSING}: patch_embed does not run")
    file_of = {str(case): file for file in files for case in file.cases}
    # Architectures take turns, so that an interrupted run has seen something of each.
    in_turns = itertools.zip_longest(*(file.cases for file in files))
    cases = [case for together in in_turns for case in together if case is not None and options.only in str(case)]
    missing = [case for case in cases if file_of[str(case)].current(case) is None]
    for row in tqdm(_checked(missing, len(SCHEDULES), options.jobs), f"Triton {version}", len(missing)):
        file_of[row["case"]].add(row)


def _nvcc_results(version: str, capability: int, folder: Path) -> Results:
    return Results(f"nvcc-{version}", capability, patch_cases(capability), folder)


def _nvcc_versions(folder: Path) -> list[str]:
    """Return the versions of nvcc with results, and the installed one."""
    found = {path.name.removeprefix("nvcc-") for path in folder.glob("nvcc-*")} | {nvcc_version() or ""}
    return sorted(found - {""})


def _run_quick(options: argparse.Namespace) -> int:
    cases = [case for capability in options.capabilities for case in quick_cases(capability)]
    if nvcc_version() is not None:
        cases += [case for capability in options.capabilities for case in patch_cases(capability)[:1]]
    elif any(patch_cases(capability) for capability in options.capabilities):
        print(f"{MISSING}: patch_embed does not run")
    by_name = {str(case): case for case in cases}
    rows = list(tqdm(_checked(cases, 2, options.jobs), f"Triton {triton.__version__}", len(cases)))
    compilers = [triton.__version__, *(f"nvcc-{version}" for version in _nvcc_versions(options.results))]
    checked = {
        pair
        for compiler, capability in itertools.product(compilers, CAPABILITIES)
        for pair in checked_sources(read(result_file(compiler, capability, options.results)))
    }
    outdated = [
        f"{name}: results are of another source" for name in MODULES if (name, source_hash(name)) not in checked
    ]
    for capability in options.capabilities:
        results = Results(triton.__version__, capability, quick_cases(capability), options.results)
        stale = [case for case in results.cases if results.current(case) is None]
        outdated += [f"{case}: no result is of its launches as they are" for case in stale]
    for text in outdated:
        print(f"{text}; run `make verify-compiled`, and commit what it writes")
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
    """Add up the results of some Triton releases and of nvcc."""
    rows: list[tuple[Case, str, Row]] = []
    missing = 0
    for version, capability in itertools.product(versions, options.capabilities):
        results = Results(version, capability, cases_of(capability, version), options.results)
        selected = [case for case in results.cases if options.only in str(case)]
        current = [(case, version, row) for case in selected if (row := results.current(case)) is not None]
        missing += len(selected) - len(current)
        rows += current
    not_compiled = 0
    for capability in options.capabilities:
        by_nvcc = [_nvcc_results(nvcc, capability, options.results) for nvcc in _nvcc_versions(options.results)]
        for case in [case for case in patch_cases(capability) if options.only in str(case)]:
            found = [(case, file.triton_version, row) for file in by_nvcc if (row := file.current(case)) is not None]
            not_compiled += not found
            rows += found
    missing += not_compiled
    served = [case for case, version, row in rows if not (row["wrong"] or is_refused(case, version))]
    distinct = {entry for case in served for entry in checked_kernels(case)}
    print(f"{len(distinct)} distinct cases of a kernel whose loop runs twice and ends with a ragged step")
    if missing:
        print(f"{missing} of {missing + len(rows)} cases have not run with the kernels as they are")
    if not_compiled and nvcc_version() is None:
        print(f"{not_compiled} of them are cases of patch_embed: {MISSING}")
    return _report(rows) or int(missing > 0)


def _report(rows: Sequence[tuple[Case, str, Row]]) -> int:
    """Print what is wrong, by pairs of GPU and Triton. The totals are the last line."""
    served, refused = Totals(), Totals()
    for case, version, row in rows:
        if is_refused(case, version):
            refused += totals(row)
            continue
        served += totals(row)
        first = [f"the first one: {row['first hazard']}"] if row.get("first hazard") else []
        for text in (*row["wrong"], *row["hazards"], *first):
            compiler = version.replace("-", " ") if isinstance(case, PatchCase) else f"Triton {version}"
            print(f"{compiler}, {case}: {text}")
    if refused.launches:
        print(f"refused pairs, recorded only: {refused}")
    print(served)
    return int(served.wrong + served.hazards > 0)


if __name__ == "__main__":
    sys.exit(main())
