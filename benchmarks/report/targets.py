"""Compare results with the targets: `python -m benchmarks.report.targets results.json`.

Reads a results file, a log of rows or the JSON of pytest-benchmark. A ratio is theirs over ours: 2 is twice as fast.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..harness.results import ATTENTION, Row, read_results
from .target_list import TARGETS, Target


@dataclass(frozen=True)
class Verdict:
    """One target at one case.

    Attributes:
        target: The target.
        case: Name of the case.
        ours: Our quantity.
        theirs: The smallest quantity of the baselines.
        baseline: The baseline that it belongs to.
        missing: Why there is nothing to compare with.
        waited: Whether the device waited for the host in one of the two, so that the ratio includes host time.
    """

    target: Target
    case: str
    ours: float | None = None
    theirs: float | None = None
    baseline: str = ""
    missing: str = ""
    waited: bool = False

    @property
    def ratio(self) -> float | None:
        return self.theirs / self.ours if self.ours and self.theirs else None

    @property
    def met(self) -> bool | None:
        """Whether the ratio reaches the target; None if it cannot be judged."""
        return None if self.ratio is None else self.ratio >= self.target.needed


def judge(results: dict[str, Any]) -> list[Verdict]:
    """Judge every target of the device and of the benchmarks that ran.

    A target is judged at all of its cases. A target without a measurement of ours gets a verdict with `missing`.
    """
    verdicts = []
    benches = {entry.get("bench", ATTENTION) for entry in [*results["rows"], *results.get("left_out", [])]}
    for target in TARGETS:
        if target.device != results["conditions"]["device"] or target.bench not in benches:
            continue
        of_bench = [row for row in results["rows"] if row.get("bench", ATTENTION) == target.bench]
        rows = [row for row in of_bench if row["mode"] == target.mode]
        ours = [row for row in rows if row["baseline"] == target.ours and target.where(row)]
        ours.sort(key=lambda row: (row["dtype"], row["batch"] == 1, row["tokens"], row.get("threads", 0)))
        verdicts += [_verdict(target, row, rows, results) for row in _comparable(target, ours, rows)]
        if not ours:
            verdicts.append(Verdict(target, "-", missing=f"{target.ours} was not measured"))
    return verdicts


def _comparable(target: Target, ours: list[Row], rows: list[Row]) -> list[Row]:
    """Drop our rows whose group has no baseline to compare with. At least one row per case is kept."""
    kept = []
    for row in ours:
        groups = [
            one for one in ours if one.get("case") == row.get("case") and one.get("threads") == row.get("threads")
        ]
        compared = [
            one for one in groups if any(_case(other) == _case(one) and target.is_baseline(other) for other in rows)
        ]
        if "group" not in row or row in (compared or groups[:1]):
            kept.append(row)
    return kept


def _verdict(target: Target, ours: Row, rows: list[Row], results: dict[str, Any]) -> Verdict:
    case = _case(ours)
    value = ours[target.quantity]
    if value is None:
        return Verdict(target, case, missing="not measured on this device")
    theirs = [row for row in rows if _case(row) == case and target.is_baseline(row) and row[target.quantity]]
    if not theirs:
        return Verdict(target, case, value, missing=_reason(target, ours, results))
    best = min(theirs, key=lambda row: row[target.quantity])
    waited = target.quantity == "median" and any(row.get("queued_ahead") is False for row in (ours, best))
    return Verdict(target, case, value, best[target.quantity], best["baseline"], waited=waited)


def _case(row: Row) -> str:
    threads = f", threads {row['threads']}" if "threads" in row else ""
    group = f", group {row['group']}" if "group" in row else ""
    model = f"{row['model']} " if "model" in row else ""
    return f"{model}{row['batch']}x{row['tokens']} {row['dtype']}{threads}{group}"


def _reason(target: Target, ours: Row, results: dict[str, Any]) -> str:
    name = ours["case"] if "bench" in ours else f"{ours['mode']}-{ours['batch']}x{ours['tokens']}-{ours['dtype']}"
    for entry in results.get("left_out", []):
        if entry["baseline"] == target.baseline and name in entry["cases"]:
            return f"{target.baseline}: {entry['reason']}"
    return f"{target.baseline or 'no baseline'} was not measured"


def table(verdicts: list[Verdict]) -> str:
    """Format the verdicts by target, with the number of those met."""
    lines = []
    for text in dict.fromkeys(verdict.target.text for verdict in verdicts):
        group = [verdict for verdict in verdicts if verdict.target.text == text]
        judged = [verdict for verdict in group if verdict.met is not None]
        met = sum(bool(verdict.met) for verdict in judged)
        state = f"met at {met} of {len(judged)}" if judged else "not judged"
        lines += ["", f"{text}: {state} (ratio needed {group[0].target.needed:.2f})"]
        width = 2 + max(12, *(len(verdict.case) for verdict in group))
        lines += [_line(verdict, width) for verdict in group]
    return "\n".join(lines[1:])


def _line(verdict: Verdict, width: int) -> str:
    if verdict.ratio is None or verdict.ours is None or verdict.theirs is None:
        return f"  {verdict.case:{width}}not compared: {verdict.missing}"
    quantity, needed = verdict.target.quantity, verdict.target.needed
    result = "met" if verdict.met else f"MISSED, {100 * (1 - verdict.ratio / needed):.1f} % less is needed"
    ours, theirs = _amount(verdict.ours, quantity), _amount(verdict.theirs, quantity)
    baseline = verdict.baseline + (", the device waited for the host" if verdict.waited else "")
    return (
        f"  {verdict.case:{width}}{ours:>11} against {theirs:>11}  ratio {verdict.ratio:5.2f}  {result}  ({baseline})"
    )


def _amount(value: float, quantity: str) -> str:
    return f"{value * 1e3:.4g} ms" if quantity == "median" else f"{value / 2**20:.4g} MiB"


def main(arguments: list[str] | None = None) -> int:
    """Print the table; return 0, or 2 if the file cannot be read."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report.targets", description="Compare results with the targets."
    )
    parser.add_argument("results", type=Path, help="a results file, a .jsonl of `--rows`, or pytest-benchmark's JSON")
    options = parser.parse_args(arguments)
    try:
        results = read_results(options.results)
        verdicts = judge(results)
    except (OSError, ValueError, KeyError) as error:
        reason = f"{options.results}: its rows do not have {error}" if isinstance(error, KeyError) else str(error)
        print(f"targets.py: {reason}", file=sys.stderr)
        return 2
    conditions = results["conditions"]
    print(f"{conditions['device_name']}, torch {conditions['torch']}, commit {conditions['commit'] or 'unknown'}")
    print(table(verdicts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
