"""Turn a run of the benchmarks into a small results file and a picture.

    pytest benchmarks/ --benchmark-json=run.json
    python benchmarks/plot.py run.json --results benchmarks/results

Reads what pytest-benchmark writes, or a results file that this script wrote earlier.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import textwrap
from collections import Counter
from pathlib import Path
from typing import Any

Row = dict[str, Any]

ROW_FIELDS = (
    *("mode", "batch", "tokens", "window", "heads", "head_dim", "dtype", "peer", "kernel", "biased"),
    *("median", "iqr", "rounds", "iterations", "tflops", "peak_memory", "errors", "flops", "least_bytes"),
)

STYLES = {  # peer: colour, line, marker; the same peer looks the same in every picture
    "beit_fast triton": ("#d1495b", "-", "o"),
    "beit_fast sdpa": ("#edae49", "-", "s"),
    "beit_fast eager": ("#8d6a9f", "-", "D"),
    "transformers sdpa": ("#00798c", "-", "^"),
    "transformers eager": ("#30638e", "-", "v"),
    "flex_attention": ("#5b8c5a", "-", "P"),
    "sdpa prebuilt bias": ("#6c757d", "--", "X"),
    "sdpa prebuilt bias cudnn": ("#495057", "--", "<"),
    "sdpa prebuilt bias efficient": ("#868e96", "--", ">"),
    "sdpa prebuilt bias math": ("#adb5bd", "--", "h"),
    "sdpa without bias": ("#212529", ":", "*"),
}


def main(arguments: list[str] | None = None) -> int:
    """Write what was asked for and name it; 0, or 2 where the file cannot be used."""
    parser = argparse.ArgumentParser(description="Write results and a picture from a run of the benchmarks.")
    parser.add_argument("run", type=Path, help="JSON of `pytest benchmarks/ --benchmark-json=RUN`, or a results file")
    parser.add_argument("--results", type=Path, metavar="FOLDER", help="write DEVICE.json and DEVICE.png here")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write DEVICE.png here (default: here)")
    options = parser.parse_args(arguments)
    try:
        results = read_results(options.run)
    except (OSError, ValueError) as error:
        print(f"plot.py: {error}", file=sys.stderr)
        return 2
    name = device_slug(results["conditions"])
    if options.results is not None:
        print(write_results(results, options.results / f"{name}.json"))
    pictures = options.out or options.results or Path()
    print(draw(results, pictures / f"{name}.png"))
    return 0


def read_results(path: Path) -> dict[str, Any]:
    """{"conditions": ..., "date": ..., "rows": [...]}; ValueError says what is wrong with the file."""
    try:
        content = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if "rows" in content:
        return content
    if "beit_fast" not in content.get("machine_info", {}):
        raise ValueError(f"{path} is neither a results file nor the JSON of `pytest benchmarks/ --benchmark-json=...`")
    rows = [_row(benchmark) for benchmark in content["benchmarks"]]
    if not rows:
        raise ValueError(f"{path} holds no measurement: every benchmark failed or was skipped")
    rows.sort(key=lambda row: (row["mode"], row["dtype"], row["tokens"], row["batch"], row["peer"]))
    return {
        "conditions": content["machine_info"]["beit_fast"],
        "date": content["datetime"][:10],
        "rows": rows,
    }


def _row(benchmark: dict[str, Any]) -> Row:
    stats = benchmark["stats"]
    known = {
        **benchmark["extra_info"],
        **{name: stats[name] for name in ("median", "iqr", "rounds", "iterations")},
    }
    return {name: _rounded(known[name]) for name in ROW_FIELDS}


def _rounded(value: Any) -> Any:
    """Four digits: more would be noise, and would change in every line of a diff."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    return {name: _rounded(part) for name, part in value.items()} if isinstance(value, dict) else value


def device_slug(conditions: dict[str, Any]) -> str:
    """A file name from the device: "nvidia-h200", "amd-epyc-9b14-cpu-2-threads"."""
    name = re.sub(r"\((R|TM)\)|@.*|\bCPU\b|\bProcessor\b|\b\d+-Core\b", " ", conditions["device_name"])
    if conditions["device"] == "cpu":
        name += f" cpu {conditions['threads']} threads"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def write_results(results: dict[str, Any], path: Path) -> Path:
    """One line a row, so that a diff shows which measurement changed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = ",\n".join("  " + json.dumps(row) for row in results["rows"])
    head = {name: value for name, value in results.items() if name != "rows"}
    path.write_text(json.dumps(head, indent=1)[:-2] + f',\n "rows": [\n{rows}\n ]\n}}\n')
    return path


def draw(results: dict[str, Any], path: Path) -> Path:
    """Speed and peak memory against the number of tokens, one line of panels for each mode."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = panels_of(results["rows"])
    height = 3.3 * len(panels) + 1.7
    figure, axes = plt.subplots(len(panels), 2, figsize=(11.5, height), squeeze=False)
    handles: dict[str, Any] = {}
    for line, rows in zip(axes, panels, strict=True):
        for axis, draw_panel in zip(line, (_draw_speed, _draw_memory), strict=True):
            handles.update(draw_panel(axis, rows))
            _label_tokens(axis, rows)
    figure.suptitle(
        "Attention with BEiT's relative position bias", x=0.02, y=1 - 0.12 / height, ha="left", weight="bold"
    )
    names = [name for name in STYLES if name in handles] + [name for name in handles if name not in STYLES]
    figure.legend(
        [handles[name] for name in names], names, loc="upper left", ncols=4, frameon=False, fontsize=9,
        bbox_to_anchor=(0.015, 1 - 0.36 / height), columnspacing=1.4,
    )  # fmt: skip
    legend_lines = math.ceil(len(names) / 4)
    text = caption(results, panels)
    figure.text(0.02, 0.1 / height, text, fontsize=8, color="#444444", va="bottom")
    bottom, top = 0.25 + 0.14 * len(text.splitlines()), 0.45 + 0.19 * legend_lines
    figure.tight_layout(rect=(0, bottom / height, 1, 1 - top / height), h_pad=1.6, w_pad=2.5)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


