"""The two tables of Transformers' BEiT page as Markdown, with our columns: written by `python -m benchmarks.plot`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..harness.results import Row

BENCHES = {"cpu": "cpu page", "cuda": "page"}
EAGER, SDPA, TRITON, OPTIMIZED = "transformers eager", "transformers sdpa", "beit_fast triton", "beit_fast optimized"
HEADINGS = {EAGER: "Eager", SDPA: "SDPA", TRITON: "triton", OPTIMIZED: "optimized"}
NOT_MEASURED = "-"


def write_page(results: dict[str, Any], path: Path) -> Path:
    """Write both tables, with their conditions, where a picture would be, as `.md`."""
    path = path.with_suffix(".md")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page(results))
    return path


def page(results: dict[str, Any]) -> str:
    """The tables, what they were measured on, and why a number is missing."""
    training = [row for row in results["rows"] if row["mode"] == "training"]
    inference = [row for row in results["rows"] if row["mode"] == "inference"]
    parts = ["# The tables of Transformers' BEiT page, with ours", conditions_of(results)]
    if training:
        parts += ["## Training", training_table(training)]
    if inference:
        parts += ["## Inference", inference_table(inference)]
    if results["left_out"]:
        parts.append(left_out(results["left_out"]))
    return "\n\n".join(parts) + "\n"


def training_table(rows: list[Row]) -> str:
    """The page's columns, those of speed and memory also for `triton`; percentages are against eager."""
    peers = (EAGER, SDPA, TRITON)
    rivals = peers[1:]
    head = ["num_training_steps", "batch_size", "image_size", "dtype", "is_cuda"]
    head += [f"Time per batch ({HEADINGS[peer].lower()} - s)" for peer in peers]
    head += [f"{HEADINGS[peer]} speedup (%)" for peer in rivals]
    head += [f"{HEADINGS[peer]} peak mem (MB)" for peer in peers]
    head += [f"{HEADINGS[peer]} mem saving (%)" for peer in rivals]
    body = []
    for lines in _lines(rows):
        row = next(iter(lines.values()))
        image = f"({row['height']}, {row['width']})"
        cells = [str(row["rounds"]), str(row["batch"]), image, row["dtype"], str(row["device"] == "cuda")]
        cells += [_number(_time(lines.get(peer))) for peer in peers]
        cells += [_number(_saving(_time(lines.get(EAGER)), _time(lines.get(peer))), 1) for peer in rivals]
        cells += [_megabytes(_memory(lines.get(peer))) for peer in peers]
        cells += [_number(_saving(_memory(lines.get(EAGER)), _memory(lines.get(peer))), 1) for peer in rivals]
        body.append(cells)
    return _table(head, body)


def inference_table(rows: list[Row]) -> str:
    """The page's columns, each also for `triton` and the optimised model; speed-up and memory are against eager."""
    peers = tuple(HEADINGS)
    head = ["Image batch size", "dtype"]
    for peer in peers:
        head += [f"{HEADINGS[peer]} {what}" for what in ("(s/iter)", "±IQR/2, %", "memory (MB)")]
    for peer in peers[1:]:
        head += [f"{HEADINGS[peer]} speedup", f"{HEADINGS[peer]} memory saved (%)"]
    body = []
    for lines in _lines(rows):
        row = next(iter(lines.values()))
        cells = [str(row["batch"]), row["dtype"]]
        for peer in peers:
            cells += [_number(_time(lines.get(peer))), _spread(lines.get(peer)), _megabytes(_memory(lines.get(peer)))]
        for peer in peers[1:]:
            ours, eager = lines.get(peer), lines.get(EAGER)
            speed = _ratio(_time(eager), _time(ours))
            cells += [_number(speed, 2), _number(_saving(_memory(eager), _memory(ours)), 1)]
        body.append(cells)
    return _table(head, body)


