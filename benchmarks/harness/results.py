"""Measurements in files: the log of a run, and the small results file that is committed."""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .processes import Result

Row = dict[str, Any]

STATS = ("median", "iqr", "rounds", "iterations")
ROW_FIELDS = (
    *("mode", "batch", "tokens", "window", "heads", "head_dim", "dtype", "baseline", "kernel", "biased", "learnable"),
    *(*STATS, "clock", "queued_ahead", "single_call", "tflops", "peak_memory", "errors", "flops", "least_bytes"),
    "sm_clock_mhz",
)

ATTENTION = "attention"
"""Benchmark of rows without the field "bench": `bench_attention.py`."""

_ORDER = ("mode", "model", "dtype", "tokens", "batch", "threads", "group", "baseline")


class RowLog:
    """Log of a run: a line of JSON for the conditions, then one for each row or missing baseline.

    Lines are written at once, so that the measurements of a killed run are kept. `read_results` reads the file.
    """

    def __init__(self, path: Path, conditions: dict[str, Any]) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
        self._append({"conditions": conditions, "date": datetime.date.today().isoformat()})

    def measured(self, row: Row) -> None:
        self._append({"row": row})

    def left_out(self, case: str, baseline: str, reason: str, bench: str = ATTENTION) -> None:
        named = {} if bench == ATTENTION else {"bench": bench}
        self._append({"case": case, "baseline": baseline, "left_out": reason, **named})

    def _append(self, entry: dict[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(entry) + "\n")


def row_of(facts: dict[str, Any], stats: dict[str, Any]) -> Row:
    """Build a row from the `extra_info` and the statistics of pytest-benchmark."""
    known = {**facts, **{name: stats[name] for name in STATS}}
    return {name: rounded(known[name]) for name in ROW_FIELDS}


def row_of_result(result: Result, per_call: Mapping[str, float], flops: int | None) -> Row:
    """Build the measured fields of a row; amounts of one call in `per_call` become rates."""
    row: Row = {"baseline": result.name, **result.facts, "median": result.median, "iqr": result.iqr}
    row |= {"range": [min(result.times), max(result.times)], "rounds": len(result.times)}
    row |= {"iterations": result.iterations, "peak_memory": result.peak_memory, "loaded_memory": result.loaded_memory}
    row |= {name: count / result.median for name, count in per_call.items()}
    return row if flops is None else {**row, "tflops": flops / result.median / 1e12}


def rounded(value: Any) -> Any:
    """Round all floats of a value to four digits. The rounding error is below the noise."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {name: rounded(part) for name, part in value.items()}
    return [rounded(part) for part in value] if isinstance(value, list) else value


def read_results(path: Path) -> dict[str, Any]:
    """Read the measurements of a run.

    Args:
        path: A results file, a log of rows (.jsonl), or the JSON of `pytest benchmarks/ --benchmark-json=...`, which
            does not list missing baselines.

    Returns:
        {"conditions": ..., "date": ..., "rows": [...], "left_out": [...]}.

    Raises:
        ValueError: If the file is not one of these, or does not contain a measurement.
    """
    text = path.read_text()
    content = _parse_log(text, path) if path.suffix == ".jsonl" else _parse(text, path)
    if not isinstance(content, dict) or not ("rows" in content or "beit_fast" in content.get("machine_info", {})):
        raise ValueError(
            f"{path} is not a results file, a log of rows (.jsonl), "
            "or the JSON of `pytest benchmarks/ --benchmark-json=...`"
        )
    if not content.get("rows", content.get("benchmarks")):
        raise ValueError(f"{path} does not contain a measurement: every benchmark failed or was skipped")
    return {"left_out": [], **content} if "rows" in content else _from_pytest_benchmark(content)


def _parse(text: str, path: Path) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None


def _parse_log(text: str, path: Path) -> dict[str, Any] | None:
    lines = text.splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):  # the run was killed while it wrote this line
        lines.pop()
    entries = [_parse(line, path) for line in lines]
    if not entries or "conditions" not in entries[0]:
        return None
    rows = [entry["row"] for entry in entries if "row" in entry]
    missing = [entry for entry in entries if "left_out" in entry]
    cases: dict[tuple[str, str, str], list[str]] = {}
    for entry in missing:
        key = (entry.get("bench", ATTENTION), entry["baseline"], entry["left_out"])
        cases.setdefault(key, []).append(entry["case"])
    left_out = [
        {"baseline": baseline, "reason": reason, "cases": names, **({} if bench == ATTENTION else {"bench": bench})}
        for (bench, baseline, reason), names in cases.items()
    ]
    return {**entries[0], "rows": _sorted(rows), "left_out": left_out}


def _from_pytest_benchmark(content: dict[str, Any]) -> dict[str, Any]:
    rows = [row_of(benchmark["extra_info"], benchmark["stats"]) for benchmark in content["benchmarks"]]
    return {
        "conditions": content["machine_info"]["beit_fast"],
        "date": content["datetime"][:10],
        "rows": _sorted(rows),
        "left_out": [],
    }


def _sorted(rows: list[Row]) -> list[Row]:
    return sorted(rows, key=lambda row: (row.get("bench", ATTENTION), *(row[name] for name in _ORDER if name in row)))


def by_bench(results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Split results by benchmark."""
    names = dict.fromkeys(row.get("bench", ATTENTION) for row in results["rows"])

    def of(name: str, entries: list[Row]) -> list[Row]:
        return [entry for entry in entries if entry.get("bench", ATTENTION) == name]

    return {
        name: {**results, "rows": of(name, results["rows"]), "left_out": of(name, results["left_out"])}
        for name in names
    }


def write_results(results: dict[str, Any], path: Path) -> Path:
    """Write a results file, one line per row for readable diffs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lists = {name: value for name, value in results.items() if isinstance(value, list)}
    head = {name: value for name, value in results.items() if name not in lists}
    parts = [json.dumps(head, indent=1)[:-2]]
    for name, entries in lists.items():
        lines = ",\n".join("  " + json.dumps(entry) for entry in entries)
        parts.append(f' "{name}": [\n{lines}\n ]' if entries else f' "{name}": []')
    path.write_text(",\n".join(parts) + "\n}\n")
    return path


def file_name(conditions: dict[str, Any], bench: str) -> str:
    """Return the file name, without suffix, of a benchmark's results and picture.

    Attention is named by its device alone: "amd-epyc-9b14-cpu-2-threads". The others have a thread count in each row
    and are named by benchmark: "amd-epyc-9b14-cpu-patch-embedding".
    """
    if bench == ATTENTION:
        return device_slug(conditions)
    return device_slug({**conditions, "device": None}) + "-" + bench.replace(" ", "-")


def device_slug(conditions: dict[str, Any]) -> str:
    """Return a file name for a device: "nvidia-h200", "amd-epyc-9b14-cpu-2-threads"."""
    name = re.sub(r"\((R|TM)\)|@.*|\bCPU\b|\bProcessor\b|\b\d+-Core\b", " ", conditions["device_name"])
    if conditions["device"] == "cpu":
        name += f" cpu {conditions['threads']} threads"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