def panels_of(rows: list[Row]) -> list[list[Row]]:
    """The rows to draw, by mode: the dtype with most sizes, and for each size one batch, the commonest."""
    panels = []
    for mode in dict.fromkeys(row["mode"] for row in rows):
        shapes = {(row["dtype"], row["tokens"], row["batch"]) for row in rows if row["mode"] == mode}
        dtype = _commonest(dtype for dtype, _, _ in sorted(shapes))
        batches = Counter(batch for kind, _, batch in shapes if kind == dtype)
        chosen = {}
        for _, tokens, batch in sorted((s for s in shapes if s[0] == dtype), key=lambda s: (batches[s[2]], s[2])):
            chosen[tokens] = batch
        panels.append(
            [
                row
                for row in rows
                if row["mode"] == mode and row["dtype"] == dtype and chosen.get(row["tokens"]) == row["batch"]
            ]
        )
    return panels


def _commonest(values: Any) -> Any:
    return Counter(values).most_common(1)[0][0]


def _draw_speed(axis: Any, rows: list[Row]) -> dict[str, Any]:
    unit, scale = ("TFLOP/s", 1) if max(row["tflops"] for row in rows) >= 1 else ("GFLOP/s", 1000)
    axis.set_title(f"{rows[0]['mode']}, {rows[0]['dtype']}: speed", loc="left", fontsize=10)
    axis.set_ylabel(f"{unit} (higher is better)")
    return _draw_lines(axis, rows, lambda row: row["tflops"] * scale)


def _draw_memory(axis: Any, rows: list[Row]) -> dict[str, Any]:
    axis.set_title(f"{rows[0]['mode']}, {rows[0]['dtype']}: peak memory", loc="left", fontsize=10)
    axis.set_ylabel("MiB per image (lower is better)")
    measured = [row for row in rows if row["peak_memory"]]
    if not measured:
        axis.text(0.5, 0.5, "not measured on this device", transform=axis.transAxes, ha="center", color="#666666")
        return {}
    return _draw_lines(axis, measured, lambda row: row["peak_memory"] / 2**20 / row["batch"])


def _draw_lines(axis: Any, rows: list[Row], value: Any) -> dict[str, Any]:
    handles = {}
    for peer in dict.fromkeys(row["peer"] for row in rows):
        points = sorted((row["tokens"], value(row)) for row in rows if row["peer"] == peer)
        colour, line, marker = STYLES.get(peer, ("#000000", "-.", "."))
        (handles[peer],) = axis.plot(
            *zip(*points, strict=True),
            color=colour,
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
    """From zero where that shows every difference, else logarithmic."""
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


def caption(results: dict[str, Any], panels: list[list[Row]]) -> str:
    """The conditions: device, versions, commit, shape, and what the two scales mean."""
    conditions, row = results["conditions"], panels[0][0]
    kernels = sorted({row["kernel"] for rows in panels for row in rows if row["peer"] == "beit_fast triton"})
    parts = [
        f"{conditions['device_name']}, {conditions['threads']} CPU threads",
        *(f"{name} {conditions[name]}" for name in ("torch", "triton", "transformers") if conditions.get(name)),
        f"beit_fast {conditions['beit_fast']} ({conditions['commit'] or 'no commit'})",
        f"{results['date']}",
        f"H={row['heads']}, D={row['head_dim']}",
        *([f"beit_fast triton ran {', '.join(kernels)}"] if kernels else []),
    ]
    meaning = (
        "Speed counts the two products of the forward, and five of the backward, whatever a peer computes. "
        "Memory is the peak above the level before the call, divided by B. "
        "'sdpa prebuilt bias' holds its [H, N, N] bias before it is measured; "
        "'sdpa without bias' computes something else."
    )
    return "\n".join([*textwrap.wrap("; ".join(parts) + ".", 170), *textwrap.wrap(meaning, 170)])


if __name__ == "__main__":
    sys.exit(main())
