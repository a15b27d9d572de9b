"""Draw whole models: speed and memory of each case, with a bar for every baseline."""

from __future__ import annotations

import statistics
import textwrap
from pathlib import Path
from typing import Any

from ..harness.pretraining_cases import PRETRAINING
from ..harness.results import Row

COLORS = {  # by baseline
    "beit_fast optimized": "#b02a37",
    "beit_fast optimized high": "#7d1a25",
    "beit_fast triton": "#d1495b",
    "beit_fast triton compiled": "#e07a86",
    "beit_fast sdpa": "#edae49",
    "beit_fast eager": "#f3cf8f",
    "openvino": "#5b8c5a",
    "onnxruntime": "#9cbf7f",
    "transformers accelerated": "#d77a3d",
    "transformers sdpa compiled": "#00566b",
    "transformers sdpa": "#00798c",
    "transformers eager": "#6fb3bf",
    "timm compiled": "#5f4b74",
    "timm": "#8d6a9f",
}
_BAR_HEIGHT = 0.2  # inches of one baseline
_GIB = 2**30
_TRAINING_STEP = "A training step is forward, cross-entropy and all gradients."
_PRETRAINING_MODEL = (
    "One bias table for all layers, drop path 0.1, blocks of masked patches. "
    "The same weights, masks and labels for all."
)
_PRETRAINING_STEP = (
    "A pre-training step is forward, cross-entropy of masked patches, backward, clipping and fused AdamW; bf16 is "
    "autocast of fp32 weights."
)


