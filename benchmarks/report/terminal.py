"""The table of a run for the terminal."""

from __future__ import annotations

from ..harness.results import Row

_HEAD = (
    f"{'baseline':48}{'kernel':24}{'median ms':>12}{'iqr ms':>9}{'1 call ms':>11}{'TFLOP/s':>9}{'images/s':>10}"
    f"{'peak MiB':>10}{'worst error':>13}"
)


def tables(rows: list[Row]) -> dict[str, list[str]]:
    """Lines of the table of each case, fastest baseline first."""
    cases = dict.fromkeys(row["case"] for row in rows)
    by_case = {case: [row for row in rows if row["case"] == case] for case in cases}
    return {case: [_HEAD, *map(_line, sorted(of_case, key=_median))] for case, of_case in by_case.items()}


def _median(row: Row) -> float:
    return row["median"]


def _line(row: Row) -> str:
    memory = "-" if row["peak_memory"] is None else f"{row['peak_memory'] / 2**20:.1f}"
    single = f"{row['single_call'] * 1e3:.3f}" if row.get("single_call") is not None else "-"
    name = row["baseline"] if row.get("biased", True) else row["baseline"] + " (another result)"
    waited = "*" if row.get("queued_ahead") is False else " "
    speed = f"{row['tflops']:.3f}" if "tflops" in row else "-"
    images = f"{row['images_per_second']:.1f}" if "images_per_second" in row else "-"
    return (
        f"{name:48}{row['kernel']:24}{row['median'] * 1e3:11.3f}{waited}{row['iqr'] * 1e3:9.3f}{single:>11}"
        f"{speed:>9}{images:>10}{memory:>10}{max(row['errors'].values()):13.1e}"
    )
