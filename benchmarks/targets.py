"""What has to be reached, on a GPU and on a CPU, met or missed: `python -m benchmarks.targets results.json`.

Reads a results file, a log of rows or pytest-benchmark's JSON. A ratio is theirs over ours: 2 is twice as fast.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .rows import ATTENTION, Row, read_results

OURS = "beit_fast triton"


@dataclass(frozen=True)
class Target:
    """`theirs[quantity] / ours[quantity]` has to be at least `needed`, wherever ours was measured.

    against: whether a row takes part; the one with the smallest quantity counts.
    where: the cases that it is asked of; unless given, those in 16 bits.
    peer: whose reason for staying away is told where nobody takes part, if it is one peer.
    device, bench, ours: which rows it is about, and which of them are ours.
    """

    text: str
    mode: str
    needed: float
    against: Callable[[Row], bool]
    quantity: str = "median"
    where: Callable[[Row], bool] = lambda row: row["dtype"] != "fp32"
    peer: str | None = None
    device: str = "cuda"
    bench: str = ATTENTION
    ours: str = OURS


def _named(name: str) -> Callable[[Row], bool]:
    return lambda row: row["peer"] == name


def _learnable(row: Row) -> bool:
    return bool(row["learnable"]) and row["peer"] != OURS


def _learnable_sdpa(row: Row) -> bool:
    return _learnable(row) and "sdpa" in row["peer"]


_FLASH = "sdpa without bias flash"
_READY_EFFICIENT = "sdpa prebuilt bias efficient"
_READY_CUDNN = "sdpa prebuilt bias cudnn"
_READY = "sdpa prebuilt bias"
_GATHERED = "transformers sdpa"
_ON_CPU: dict[str, Any] = {"device": "cpu", "bench": "cpu attention"}
_PATCHES = "beit_fast fused"
_OF_PATCHES: dict[str, Any] = {"device": "cpu", "bench": "cpu patch embedding", "ours": _PATCHES}

TARGETS = (
    Target("forward no slower than SDPA flash without bias", "forward", 1.0, _named(_FLASH), peer=_FLASH),
    Target("forward 1.5x the best path whose bias can be learned", "forward", 1.5, _learnable),
    Target(
        "forward 1.5x memory-efficient SDPA with a ready mask",
        "forward",
        1.5,
        _named(_READY_EFFICIENT),
        peer=_READY_EFFICIENT,
    ),
    Target(
        "forward no slower than cuDNN with a ready, frozen mask",
        "forward",
        1.0,
        _named(_READY_CUDNN),
        peer=_READY_CUDNN,
    ),
    Target("forward + backward with the table 3x the best peer", "training", 3.0, _learnable),
    Target(
        "forward + backward memory at most 0.3x SDPA's",
        "training",
        1 / 0.3,
        _learnable_sdpa,
        quantity="peak_memory",
        where=lambda row: (row["batch"], row["tokens"], row["dtype"]) == (8, 1601, "bf16"),
    ),
    Target(
        "fp32 forward 2.2x SDPA with a ready mask",
        "forward",
        2.2,
        _named(_READY),
        where=lambda row: row["dtype"] == "fp32",
        peer=_READY,
        **_ON_CPU,
    ),
    Target(
        "fp32 forward 3.5x SDPA with the gather that Transformers does in each layer",
        "forward",
        3.5,
        _named(_GATHERED),
        where=lambda row: row["dtype"] == "fp32",
        peer=_GATHERED,
        **_ON_CPU,
    ),
    Target(
        "bf16 forward 3x SDPA in bf16 with a ready mask",
        "forward",
        3.0,
        _named(_READY),
        where=lambda row: row["dtype"] == "bf16",
        peer=_READY,
        **_ON_CPU,
    ),
    Target(
        "forward + backward with the table 3x SDPA's",
        "training",
        3.0,
        _learnable_sdpa,
        where=lambda row: row["tokens"] in (577, 1025),
        **_ON_CPU,
    ),
    Target(
        "forward + backward memory under a tenth of SDPA's",
        "training",
        10.0,
        _learnable_sdpa,
        quantity="peak_memory",
        where=lambda row: row["tokens"] == 1601,
        **_ON_CPU,
    ),
    Target(
        "patch embedding 0.97x the best of conv, conv channels_last and unfold + linear",
        "float pixels",
        0.97,
        lambda row: row["peer"] != _PATCHES,
        where=lambda row: row["dtype"] in ("fp32", "bf16"),
        **_OF_PATCHES,
    ),
    Target(
        "patch embedding faster than the best of them, in most cases",
        "float pixels",
        1.0,
        lambda row: row["peer"] != _PATCHES,
        where=lambda row: row["dtype"] in ("fp32", "bf16"),
        **_OF_PATCHES,
    ),
    Target(
        "patch embedding of bytes 1.3x normalise + conv + cat + add",
        "uint8 pixels",
        1.3,
        _named("normalise + conv"),
        where=lambda row: row["dtype"] in ("fp32", "bf16"),
        peer="normalise + conv",
        **_OF_PATCHES,
    ),
)


@dataclass(frozen=True)
class Verdict:
    """One target at one case: ours beside the best of theirs, or `missing` where there is nothing to compare with.

    waited: in one of the two the device waited for the host, so that the ratio is not the devices' alone.
    """

    target: Target
    case: str
    ours: float | None = None
    theirs: float | None = None
    against: str = ""
    missing: str = ""
    waited: bool = False

    @property
    def ratio(self) -> float | None:
        return self.theirs / self.ours if self.ours and self.theirs else None

    @property
    def met(self) -> bool | None:
        """None where it could not be judged."""
        return None if self.ratio is None else self.ratio >= self.target.needed


def judge(results: dict[str, Any]) -> list[Verdict]:
    """Every target of the device at every case that it is asked of; one without measurement of ours says so."""
    verdicts = []
    for target in TARGETS:
        if target.device != results["conditions"]["device"]:
            continue
        of_bench = [row for row in results["rows"] if row.get("bench", ATTENTION) == target.bench]
        rows = [row for row in of_bench if row["mode"] == target.mode]
        ours = [row for row in rows if row["peer"] == target.ours and target.where(row)]
        ours.sort(key=lambda row: (row["dtype"], row["batch"] == 1, row["tokens"], row.get("threads", 0)))
        verdicts += [_verdict(target, row, rows, results) for row in ours]
        if not ours:
            verdicts.append(Verdict(target, "-", missing=f"{target.ours} was not measured"))
    return verdicts


def _verdict(target: Target, ours: Row, rows: list[Row], results: dict[str, Any]) -> Verdict:
    case = _case(ours)
    value = ours[target.quantity]
    if value is None:
        return Verdict(target, case, missing="not measured on this device")
    theirs = [row for row in rows if _case(row) == case and target.against(row) and row[target.quantity]]
    if not theirs:
        return Verdict(target, case, value, missing=_reason(target, ours, results))
    best = min(theirs, key=lambda row: row[target.quantity])
    waited = target.quantity == "median" and any(row.get("queued_ahead") is False for row in (ours, best))
    return Verdict(target, case, value, best[target.quantity], best["peer"], waited=waited)


def _case(row: Row) -> str:
    threads = f", threads {row['threads']}" if "threads" in row else ""
    return f"{row['batch']}x{row['tokens']} {row['dtype']}{threads}"


def _reason(target: Target, ours: Row, results: dict[str, Any]) -> str:
    name = ours["case"] if "bench" in ours else f"{ours['mode']}-{ours['batch']}x{ours['tokens']}-{ours['dtype']}"
    for entry in results.get("left_out", []):
        if entry["peer"] == target.peer and name in entry["cases"]:
            return f"{target.peer}: {entry['reason']}"
    return f"{target.peer or 'no peer'} was not measured"


def table(verdicts: list[Verdict]) -> str:
    """The verdicts as text, by target, with the count of those met."""
    lines = []
    for text in dict.fromkeys(verdict.target.text for verdict in verdicts):
        group = [verdict for verdict in verdicts if verdict.target.text == text]
        judged = [verdict for verdict in group if verdict.met is not None]
        met = sum(bool(verdict.met) for verdict in judged)
        state = f"met at {met} of {len(judged)}" if judged else "not judged"
        lines += ["", f"{text}: {state} (ratio needed {group[0].target.needed:.2f})"]
        width = 2 + max(12, *(len(verdict.case) for verdict in group))
        lines += [_line(verdict, width) for verdict in group]
    return "\n".join(lines[1:])


def _line(verdict: Verdict, width: int) -> str:
    if verdict.ratio is None or verdict.ours is None or verdict.theirs is None:
        return f"  {verdict.case:{width}}not compared: {verdict.missing}"
    quantity, needed = verdict.target.quantity, verdict.target.needed
    result = "met" if verdict.met else f"MISSED, {100 * (1 - verdict.ratio / needed):.1f} % less is needed"
    ours, theirs = _amount(verdict.ours, quantity), _amount(verdict.theirs, quantity)
    against = verdict.against + (", the device waited for the host" if verdict.waited else "")
    return f"  {verdict.case:{width}}{ours:>11} against {theirs:>11}  ratio {verdict.ratio:5.2f}  {result}  ({against})"


def _amount(value: float, quantity: str) -> str:
    return f"{value * 1e3:.4g} ms" if quantity == "median" else f"{value / 2**20:.4g} MiB"


def main(arguments: list[str] | None = None) -> int:
    """Print the table; 0 whatever it says, or 2 where the file cannot be used."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.targets", description="Compare results with the targets."
    )
    parser.add_argument("results", type=Path, help="a results file, a .jsonl of `--rows`, or pytest-benchmark's JSON")
    options = parser.parse_args(arguments)
    try:
        results = read_results(options.results)
        verdicts = judge(results)
    except (OSError, ValueError, KeyError) as error:
        reason = f"{options.results}: its rows have no {error}" if isinstance(error, KeyError) else str(error)
        print(f"targets.py: {reason}", file=sys.stderr)
        return 2
    conditions = results["conditions"]
    print(f"{conditions['device_name']}, torch {conditions['torch']}, commit {conditions['commit'] or 'unknown'}")
    print(table(verdicts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