def draw_models(results: dict[str, Any], path: Path) -> Path:
    """Draw a pair of panels for each case. A line has up to two pairs."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cases = model_panels(results["rows"])
    columns = min(2, len(cases))
    lines = [cases[start : start + columns] for start in range(0, len(cases), columns)]
    heights = [0.75 + _BAR_HEIGHT * max(len(case) for case in line) for line in lines]
    text = model_caption(results, 135 * columns)
    top, bottom = 0.45, 0.3 + 0.14 * len(text.splitlines())
    width, height = 8.2 * columns, sum(heights) + top + bottom
    figure = plt.figure(figsize=(width, height), layout="constrained")
    figure.get_layout_engine().set(
        rect=(0.008, bottom / height, 0.984, 1 - (top + bottom) / height), hspace=0.04, wspace=0.03
    )
    axes = figure.subplots(
        len(lines), 2 * columns, squeeze=False, height_ratios=heights, width_ratios=(1.35, 1) * columns
    )
    for line, drawn in zip(axes, lines, strict=True):
        for place in range(columns):
            speed, memory = line[2 * place : 2 * place + 2]
            if place < len(drawn):
                _draw_speed(speed, drawn[place])
                _draw_memory(memory, drawn[place])
            else:
                speed.set_visible(False)
                memory.set_visible(False)
    figure.suptitle("BEiT, the whole model", x=0.02, y=1 - 0.12 / height, ha="left", va="top", weight="bold")
    figure.text(0.02, 0.1 / height, text, fontsize=8, color="#444444", va="bottom")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def model_panels(rows: list[Row]) -> list[list[Row]]:
    """Collect the rows by case, fastest first; rows of several groups are merged by median."""
    panels = []
    for case in dict.fromkeys((row["case"], row["threads"]) for row in rows):
        of_case = [row for row in rows if (row["case"], row["threads"]) == case]
        names = dict.fromkeys(row["baseline"] for row in of_case)
        merged = [_merged([row for row in of_case if row["baseline"] == name]) for name in names]
        panels.append(sorted(merged, key=lambda row: row["median"]))
    return panels


def _merged(groups: list[Row]) -> Row:
    """Merge the rows of a baseline: medians of medians, and the range over all groups."""
    middle = {
        name: statistics.median(row[name] for row in groups)
        for name in ("median", "images_per_second", "loaded_memory", "peak_memory")
        if all(row[name] is not None for row in groups)
    }
    low, high = (pick(row["range"][place] for row in groups) for place, pick in ((0, min), (1, max)))
    return {**groups[0], **middle, "range": [low, high]}


def _draw_speed(axis: Any, rows: list[Row]) -> None:
    from matplotlib.ticker import MaxNLocator

    for place, row in enumerate(rows):
        speed, batch = row["images_per_second"], row["batch"]
        slowest, fastest = batch / row["range"][1], batch / row["range"][0]
        axis.barh(place, speed, color=COLORS[row["baseline"]], height=0.78)
        axis.plot([slowest, fastest], [place, place], color="#333333", linewidth=0.9)
        axis.annotate(
            f"{speed:.3g}  ({row['median'] * 1e3:.4g} ms)",
            (max(speed, fastest), place),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=7.5,
        )
    _style(axis, rows, [row["baseline"] for row in rows])
    axis.set_xlim(0, 1.45 * max(row["batch"] / row["range"][0] for row in rows))
    axis.xaxis.set_major_locator(MaxNLocator(5))
    axis.set_title(f"{subject(rows[0])}: images/s", loc="left", fontsize=10)


def _draw_memory(axis: Any, rows: list[Row]) -> None:
    from matplotlib.ticker import MaxNLocator

    known = [row for row in rows if row["peak_memory"] is not None and row["loaded_memory"] is not None]
    for place, row in enumerate(rows):
        if row not in known:
            continue
        loaded, added = row["loaded_memory"] / _GIB, row["peak_memory"] / _GIB
        axis.barh(place, loaded, color="#d5d8dc", height=0.78)
        axis.barh(place, added, left=loaded, color=COLORS[row["baseline"]], height=0.78)
        label = f"{_amount(row['loaded_memory'])} + {_amount(row['peak_memory'])}"
        axis.annotate(
            label, (loaded + added, place), xytext=(4, 0), textcoords="offset points", va="center", fontsize=7.5
        )
    _style(axis, rows, [""] * len(rows))
    if known:
        most = max(row["loaded_memory"] + row["peak_memory"] for row in known) / _GIB
        axis.set_xlim(0, 1.75 * most)
        axis.xaxis.set_major_locator(MaxNLocator(4))
        axis.set_title("memory, GiB: loaded + added", loc="left", fontsize=10)
    else:
        axis.set_title("memory is not measured on this device", loc="left", fontsize=10, color="#666666")


def _amount(count: int) -> str:
    return f"{count / _GIB:.2f} GiB" if count >= _GIB else f"{count / 2**20:.0f} MiB"


def _style(axis: Any, rows: list[Row], labels: list[str]) -> None:
    axis.set_yticks(range(len(rows)), labels, fontsize=8.5)
    axis.set_ylim(len(rows) - 0.4, -0.6)
    axis.tick_params(axis="y", length=0)
    axis.tick_params(axis="x", labelsize=7.5)
    for label, row in zip(axis.get_yticklabels(), rows, strict=True):
        label.set_fontweight(
            "bold" if row["baseline"].startswith("beit_fast") or row["baseline"].endswith("accelerated") else "normal"
        )
    axis.grid(axis="x", color="#e3e3e3", linewidth=0.7)
    axis.set_axisbelow(True)
    axis.spines[["top", "right", "left"]].set_visible(False)


def subject(row: Row) -> str:
    """Format a case: `inference, base 224, B=1, fp32`."""
    mode = "training step" if row["mode"] == "training" else row["mode"]
    return f"{mode}, {row['model']} {row['image']}, B={row['batch']}, {row['dtype']}"


def model_caption(results: dict[str, Any], width: int) -> str:
    """Describe device, threads, versions, commit, missing baselines and the timed function."""
    conditions, rows = results["conditions"], results["rows"]
    threads = sorted({row["threads"] for row in rows})
    gpu = conditions.get("gpu") or {}
    where = (
        f"driver {gpu['driver_version']}" if gpu.get("driver_version") else f"threads {', '.join(map(str, threads))}"
    )
    named = ("onnxruntime", "openvino", "timm")
    versions = sorted({row["kernel"].partition(",")[0] for row in rows if row["baseline"] in named})
    parts = [
        conditions["device_name"],
        where,
        *(f"{name} {conditions[name]}" for name in ("torch", "triton", "transformers") if conditions.get(name)),
        *versions,
        f"beit_fast {conditions['beit_fast']} ({conditions['commit'] or 'no commit'})",
        f"{results['date']}",
        f"{min(row['rounds'] for row in rows)} rounds",
    ]
    pretraining = rows[0]["mode"] == PRETRAINING
    meanings = (
        f"{_PRETRAINING_MODEL if pretraining else 'A bias table in each layer and the same weights for all.'} "
        "Results are checked before they are timed. "
        "Each baseline runs in its own process, in turns. Bars are medians, lines show the slowest and the fastest "
        f"round. {_PRETRAINING_STEP if pretraining else _TRAINING_STEP} Memory: what the process holds between "
        "calls, including libraries, plus the peak of one call; runtimes that keep their buffers add little."
    )
    left_out = [
        f"{entry['baseline']}: {entry['reason']} ({', '.join(entry['cases'][:3])}{', ...' * (len(entry['cases']) > 3)})"
        for entry in results["left_out"]
    ]
    lines = ["; ".join(parts) + ".", meanings, *([f"Left out: {'; '.join(left_out)}."] if left_out else [])]
    return "\n".join(part for line in lines for part in textwrap.wrap(line, width))
