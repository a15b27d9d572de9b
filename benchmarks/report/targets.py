"""What has to be reached, on a GPU and on a CPU, met or missed: `python -m benchmarks.targets results.json`.

Reads a results file, a log of rows or pytest-benchmark's JSON. A ratio is theirs over ours: 2 is twice as fast.
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
    """One target at one case: ours beside the best of theirs, or `missing` where there is nothing to compare with.

    waited: in one of the two the device waited for the host, so that the ratio is not the devices' alone.
    """

    target: Target
    case: str
    ours: float | None = None
    theirs: float | None = None
    against: str = ""
    missing: str = ""
    waited: bool = False

    @property
    def ratio(self) -> float | None:
        return self.theirs / self.ours if self.ours and self.theirs else None

    @property
    def met(self) -> bool | None:
        """None where it could not be judged."""
        return None if self.ratio is None else self.ratio >= self.target.needed


def judge(results: dict[str, Any]) -> list[Verdict]:
    """Every target of the device and of a bench that ran, at every case that it is asked of.

    One without measurement of ours says so.
    """
    verdicts = []
    benches = {entry.get("bench", ATTENTION) for entry in [*results["rows"], *results.get("left_out", [])]}
    for target in TARGETS:
        if target.device != results["conditions"]["device"] or target.bench not in benches:
            continue
        of_bench = [row for row in results["rows"] if row.get("bench", ATTENTION) == target.bench]
        rows = [row for row in of_bench if row["mode"] == target.mode]
        ours = [row for row in rows if row["peer"] == target.ours and target.where(row)]
        ours.sort(key=lambda row: (row["dtype"], row["batch"] == 1, row["tokens"], row.get("threads", 0)))
        verdicts += [_verdict(target, row, rows, results) for row in _beside_rivals(target, ours, rows)]
        if not ours:
            verdicts.append(Verdict(target, "-", missing=f"{target.ours} was not measured"))
    return verdicts


def _beside_rivals(target: Target, ours: list[Row], rows: list[Row]) -> list[Row]:
    """Ours, but of a case that was raced in heats those of heats with a rival only, or the first where none has one."""
    kept = []
    for row in ours:
        heats = [one for one in ours if one.get("case") == row.get("case") and one.get("threads") == row.get("threads")]
        rivalled = [one for one in heats if any(_case(other) == _case(one) and target.against(other) for other in rows)]
        if "heat" not in row or row in (rivalled or heats[:1]):
            kept.append(row)
    return kept


def _verdict(target: Target, ours: Row, rows: list[Row], results: dict[str, Any]) -> Verdict:
    case = _case(ours)
    value = ours[target.quantity]
    if value is None:
        return Verdict(target, case, missing="not measured on this device")
    theirs = [row for row in rows if _case(row) == case and target.against(row) and row[target.quantity]]
    if not theirs:
        return Verdict(target, case, value, missing=_reason(target, ours, results))
    best = min(theirs, key=lambda row: row[target.quantity])
    waited = target.quantity == "median" and any(row.get("queued_ahead") is False for row in (ours, best))
    return Verdict(target, case, value, best[target.quantity], best["peer"], waited=waited)


def _case(row: Row) -> str:
    threads = f", threads {row['threads']}" if "threads" in row else ""
    heat = f", heat {row['heat']}" if "heat" in row else ""
    model = f"{row['model']} " if "model" in row else ""
    return f"{model}{row['batch']}x{row['tokens']} {row['dtype']}{threads}{heat}"


def _reason(target: Target, ours: Row, results: dict[str, Any]) -> str:
    name = ours["case"] if "bench" in ours else f"{ours['mode']}-{ours['batch']}x{ours['tokens']}-{ours['dtype']}"
    for entry in results.get("left_out", []):
        if entry["peer"] == target.peer and name in entry["cases"]:
            return f"{target.peer}: {entry['reason']}"
    return f"{target.peer or 'no peer'} was not measured"


def table(verdicts: list[Verdict]) -> str:
    """The verdicts as text, by target, with the count of those met."""
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
    against = verdict.against + (", the device waited for the host" if verdict.waited else "")
    return f"  {verdict.case:{width}}{ours:>11} against {theirs:>11}  ratio {verdict.ratio:5.2f}  {result}  ({against})"


def _amount(value: float, quantity: str) -> str:
    return f"{value * 1e3:.4g} ms" if quantity == "median" else f"{value / 2**20:.4g} MiB"


def main(arguments: list[str] | None = None) -> int:
    """Print the table; 0 whatever it says, or 2 where the file cannot be used."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.targets", description="Compare results with the targets."
    )
    parser.add_argument("results", type=Path, help="a results file, a .jsonl of `--rows`, or pytest-benchmark's JSON")
    options = parser.parse_args(arguments)
    try:
        results = read_results(options.results)
        verdicts = judge(results)
    except (OSError, ValueError, KeyError) as error:
        reason = f"{options.results}: its rows have no {error}" if isinstance(error, KeyError) else str(error)
        print(f"targets.py: {reason}", file=sys.stderr)
        return 2
    conditions = results["conditions"]
    print(f"{conditions['device_name']}, torch {conditions['torch']}, commit {conditions['commit'] or 'unknown'}")
    print(table(verdicts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
