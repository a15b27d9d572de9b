"""Write the two BEiT tables of Transformers' documentation as Markdown. Our columns are added."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..harness.hf_docs_cases import EAGER, HF_DOCS_IMAGE, OPTIMIZED, SDPA, TRITON
from ..harness.results import Row

HEADINGS = {EAGER: "Eager", SDPA: "SDPA", TRITON: "triton", OPTIMIZED: "optimized"}
NOT_MEASURED = "-"


def write_tables(results: dict[str, Any], path: Path) -> Path:
    """Write both tables with their conditions to `path` with the suffix `.md`."""
    path = path.with_suffix(".md")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(tables(results))
    return path


def tables(results: dict[str, Any]) -> str:
    """Format the tables, their conditions, and the reasons for missing numbers."""
    training = [row for row in results["rows"] if row["mode"] == "training"]
    inference = [row for row in results["rows"] if row["mode"] == "inference"]
    parts = ["# The tables of Transformers' BEiT documentation, with beit_fast", conditions_of(results)]
    if training:
        parts += ["## Training", training_table(training)]
    if inference:
        parts += ["## Inference", inference_table(inference)]
    if results["left_out"]:
        parts.append(left_out(results["left_out"]))
    return "\n\n".join(parts) + "\n"


def training_table(rows: list[Row]) -> str:
    """Format the training table, with columns for `triton`; percentages are relative to eager."""
    baselines = (EAGER, SDPA, TRITON)
    others = baselines[1:]
    head = ["num_training_steps", "batch_size", "image_size", "dtype", "is_cuda"]
    head += [f"Time per batch ({HEADINGS[baseline].lower()} - s)" for baseline in baselines]
    head += [f"{HEADINGS[baseline]} speedup (%)" for baseline in others]
    head += [f"{HEADINGS[baseline]} peak mem (MB)" for baseline in baselines]
    head += [f"{HEADINGS[baseline]} mem saving (%)" for baseline in others]
    body = []
    for lines in _lines(rows):
        row = next(iter(lines.values()))
        image = f"({row['height']}, {row['width']})"
        cells = [str(row["rounds"]), str(row["batch"]), image, row["dtype"], str(row["device"] == "cuda")]
        cells += [_number(_time(lines.get(baseline))) for baseline in baselines]
        cells += [_number(_saving(_time(lines.get(EAGER)), _time(lines.get(baseline))), 1) for baseline in others]
        cells += [_megabytes(_memory(lines.get(baseline))) for baseline in baselines]
        cells += [_number(_saving(_memory(lines.get(EAGER)), _memory(lines.get(baseline))), 1) for baseline in others]
        body.append(cells)
    return _table(head, body)


def inference_table(rows: list[Row]) -> str:
    """Format the inference table, with columns for `triton` and the optimized model."""
    baselines = tuple(HEADINGS)
    head = ["Image batch size", "dtype"]
    for baseline in baselines:
        head += [f"{HEADINGS[baseline]} {what}" for what in ("(s/iter)", "±IQR/2, %", "memory (MB)")]
    for baseline in baselines[1:]:
        head += [f"{HEADINGS[baseline]} speedup", f"{HEADINGS[baseline]} memory saved (%)"]
    body = []
    for lines in _lines(rows):
        row = next(iter(lines.values()))
        cells = [str(row["batch"]), row["dtype"]]
        for baseline in baselines:
            cells += [
                _number(_time(lines.get(baseline))),
                _spread(lines.get(baseline)),
                _megabytes(_memory(lines.get(baseline))),
            ]
        for baseline in baselines[1:]:
            ours, eager = lines.get(baseline), lines.get(EAGER)
            speed = _ratio(_time(eager), _time(ours))
            cells += [_number(speed, 2), _number(_saving(_memory(eager), _memory(ours)), 1)]
        body.append(cells)
    return _table(head, body)


def conditions_of(results: dict[str, Any]) -> str:
    """Describe device, versions, commit, timed function, time and memory."""
    conditions, row = results["conditions"], results["rows"][0]
    on_cuda = row["device"] == "cuda"
    versions = [f"{name} {conditions[name]}" for name in ("torch", "triton", "transformers") if conditions.get(name)]
    kernels = sorted({row["kernel"] for row in results["rows"] if row["baseline"] in (TRITON, OPTIMIZED)})
    threads = [] if on_cuda else [f"{row['threads']} thread{'s' if row['threads'] > 1 else ''}"]
    measured = [conditions["device_name"], *threads, *versions]
    measured.append(f"beit_fast {conditions['beit_fast']} ({conditions['commit'] or 'no commit'})")
    ran = f" Kernels of beit_fast: {'; '.join(kernels)}." if kernels else ""
    memory = (
        "Memory is the peak of torch's allocator on the device during a call: weights, gradients, activations."
        if on_cuda
        else "Memory is the growth of the process from before the model is built to the peak of a call: weights, "
        "gradients, activations and all buffers. The documentation counts torch's allocator on CUDA."
    )
    lines = [
        f"{', '.join(measured)}; {results['date']}.{ran}",
        "BeitForImageClassification of beit-base-patch16-224 with random weights; eager and SDPA are Transformers' "
        "own. A training step is forward, sum of the logits and backward, without an optimizer, as in the scripts "
        "behind such tables; drop path is off. Each implementation runs in its own process, in turns, after its logits "
        "and gradients were checked against fp64. Times are medians of "
        f"{_counts(results['rows'])} calls, each after an untimed call.",
        f"{memory} A megabyte is 10^6 bytes. Speed-up and saving are relative to eager; percentages of both are "
        "eager / other - 1, as in the documentation.",
    ]
    hf_docs_sizes = {(row["height"], row["width"]) for row in results["rows"] if row["mode"] == "training"}
    if hf_docs_sizes - {HF_DOCS_IMAGE}:
        lines.append("The documentation trains on 1048x640 pixels for 50 steps; `--full` does so here.")
    return "\n\n".join(lines)


def left_out(entries: list[dict[str, Any]]) -> str:
    """List the missing numbers with their reasons."""
    lines = [f"- {entry['baseline']}, {', '.join(entry['cases'])}: {entry['reason']}" for entry in entries]
    return "\n".join(["Not measured:", "", *lines])


def _counts(rows: list[Row]) -> str:
    counts = sorted({row["rounds"] for row in rows})
    return " to ".join(str(count) for count in dict.fromkeys((counts[0], counts[-1])))


def _lines(rows: list[Row]) -> list[dict[str, Row]]:
    """Collect the rows of each line by baseline; of several groups, the first row counts."""
    lines: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in sorted(rows, key=lambda row: (row["dtype"] != "fp32", row["dtype"], row["tokens"], row["batch"])):
        key = (row["model"], row["dtype"], row["height"], row["width"], row["batch"])
        lines.setdefault(key, {}).setdefault(row["baseline"], row)
    return list(lines.values())


def _time(row: Row | None) -> float | None:
    return None if row is None else row["median"]


def _memory(row: Row | None) -> int | None:
    """Return the peak bytes of a call, including the model."""
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
