"""Draw the picture of the README: time and memory of one image against its size.

    python -m benchmarks.report.plot_image_size benchmarks/results/intel-xeon-cpu-models.json --out benchmarks/results

Reads a results file of whole models and writes `<name of the file>-image-size.png`, as `benchmarks.report.plot` does.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from pathlib import Path
from typing import Any

from ..harness.results import Row, read_results
from .plot_models import COLORS, model_panels

LABELS = {
    "beit_fast optimized": "beit_fast optimized",
    "beit_fast triton": "beit_fast",
    "openvino": "OpenVINO",
    "timm": "timm",
    "transformers sdpa": "Transformers (sdpa)",
}
_MIB = 2**20


def main(arguments: list[str] | None = None) -> int:
    """Write the picture and print its path."""
    parser = argparse.ArgumentParser(description="Draw time and memory of one image against its size.")
    parser.add_argument("results", type=Path, help="results file of whole models")
    parser.add_argument("--out", type=Path, default=Path(), metavar="FOLDER", help="where to write it (default: here)")
    parser.add_argument("--dtype", default="fp32", help="default: fp32")
    options = parser.parse_args(arguments)
    path = options.out / f"{options.results.stem}-image-size.png"
    print(draw_image_sizes(read_results(options.results), path, options.dtype))
    return 0


def draw_image_sizes(results: dict[str, Any], path: Path, dtype: str = "fp32") -> Path:
    """Draw milliseconds and mebibytes of a forward of one image. Each baseline has a line."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = _panels(results, dtype)
    lines = {name: [row for panel in panels for row in panel if row["baseline"] == name] for name in LABELS}
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2))
    for axis, quantity in zip(axes, (_milliseconds, _mebibytes), strict=True):
        _draw(axis, {name: [(row["image"], quantity(row)) for row in rows] for name, rows in lines.items()})
    axes[0].set_title("time of one image, ms (lower is better)", loc="left", fontsize=11)
    axes[1].set_title("peak memory of the process, MiB (lower is better)", loc="left", fontsize=11)
    figure.text(0.015, 0.02, _caption(results, panels), fontsize=8, color="#444444", va="bottom")
    figure.tight_layout(rect=(0, 0.13, 1, 1), w_pad=3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def has_image_sizes(results: dict[str, Any], dtype: str = "fp32") -> bool:
    """Whether the rows have at least two image sizes to draw."""
    return len(_panels(results, dtype)) > 1


def _panels(results: dict[str, Any], dtype: str) -> list[list[Row]]:
    return [panel for panel in model_panels(results["rows"]) if _is_drawn(panel[0], dtype)]


def _is_drawn(row: Row, dtype: str) -> bool:
    return (row["mode"], row["model"], row["batch"], row["dtype"]) == ("inference", "base", 1, dtype)


def _milliseconds(row: Row) -> float:
    return row["median"] * 1e3


def _mebibytes(row: Row) -> float:
    return (row["loaded_memory"] + row["peak_memory"]) / _MIB


def _draw(axis: Any, lines: dict[str, list[tuple[int, float]]]) -> None:
    sizes = sorted({size for points in lines.values() for size, _ in points})
    highest = max(value for points in lines.values() for _, value in points)
    ends = {name: points[-1][1] for name, points in lines.items() if points}
    heights = _spread(ends, 0.075 * highest)
    for name, points in lines.items():
        ours = name.startswith("beit_fast")
        axis.plot(*zip(*points, strict=True), color=COLORS[name], marker="o", linewidth=2.4 if ours else 1.5)
        axis.annotate(
            f"{LABELS[name]}  {ends[name]:,.0f}", (sizes[-1] + 18, heights[name]), color=COLORS[name], fontsize=9,
            va="center", weight="bold" if ours else "normal", annotation_clip=False,
        )  # fmt: skip
    axis.set_xticks(sizes, [f"{size} px" for size in sizes])
    axis.set_xlim(sizes[0] - 20, sizes[-1] + 0.7 * (sizes[-1] - sizes[0]))
    axis.spines["bottom"].set_bounds(sizes[0] - 20, sizes[-1])
    axis.set_ylim(0, 1.06 * highest)
    axis.hlines(axis.get_yticks()[1:-1], sizes[0] - 20, sizes[-1], color="#e3e3e3", linewidth=0.7, zorder=0)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=9)


def _spread(ends: dict[str, float], distance: float) -> dict[str, float]:
    """Move label heights up until they are at least `distance` apart."""
    heights: dict[str, float] = {}
    lowest = float("-inf")
    for name in sorted(ends, key=lambda one: ends[one]):
        lowest = max(ends[name], lowest + distance)
        heights[name] = lowest
    return heights


def _caption(results: dict[str, Any], panels: list[list[Row]]) -> str:
    conditions, row = results["conditions"], panels[0][0]
    versions = sorted(
        {
            row["kernel"].partition(",")[0]
            for panel in panels
            for row in panel
            if row["baseline"] in ("openvino", "timm")
        }
    )
    parts = [
        f"BEiT-{row['model']}, {row['dtype']}, one image, a bias table in each layer; {conditions['device_name']}",
        f"{row['threads']} threads",
        *(f"{name} {conditions[name]}" for name in ("torch", "transformers") if conditions.get(name)),
        *versions,
        f"beit_fast {conditions['beit_fast']} ({conditions['commit'] or 'no commit'})",
        f"{results['date']}",
    ]
    meaning = "Medians. Memory: what the process holds between calls, including libraries, plus the peak of one call."
    return "\n".join([*textwrap.wrap("; ".join(parts) + ".", 175), meaning])


if __name__ == "__main__":
    sys.exit(main())
