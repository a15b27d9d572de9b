"""Write a small results file and a picture for each benchmark.

    pytest benchmarks/ --rows=run.jsonl
    python -m benchmarks.report.plot run.jsonl --results benchmarks/results

The input is a run: a log of rows (`--rows`), the JSON of pytest-benchmark, or a results file.
"""

from __future__ import annotations

import argparse
import math
import sys
import textwrap
from collections import Counter
from pathlib import Path
from typing import Any

from ..harness import hf_docs_cases, pretraining_cases
from ..harness.results import Row, by_bench, file_name, read_results, write_results
from .hf_docs_tables import write_tables
from .plot_image_size import draw_image_sizes, has_image_sizes
from .plot_models import draw_models
from .plot_patches import draw_patches

STYLES = {  # baseline: color, line, marker
    "beit_fast triton": ("#d1495b", "-", "o"),
    "beit_fast triton without bias": ("#d1495b", ":", "o"),
    "beit_fast sdpa": ("#edae49", "-", "s"),
    "beit_fast eager": ("#8d6a9f", "-", "D"),
    "transformers sdpa": ("#00798c", "-", "^"),
    "transformers eager": ("#30638e", "-", "v"),
    "flex_attention": ("#5b8c5a", "-", "P"),
    "flex_attention coordinates": ("#9cbf7f", "-", "p"),
    "sdpa gathered bias cudnn": ("#2a9db5", "-", "<"),
    "sdpa gathered bias efficient": ("#56b9c9", "-", ">"),
    "sdpa gathered bias math": ("#8fd0da", "-", "h"),
    "sdpa prebuilt bias": ("#6c757d", "--", "X"),
    "sdpa prebuilt bias cudnn": ("#495057", "--", "<"),
    "sdpa prebuilt bias efficient": ("#868e96", "--", ">"),
    "sdpa prebuilt bias math": ("#adb5bd", "--", "h"),
    "sdpa without bias": ("#212529", ":", "*"),
    "sdpa without bias flash": ("#212529", ":", "d"),
    "sdpa without bias cudnn": ("#212529", ":", "<"),
    "sdpa without bias efficient": ("#212529", ":", ">"),
}


def main(arguments: list[str] | None = None) -> int:
    """Write the files and print their paths; return 0, or 2 if the run cannot be read."""
    parser = argparse.ArgumentParser(description="Write results and a picture from a run of the benchmarks.")
    parser.add_argument("run", type=Path, help="JSON or log of rows of a run, or a results file")
    parser.add_argument("--results", type=Path, metavar="FOLDER", help="write DEVICE*.json and DEVICE*.png here")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write DEVICE*.png here (default: here)")
    options = parser.parse_args(arguments)
    try:
        results = read_results(options.run)
    except (OSError, ValueError) as error:
        print(f"plot.py: {error}", file=sys.stderr)
        return 2
    pictures = options.out or options.results or Path()
    for bench, of_bench in by_bench(results).items():
        name = file_name(results["conditions"], bench)
        if options.results is not None:
            print(write_results(of_bench, options.results / f"{name}.json"))
        print(_DRAW.get(bench, draw)(of_bench, pictures / f"{name}.png"))
        if bench == "cpu models" and has_image_sizes(of_bench):
            print(draw_image_sizes(of_bench, pictures / f"{name}-image-size.png"))
    return 0