def conditions_of(results: dict[str, Any]) -> str:
    """Device, versions and commit; what is run, and what time and memory mean."""
    conditions, row = results["conditions"], results["rows"][0]
    on_cuda = row["device"] == "cuda"
    versions = [f"{name} {conditions[name]}" for name in ("torch", "triton", "transformers") if conditions.get(name)]
    kernels = sorted({row["kernel"] for row in results["rows"] if row["peer"] in (TRITON, OPTIMIZED)})
    threads = [] if on_cuda else [f"{row['threads']} thread{'s' if row['threads'] > 1 else ''}"]
    measured = [conditions["device_name"], *threads, *versions]
    measured.append(f"beit_fast {conditions['beit_fast']} ({conditions['commit'] or 'no commit'})")
    ran = f" Kernels of beit_fast: {'; '.join(kernels)}." if kernels else ""
    memory = (
        "Memory is the peak in a call of what torch's allocator holds on the device: weights, gradients, activations."
        if on_cuda
        else "Memory is what the process grows by, from before the model was built to the peak in a call: weights, "
        "gradients, activations and whatever else the implementation keeps. The page counts torch's allocator on CUDA."
    )
    lines = [
        f"{', '.join(measured)}; {results['date']}.{ran}",
        "BeitForImageClassification of beit-base-patch16-224 with random weights; eager and SDPA are Transformers' "
        "own. A training step is forward, sum of the logits and backward, without an optimizer, as in the scripts "
        "behind such tables; there is no drop path. Every implementation runs in a process of its own, in turns, after "
        "its logits and gradients were compared with fp64. Times are medians of "
        f"{_counts(results['rows'])} calls, each after one that is not timed.",
        f"{memory} A megabyte is 10^6 bytes. Speed-up and saving are against eager; percentages of both are "
        "eager / other - 1, as on the page.",
    ]
    page_sizes = {(row["height"], row["width"]) for row in results["rows"] if row["mode"] == "training"}
    if page_sizes - {(1048, 640)}:
        lines.append("The page trains on 1048x640 pixels and in 50 steps: `--full` does that here.")
    return "\n\n".join(lines)


def left_out(entries: list[dict[str, Any]]) -> str:
    """What is missing, and why."""
    lines = [f"- {entry['peer']}, {', '.join(entry['cases'])}: {entry['reason']}" for entry in entries]
    return "\n".join(["Not measured:", "", *lines])


def _counts(rows: list[Row]) -> str:
    counts = sorted({row["rounds"] for row in rows})
    return " to ".join(str(count) for count in dict.fromkeys((counts[0], counts[-1])))


def _lines(rows: list[Row]) -> list[dict[str, Row]]:
    """The rows of each line of a table, by peer; in a peer's case of several heats, its first row."""
    lines: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in sorted(rows, key=lambda row: (row["dtype"] != "fp32", row["dtype"], row["tokens"], row["batch"])):
        key = (row["model"], row["dtype"], row["height"], row["width"], row["batch"])
        lines.setdefault(key, {}).setdefault(row["peer"], row)
    return list(lines.values())


def _time(row: Row | None) -> float | None:
    return None if row is None else row["median"]


def _memory(row: Row | None) -> int | None:
    """Bytes at the peak of a call, the model's included."""
    if row is None or None in (row["peak_memory"], row["loaded_memory"], row["memory_before"]):
        return None
    return row["loaded_memory"] - row["memory_before"] + row["peak_memory"]


def _spread(row: Row | None) -> str:
    return NOT_MEASURED if row is None else f"±{50 * row['iqr'] / row['median']:.1f}%"


def _ratio(eager: float | None, other: float | None) -> float | None:
    return None if eager is None or not other else eager / other


def _saving(eager: float | None, other: float | None) -> float | None:
    ratio = _ratio(eager, other)
    return None if ratio is None else 100 * (ratio - 1)


def _megabytes(value: int | None) -> str:
    return NOT_MEASURED if value is None else f"{value / 1e6:.1f}"


def _number(value: float | None, digits: int = 4) -> str:
    return NOT_MEASURED if value is None else f"{value:.{digits}f}"


def _table(head: list[str], body: list[list[str]]) -> str:
    lines = [head, ["---:"] * len(head), *body]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
