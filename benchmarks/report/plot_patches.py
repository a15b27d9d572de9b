"""Draw patch embedding: a panel for each kind of pixels and dtype, with bars for each batch and thread count."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

from ..harness.results import Row

COLORS = {  # by baseline
    "beit_fast fused": "#d1495b",
    "conv": "#30638e",
    "conv channels_last": "#00798c",
    "unfold + linear": "#edae49",
    "normalize + conv": "#8d6a9f",
}


def draw_patches(results: dict[str, Any], path: Path) -> Path:
    """Draw the speed of every baseline."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = patch_panels(results["rows"])
    columns = max(len(line) for line in panels)
    width, height = 5.75 * columns, 3.1 * len(panels) + 1.5
    figure, axes = plt.subplots(len(panels), columns, figsize=(width, height), squeeze=False)
    handles: dict[str, Any] = {}
    for line, drawn in zip(axes, panels, strict=True):
        for axis in line[len(drawn) :]:
            axis.set_visible(False)
        for axis, rows in zip(line, drawn, strict=False):
            handles.update(_draw_panel(axis, rows))
    figure.suptitle("From pixels to tokens", x=0.02, y=1 - 0.12 / height, ha="left", weight="bold")
    figure.legend(
        list(handles.values()), list(handles), loc="upper left", ncols=len(handles), frameon=False, fontsize=9,
        bbox_to_anchor=(0.015, 1 - 0.36 / height), columnspacing=1.4,
    )  # fmt: skip
    text = patch_caption(results, 85 * columns)
    figure.text(0.02, 0.1 / height, text, fontsize=8, color="#444444", va="bottom")
    bottom = 0.25 + 0.14 * len(text.splitlines())
    figure.tight_layout(rect=(0, bottom / height, 1, 1 - 0.65 / height), h_pad=1.6, w_pad=2.5)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


def patch_panels(rows: list[Row]) -> list[list[list[Row]]]:
    """Split rows by mode, and then by dtype."""
    modes = sorted({row["mode"] for row in rows})
    by_mode = [[row for row in rows if row["mode"] == mode] for mode in modes]
    return [
        [[row for row in group if row["dtype"] == dtype] for dtype in sorted({row["dtype"] for row in group})]
        for group in by_mode
    ]


def _draw_panel(axis: Any, rows: list[Row]) -> dict[str, Any]:
    runs = sorted({(row["batch"], row["threads"]) for row in rows})
    baselines = sorted({row["baseline"] for row in rows}, key=lambda baseline: (list(COLORS).index(baseline), baseline))
    handles = {}
    for place, baseline in enumerate(baselines):
        speeds = {(row["batch"], row["threads"]): 1e3 * row["tflops"] for row in rows if row["baseline"] == baseline}
        left = [group + (place + 0.5) / (len(baselines) + 1) for group in range(len(runs))]
        known = [speeds.get(run, 0.0) for run in runs]
        handles[baseline] = axis.bar(left, known, width=0.9 / (len(baselines) + 1), color=COLORS[baseline])
    axis.set_title(f"{rows[0]['mode']}, {rows[0]['dtype']}", loc="left", fontsize=10)
    axis.set_ylabel("GFLOP/s (higher is better)")
    middle = 0.5 * len(baselines) / (len(baselines) + 1)
    axis.set_xticks([group + middle for group in range(len(runs))], [f"B={b}\nthreads {t}" for b, t in runs])
    axis.grid(axis="y", color="#e3e3e3", linewidth=0.7)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    return handles


def patch_caption(results: dict[str, Any], width: int) -> str:
    """Describe device, versions, commit, shape and the timed function."""
    conditions, row = results["conditions"], results["rows"][0]
    kernels = sorted({row["kernel"] for row in results["rows"] if row["baseline"] == "beit_fast fused"})
    parts = [
        conditions["device_name"],
        f"torch {conditions['torch']}",
        f"beit_fast {conditions['beit_fast']} ({conditions['commit'] or 'no commit'})",
        f"{results['date']}",
        f"{row['channels']}x{row['image']}x{row['image']} pixels, patches of {row['patch']}, E={row['embed']}",
        *([f"beit_fast fused ran {', '.join(kernels)}"] if kernels else []),
    ]
    meanings = (
        "Timed from pixels to tokens: projection and CLS; for uint8 pixels also normalization and positions. "
        "Speed counts the projection only. Each baseline runs in its own process, in turns. The pixels and the weight "
        "of 'conv channels_last' are converted before the clock starts."
    )
    return "\n".join([*textwrap.wrap("; ".join(parts) + ".", width), *textwrap.wrap(meanings, width)])