def draw(results: dict[str, Any], path: Path) -> Path:
    """Draw speed and peak memory against the number of tokens: a line of panels per mode."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = panels_of(results["rows"])
    columns = max(len(panels) for panels in lines) + 1
    width, height = 5.75 * columns, 3.3 * len(lines) + 1.9
    figure, axes = plt.subplots(len(lines), columns, figsize=(width, height), squeeze=False)
    handles: dict[str, Any] = {}
    for line, panels in zip(axes, lines, strict=True):
        for axis in line[len(panels) : -1]:
            axis.set_visible(False)
        drawn = [*zip(line, panels, strict=False), (line[-1], panels[0])]
        for axis, rows in drawn:
            handles.update((_draw_memory if axis is line[-1] else _draw_speed)(axis, rows))
            _label_tokens(axis, rows)
    figure.suptitle(
        "Attention with BEiT's relative position bias", x=0.02, y=1 - 0.12 / height, ha="left", weight="bold"
    )
    names = [name for name in STYLES if name in handles] + [name for name in handles if name not in STYLES]
    in_a_line = 2 * columns
    figure.legend(
        [handles[name] for name in names], names, loc="upper left", ncols=in_a_line, frameon=False, fontsize=9,
        bbox_to_anchor=(0.015, 1 - 0.36 / height), columnspacing=1.4,
    )  # fmt: skip
    legend_lines = math.ceil(len(names) / in_a_line)
    text = caption(results, [rows for panels in lines for rows in panels], 85 * columns)
    figure.text(0.02, 0.1 / height, text, fontsize=8, color="#444444", va="bottom")
    bottom, top = 0.25 + 0.14 * len(text.splitlines()), 0.45 + 0.19 * legend_lines
    figure.tight_layout(rect=(0, bottom / height, 1, 1 - top / height), h_pad=1.6, w_pad=2.5)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


_DRAW = {
    "cpu patch embedding": draw_patches,
    **dict.fromkeys(("cpu models", "models", *pretraining_cases.BENCHES.values()), draw_models),
    **dict.fromkeys(hf_docs_cases.BENCHES.values(), write_tables),
}


def panels_of(rows: list[Row]) -> list[list[list[Row]]]:
    """Choose the rows to draw, by mode and then by panel: batches first, then single images.

    A mode shows the dtype with the most sizes, and the largest batch at each size. A panel with a single size is left
    out if the mode has another panel. Rows with a thread count are split by `_panels_of_threads`.
    """
    if any("threads" in row for row in rows):
        return _panels_of_threads(rows)
    lines = []
    for mode in sorted({row["mode"] for row in rows}, key=_mode_order):
        of_mode = [row for row in rows if row["mode"] == mode]
        dtype = _commonest(kind for kind, _, _ in sorted({(r["dtype"], r["tokens"], r["batch"]) for r in of_mode}))
        of_mode = [row for row in of_mode if row["dtype"] == dtype]
        largest = {row["tokens"]: row["batch"] for row in sorted(of_mode, key=lambda row: row["batch"])}
        batches = [row for row in of_mode if row["batch"] == largest[row["tokens"]] > 1]
        singles = [row for row in of_mode if row["batch"] == 1]
        panels = [panel for panel in (batches, singles) if panel]
        lines.append([panel for panel in panels if len({row["tokens"] for row in panel}) > 1] or panels)
    return lines


def _panels_of_threads(rows: list[Row]) -> list[list[list[Row]]]:
    """Split single images by mode and dtype, then by number of threads."""
    singles = [row for row in rows if row["batch"] == 1]
    kinds = sorted({(_mode_order(row["mode"]), row["mode"], row["dtype"]) for row in singles})
    lines = []
    for _, mode, dtype in kinds:
        of_kind = [row for row in singles if (row["mode"], row["dtype"]) == (mode, dtype)]
        counts = sorted({row["threads"] for row in of_kind})
        lines.append([[row for row in of_kind if row["threads"] == count] for count in counts])
    return lines


def _mode_order(mode: str) -> tuple[int, str]:
    first = ("forward", "backward", "training")
    return (first.index(mode) if mode in first else len(first), mode)


def _commonest(values: Any) -> Any:
    return Counter(values).most_common(1)[0][0]


def _draw_speed(axis: Any, rows: list[Row]) -> dict[str, Any]:
    unit, scale = ("TFLOP/s", 1) if max(row["tflops"] for row in rows) >= 1 else ("GFLOP/s", 1000)
    axis.set_title(f"{_subject(rows)}: speed", loc="left", fontsize=10)
    axis.set_ylabel(f"{unit} (higher is better)")
    return _draw_lines(axis, rows, lambda row: row["tflops"] * scale)


def _draw_memory(axis: Any, rows: list[Row]) -> dict[str, Any]:
    axis.set_title(f"{_subject(rows)}: peak memory", loc="left", fontsize=10)
    axis.set_ylabel("MiB per image (lower is better)")
    measured = [row for row in rows if row["peak_memory"]]
    if not measured:
        axis.text(0.5, 0.5, "not measured on this device", transform=axis.transAxes, ha="center", color="#666666")
        return {}
    return _draw_lines(axis, measured, lambda row: row["peak_memory"] / 2**20 / row["batch"])


def _subject(rows: list[Row]) -> str:
    single = ", one image" if all(row["batch"] == 1 for row in rows) else ""
    threads = f", threads {rows[0]['threads']}" if "threads" in rows[0] else ""
    return f"{rows[0]['mode']}{single}, {rows[0]['dtype']}{threads}"


def _draw_lines(axis: Any, rows: list[Row], value: Any) -> dict[str, Any]:
    handles = {}
    for baseline in dict.fromkeys(row["baseline"] for row in rows):
        points = sorted((row["tokens"], value(row)) for row in rows if row["baseline"] == baseline)
        color, line, marker = STYLES.get(baseline, ("#000000", "-.", "."))
        (handles[baseline],) = axis.plot(
            *zip(*points, strict=True),
            color=color,
            linestyle=line,
            marker=marker,
            markersize=5,
            linewidth=1.5,
        )
    _scale_values(axis, [value(row) for row in rows])
    axis.grid(axis="y", color="#e3e3e3", linewidth=0.7)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    return handles


def _scale_values(axis: Any, values: list[float]) -> None:
    """Start the axis at zero. If the values are not within a factor of 10, make it logarithmic instead."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    if max(values) < 10 * min(values):
        axis.set_ylim(0, 1.08 * max(values))
        return
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda tick, _: f"{tick:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())


