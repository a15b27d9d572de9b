"""Races in processes: every peer is right, who is wrong has no time, and targets and pictures read the rows."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from PIL import Image

from ..support.benchmarks import benchmark_house, run_in_a_copy


@pytest.fixture(scope="module")
def house() -> Iterator[ModuleType]:
    with benchmark_house() as module:
        yield module


@pytest.mark.parametrize("full", [False, True])
def test_every_race_names_itself_once(house: ModuleType, full: bool) -> None:
    races = house.bench_cpu_attention.races(full)
    names = [house.bench_cpu_attention.race_name(*race) for race in races]
    assert len(set(names)) == len(names) > 0


def test_a_full_run_has_all_that_the_targets_ask_for(house: ModuleType) -> None:
    races = {
        (case.mode, house.harness.cases.DTYPE_NAMES[case.dtype], case.batch, case.tokens, threads)
        for case, threads in house.bench_cpu_attention.races(full=True)
    }
    for threads in (1, 2):
        for dtype in ("fp32", "bf16", "fp16"):
            assert {("forward", dtype, 1, tokens, threads) for tokens in (197, 577, 1025, 1601)} < races
            assert ("forward", dtype, 8, 197, threads) in races
        assert {("training", "fp32", 1, tokens, threads) for tokens in (577, 1025)} < races
    assert ("training", "fp32", 1, 1601, 1) in races
    names = {peer.name for peer in house.baselines.attention.PEERS}
    assert set().union(*house.bench_cpu_attention.RACING.values()) <= names


def prepare(house: ModuleType, folder: Path, mode: str, peer: str, dtype: str = "fp32", shift: float = 0.0) -> Any:
    """A peer's step on a small case, against a reference whose output is moved by `shift`."""
    bench = house.bench_cpu_attention
    case = house.harness.cases.Case(mode, 2, (3, 3), bench.DTYPES[dtype], "cpu", heads=2, head_dim=8)
    biased = peer != bench.LIMIT
    reference = house.harness.cases.reference(case, biased)
    moved = {**reference.results, "out": reference.results["out"] + shift}
    torch.save({"results": moved, "budgets": reference.budgets}, folder / "reference.pt")
    return bench.prepare(peer=peer, expected=str(folder / "reference.pt"), **json.loads(json.dumps(bench._plain(case))))


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("mode", ["forward", "training"])
def test_every_peer_of_a_race_is_right(house: ModuleType, tmp_path: Path, mode: str, dtype: str) -> None:
    for peer in house.bench_cpu_attention.RACING[mode]:
        prepared = prepare(house, tmp_path, mode, peer, dtype)
        assert prepared.step() is not None
        gradients = {"q", "k", "v"} | ({"table"} if prepared.facts["biased"] else set())
        assert set(prepared.facts["errors"]) == {"out"} | (gradients if mode == "training" else set())
        assert prepared.facts["kernel"]


def test_a_peer_that_is_wrong_is_refused(house: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"wrong and not timed\. out: relative error"):
        prepare(house, tmp_path, "forward", "beit_fast triton", shift=0.01)


PROBE = """
from .harness.processes import Entrant, Prepared

def prepare(name, error):
    if error > 1:
        raise ValueError(f"wrong and not timed. out: relative error {error:.2e}")
    return Prepared(lambda: sum(range(1000)), {"kernel": "probe", "errors": {"out": error}})

def entrants(*errors):
    return [Entrant(f"peer {error}", prepare, {"name": "probe", "error": error}) for error in errors]

FACTS = {"dtype": "fp32", "batch": 1, "flops": 2000}

def test_right(race_apart):
    race_apart("probing", "first", 1, entrants(0.25), FACTS, {"peer 9": "stayed at home"})

def test_wrong(race_apart):
    race_apart("probing", "second", 1, entrants(2.0, 0.5), FACTS)
"""


def test_rows_of_a_race_and_who_has_none(house: ModuleType, tmp_path: Path) -> None:
    done = run_in_a_copy(tmp_path, PROBE, "--rows=rows.jsonl")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "1 failed, 1 skipped" in done.stdout
    assert "peer 2.0: ValueError: wrong and not timed. out: relative error 2.00e+00" in done.stdout
    assert "peer 9: stayed at home" in done.stdout
    results = house.harness.results.read_results(tmp_path / "rows.jsonl")
    rows = {row["peer"]: row for row in results["rows"]}
    assert set(rows) == {"peer 0.25", "peer 0.5"}
    for row in rows.values():
        assert (row["bench"], row["threads"], row["kernel"], row["dtype"]) == ("probing", 1, "probe", "fp32")
        assert row["rounds"] >= 7
        assert row["tflops"] == pytest.approx(2000 / row["median"] / 1e12, rel=1e-2)
        assert row["peer"] in done.stdout
    left_out = [(entry["peer"], entry["cases"], entry["bench"]) for entry in results["left_out"]]
    assert left_out == [("peer 9", ["first"], "probing"), ("peer 2.0", ["second"], "probing")]


