"""The rows of a run: a log that a killed run resumes from, and the summary of all seeds."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

Row = dict[str, Any]
ARMS = ("pre-trained", "from scratch")


class RowFile:
    """Rows of one run in JSON lines; the first line holds the recipe.

    Args:
        path: The file. An existing one is continued.
        recipe: The numbers of the run, which JSON can hold.

    Raises:
        ValueError: If the file holds rows of another recipe.
    """

    def __init__(self, path: Path, recipe: Row) -> None:
        self.path = path
        self.rows: list[Row] = []
        recipe = json.loads(json.dumps(recipe))  # tuples are lists in a file
        lines = path.read_text().splitlines() if path.exists() else []
        if not lines:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"recipe": recipe}) + "\n")
            return
        found = json.loads(lines[0])["recipe"]
        if found != recipe:
            names = sorted(name for name in found.keys() | recipe.keys() if found.get(name) != recipe.get(name))
            raise ValueError(
                f"{path} has rows of another recipe: {', '.join(names)} differ (expected the same recipe, or another "
                "--work folder)"
            )
        self.rows = [row for line in lines[1:] if (row := _parse(line)) is not None]
        text = "".join(json.dumps(entry) + "\n" for entry in [{"recipe": recipe}, *self.rows])
        path.write_text(text)  # without the part of a line that a kill left

    def find(self, **key: Any) -> Row | None:
        """Return the row whose fields are those of `key`, or None."""
        return next((row for row in self.rows if all(row.get(name) == value for name, value in key.items())), None)

    def add(self, row: Row) -> Row:
        """Append a row to the file at once."""
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        self.rows.append(row)
        return row


def _parse(line: str) -> Row | None:
    try:
        row: Row = json.loads(line)
    except json.JSONDecodeError:
        return None
    return row


def best(validation: dict[str, float]) -> str:
    """Return the choice of the highest validation accuracy; the first of equal ones."""
    return max(validation, key=lambda name: validation[name])


def spread(values: list[float]) -> Row:
    """Return mean, sample standard deviation and number of values."""
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "std": deviation, "n": len(values), "values": values}


def summarize(rows: list[Row]) -> Row:
    """Summarize complete seeds.

    Returns:
        `fine_tuning`: for each number of steps and labels, test accuracy of both arms, their difference within a seed
        and the seeds that pre-training wins. `frozen`: for each arm, test accuracy of each probe.
    """
    fine_tuning = []
    cases = sorted({(row["steps"], row["labels_per_class"]) for row in rows if row["kind"] == "fine_tuning"})
    for steps, labels in cases:
        scores = {
            arm: {
                row["seed"]: row["test"]
                for row in rows
                if (row["kind"], row.get("arm"), row.get("steps"), row.get("labels_per_class"))
                == ("fine_tuning", arm, steps, labels)
            }
            for arm in ARMS
        }
        seeds = sorted(scores[ARMS[0]].keys() & scores[ARMS[1]].keys())
        if not seeds:
            continue
        gains = [scores[ARMS[0]][seed] - scores[ARMS[1]][seed] for seed in seeds]
        fine_tuning.append(
            {"steps": steps, "labels_per_class": labels, "seeds": seeds}
            | {arm: spread([scores[arm][seed] for seed in seeds]) for arm in ARMS}
            | {"gain": spread(gains), "wins": sum(gain > 0 for gain in gains)}
        )
    frozen = [row for row in rows if row["kind"] == "frozen"]
    probes = sorted({(row["features"], row["probe"]) for row in frozen})
    return {
        "fine_tuning": fine_tuning,
        "frozen": [
            {"features": features, "probe": name}
            | spread([row["test"] for row in frozen if (row["features"], row["probe"]) == (features, name)])
            for features, name in probes
        ],
    }