def _label_tokens(axis: Any, rows: list[Row]) -> None:
    from matplotlib.ticker import NullLocator

    batches = {row["tokens"]: row["batch"] for row in rows}
    axis.set_xscale("log")
    axis.set_xlim(min(batches) / 1.12, max(batches) * 1.12)
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_xticks(sorted(batches), [f"N={tokens}\nB={batches[tokens]}" for tokens in sorted(batches)])


def caption(results: dict[str, Any], panels: list[list[Row]], width: int = 170) -> str:
    """Describe device, versions, commit, shape, and the meaning of speed and memory."""
    conditions, row = results["conditions"], panels[0][0]
    drawn = [row for rows in panels for row in rows]
    kernels = sorted({row["kernel"] for row in drawn if row["baseline"] == "beit_fast triton"})
    gpu = conditions.get("gpu") or {}
    parts = [
        conditions["device_name"],
        *(
            [f"driver {gpu['driver_version']}"]
            if gpu.get("driver_version")
            else []
            if "threads" in row
            else [f"{conditions['threads']} CPU threads"]
        ),
        *(f"{name} {conditions[name]}" for name in ("torch", "triton", "transformers") if conditions.get(name)),
        f"beit_fast {conditions['beit_fast']} ({conditions['commit'] or 'no commit'})",
        f"{results['date']}",
        f"H={row['heads']}, D={row['head_dim']}",
        *([f"beit_fast triton ran {', '.join(kernels)}"] if kernels else []),
    ]
    meanings = [
        "Speed counts two products in the forward and five in the backward, for every baseline.",
        "Memory is the peak above the level before the call, divided by B.",
        *(["Time is device time without launches; inputs stay in L2 if they fit."] if _on_device(drawn) else []),
        *(["Each baseline runs in its own process, in turns."] if "threads" in row else []),
        "'prebuilt bias' builds its [H, N, N] bias before the clock starts, 'gathered bias' in each call.",
        "'without bias' computes another result.",
    ]
    return "\n".join([*textwrap.wrap("; ".join(parts) + ".", width), *textwrap.wrap(" ".join(meanings), width)])


def _on_device(rows: list[Row]) -> bool:
    return any(row.get("clock") == "device time" for row in rows)


if __name__ == "__main__":
    sys.exit(main())