def cpu_row(mode: str, tokens: int, threads: int, peer: str, speed: float, dtype: str = "fp32") -> dict[str, Any]:
    """A row whose median is `1 / speed` of what one textbook call might take, with memory of as many MiB."""
    median = tokens**2 * 1e-8 / threads / speed
    side = math.isqrt(tokens - 1)
    return {
        **{"bench": "cpu attention", "threads": threads, "case": f"{mode}-1x{tokens}-{dtype}-{threads}"},
        **{"mode": mode, "batch": 1, "tokens": tokens, "window": [side, side], "heads": 12, "head_dim": 64},
        **{"dtype": dtype, "peer": peer, "kernel": "a kernel", "biased": True, "learnable": "prebuilt" not in peer},
        **{"median": median, "iqr": 0.0, "rounds": 9, "iterations": 1, "errors": {"out": 1e-7}},
        **{"flops": 10, "tflops": 10 / median / 1e12, "peak_memory": int(2**20 * 40 / speed)},
    }


def cpu_results() -> dict[str, Any]:
    conditions = {
        **{"device": "cpu", "device_name": "AMD EPYC 9B14 96-Core Processor", "threads": 2, "commit": "0123abc"},
        **{"torch": "2.13.0+cpu", "triton": None, "transformers": "5.23.0", "beit_fast": "0.1.0"},
    }
    rows = [
        cpu_row("forward", tokens, threads, peer, speed, dtype)
        for dtype in ("bf16", "fp32")
        for tokens in (197, 577, 1025, 1601)
        for threads in (1, 2)
        for peer, speed in (("beit_fast triton", 2.5), ("sdpa prebuilt bias", 1.0), ("transformers sdpa", 0.5))
    ]
    rows += [
        cpu_row("training", tokens, threads, peer, speed)
        for tokens, counts in ((577, (1, 2)), (1025, (1, 2)), (1601, (1,)))
        for threads in counts
        for peer, speed in (("beit_fast triton", 5.0), ("beit_fast sdpa", 1.25), ("transformers sdpa", 1.0))
    ]
    left_out = [{"peer": "x", "reason": "why", "cases": ["y"], "bench": "cpu attention"}]
    return {"conditions": conditions, "date": "2026-02-03", "rows": rows, "left_out": left_out}


def test_targets_of_a_cpu(house: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = cpu_results()
    by_target: dict[str, list[Any]] = {}
    for verdict in house.report.targets.judge(results):
        if verdict.target.bench != house.bench_cpu_attention.BENCH:
            continue
        by_target.setdefault(verdict.target.text, []).append(verdict)
    ready, gathered, bf16, training, memory = by_target.values()
    for verdicts, ratio, met in ((ready, 2.5, True), (gathered, 5.0, True), (bf16, 2.5, False)):
        assert [verdict.met for verdict in verdicts] == [met] * 8
        assert [verdict.ratio for verdict in verdicts] == pytest.approx([ratio] * 8)
    assert [(verdict.ratio, verdict.against) for verdict in training] == [(4.0, "beit_fast sdpa")] * 4
    assert [(verdict.case, verdict.met) for verdict in memory] == [("1x1601 fp32, threads 1", False)]
    house.harness.results.write_results(results, tmp_path / "run.json")
    assert house.report.targets.main([str(tmp_path / "run.json")]) == 0
    text = capsys.readouterr().out
    assert "fp32 forward 2.2x SDPA with a ready mask: met at 8 of 8 (ratio needed 2.20)" in text
    assert "forward + backward memory under a tenth of SDPA's: met at 0 of 1 (ratio needed 10.00)" in text
    assert "flash" not in text


def test_each_bench_has_its_own_results_and_picture(house: ModuleType, tmp_path: Path) -> None:
    results = cpu_results()
    attention = [
        {**row, "queued_ahead": None, "clock": "idle to idle"} for row in results["rows"] if row["threads"] == 2
    ]
    for row in attention:
        del row["bench"], row["threads"]
    results["rows"] = attention + results["rows"]
    house.harness.results.write_results(results, tmp_path / "run.json")
    assert house.report.plot.main([str(tmp_path / "run.json"), "--results", str(tmp_path / "results")]) == 0
    names = ("amd-epyc-9b14-cpu-2-threads", "amd-epyc-9b14-cpu-attention")
    kept = {name: house.harness.results.read_results(tmp_path / "results" / f"{name}.json") for name in names}
    assert [len(one["rows"]) for one in kept.values()] == [len(attention), len(results["rows"]) - len(attention)]
    assert [len(one["left_out"]) for one in kept.values()] == [0, 1]
    for name in names:
        with Image.open(tmp_path / "results" / f"{name}.png") as picture:
            assert len(picture.getcolors(1 << 24) or []) > 50
    lines = house.report.plot.panels_of(kept[names[1]]["rows"])
    subjects = [[house.report.plot._subject(panel) for panel in panels] for panels in lines]
    assert subjects == [
        [f"{kind}, threads {threads}" for threads in (1, 2)]
        for kind in ("forward, one image, bf16", "forward, one image, fp32", "training, one image, fp32")
    ]
    caption = " ".join(house.report.plot.caption(kept[names[1]], lines[0]).split())
    assert "Each peer in a process of its own" in caption
    assert "CPU threads" not in caption
