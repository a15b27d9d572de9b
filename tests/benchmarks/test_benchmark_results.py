"""What the benchmark house keeps: rows in files, the picture, and the targets judged from them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from PIL import Image

from ..support.benchmarks import benchmark_house


@pytest.fixture(scope="module")
def house() -> Iterator[ModuleType]:
    with benchmark_house() as module:
        yield module


def test_a_log_of_rows_survives_a_killed_run(house: ModuleType, tmp_path: Path) -> None:
    log = house.harness.results.RowLog(tmp_path / "run" / "rows.jsonl", {"device": "cpu"})
    row = {"mode": "forward", "dtype": "fp32", "tokens": 197, "batch": 1, "peer": "one", "median": 0.5}
    log.measured(row)
    log.left_out("training-1x197-fp32", "one", "no gradient")
    log.left_out("training-8x197-fp32", "one", "no gradient")
    with log.path.open("a") as file:
        file.write('{"row": {"mode": "forw')
    results = house.harness.results.read_results(log.path)
    assert results["rows"] == [row]
    cases = ["training-1x197-fp32", "training-8x197-fp32"]
    assert results["left_out"] == [{"peer": "one", "reason": "no gradient", "cases": cases}]
    kept = house.harness.results.write_results(results, tmp_path / "kept.json")
    assert house.harness.results.read_results(kept) == results


def measured(mode: str, batch: int, tokens: int, dtype: str, peer: str, memory: int | None) -> dict[str, Any]:
    """One entry as pytest-benchmark writes it, with the fixture's facts."""
    side = math.isqrt(tokens - 1)
    return {
        "extra_info": {
            **{"mode": mode, "batch": batch, "tokens": tokens, "window": [side, side], "heads": 12, "head_dim": 64},
            **{"dtype": dtype, "peer": peer, "kernel": "triton/composite", "biased": True, "tflops": 0.123456789},
            **{"learnable": True, "clock": "idle to idle", "queued_ahead": None, "single_call": None},
            "sm_clock_mhz": None,
            **{"peak_memory": memory, "errors": {"out": 1.23456789e-7}, "flops": 10, "least_bytes": 20},
            "case": "not kept",
        },
        "stats": {"median": 0.0123456789, "iqr": 1e-4, "rounds": 9, "iterations": 2, "data": [1, 2, 3]},
    }


def write_run(path: Path, memory: int | None = 5 << 20) -> Path:
    conditions = {
        **{"device": "cpu", "device_name": "AMD EPYC 9B14 96-Core Processor", "threads": 2, "commit": "0123abc"},
        **{"torch": "2.13.0+cpu", "triton": None, "transformers": "5.23.0", "beit_fast": "0.1.0"},
    }
    benchmarks = [
        measured(mode, batch, tokens, "fp32", peer, memory)
        for mode in ("forward", "training")
        for batch, tokens in ((8, 197), (1, 197), (1, 577), (1, 1025))
        for peer in ("beit_fast triton", "transformers sdpa", "a peer of tomorrow")
    ]
    machine = {"beit_fast": conditions, "node": "a-private-host-name"}
    run = {"machine_info": machine, "datetime": "2026-02-03T04:05:06", "benchmarks": benchmarks}
    path.write_text(json.dumps(run))
    return path


def test_plot_condenses_a_run_and_draws_it(house: ModuleType, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run.json")
    assert house.report.plot.main([str(run), "--results", str(tmp_path / "results")]) == 0
    text = (tmp_path / "results" / "amd-epyc-9b14-cpu-2-threads.json").read_text()
    results = json.loads(text)
    assert "a-private-host-name" not in text
    assert results["conditions"]["commit"] == "0123abc"
    assert results["date"] == "2026-02-03"
    assert len(results["rows"]) == 24
    row = results["rows"][0]
    assert tuple(row) == house.harness.results.ROW_FIELDS
    assert (row["median"], row["iqr"], row["rounds"], row["errors"]) == (0.01235, 1e-4, 9, {"out": 1.235e-7})
    with Image.open(tmp_path / "results" / "amd-epyc-9b14-cpu-2-threads.png") as picture:
        assert picture.width > 1000
        assert len(picture.getcolors(1 << 24) or []) > 50


def test_plot_reads_its_own_results_again(house: ModuleType, tmp_path: Path) -> None:
    write_run(tmp_path / "run.json")
    house.report.plot.main([str(tmp_path / "run.json"), "--results", str(tmp_path)])
    first = (tmp_path / "amd-epyc-9b14-cpu-2-threads.json").read_bytes()
    again = tmp_path / "again"
    assert house.report.plot.main([str(tmp_path / "amd-epyc-9b14-cpu-2-threads.json"), "--results", str(again)]) == 0
    assert (again / "amd-epyc-9b14-cpu-2-threads.json").read_bytes() == first


def test_plot_draws_where_memory_was_not_measured(house: ModuleType, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run.json", memory=None)
    assert house.report.plot.main([str(run), "--out", str(tmp_path / "out")]) == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["amd-epyc-9b14-cpu-2-threads.png"]


def test_picture_keeps_single_images_apart_and_says_its_conditions(house: ModuleType, tmp_path: Path) -> None:
    results = house.harness.results.read_results(write_run(tmp_path / "run.json"))
    lines = house.report.plot.panels_of(results["rows"])
    assert [[rows[0]["mode"] for rows in panels] for panels in lines] == [["forward"], ["training"]]
    ((single,), _) = lines  # B=8 has one size only
    assert {(row["tokens"], row["batch"]) for row in single} == {(197, 1), (577, 1), (1025, 1)}
    caption = " ".join(house.report.plot.caption(results, [rows for panels in lines for rows in panels]).split())
    for condition in ("AMD EPYC 9B14", "2 CPU threads", "torch 2.13.0+cpu", "0123abc", "2026-02-03", "H=12, D=64"):
        assert condition in caption
    assert "Time is the device's" not in caption


GPU_SIZES = ((64, 197), (32, 577), (8, 1025), (8, 1601), (1, 577), (1, 1025), (1, 1601))
SPEEDS = {  # median in units of ours
    "beit_fast triton": 1.0,
    "beit_fast triton without bias": 0.98,
    "flex_attention": 2.0,
    "sdpa gathered bias efficient": 3.5,
    "sdpa prebuilt bias efficient": 1.6,
    "sdpa prebuilt bias cudnn": 0.8,
    "sdpa without bias flash": 1.1,
}


def gpu_row(mode: str, batch: int, tokens: int, peer: str, dtype: str = "bf16") -> dict[str, Any]:
    entry = measured(mode, batch, tokens, dtype, peer, memory=(1 if peer == "beit_fast triton" else 5) * batch << 20)
    median = SPEEDS[peer] * batch * tokens**2 * 1e-11 * (1 if mode == "forward" else 3)
    facts = {
        **{"biased": "without" not in peer, "learnable": not ("without" in peer or "prebuilt" in peer)},
        **{"clock": "device time", "queued_ahead": True, "single_call": median + 1e-4, "sm_clock_mhz": 1980},
        "tflops": 1e-12 * batch * tokens**2 * 12 * 64 * 4 / median,
    }
    return {**entry["extra_info"], **facts, "median": median, "iqr": 0.0, "rounds": 10, "iterations": 4}


def gpu_results() -> dict[str, Any]:
    gpu = {"driver_version": "580.1", "compute_capability": "9.0"}
    conditions = {
        **{"device": "cuda", "device_name": "NVIDIA H200", "threads": 16, "commit": "0123abc", "gpu": gpu},
        **{"torch": "2.11.0+cu130", "triton": "3.6.0", "transformers": "5.17.0", "beit_fast": "0.1.0"},
    }
    rows = [
        gpu_row(mode, batch, tokens, peer)
        for mode in ("backward", "forward", "training", "training, frozen table")
        for batch, tokens in GPU_SIZES
        for peer in SPEEDS
        if not ("prebuilt" in peer and mode in ("backward", "training"))
        and not (peer == "sdpa prebuilt bias cudnn" and tokens == 577)
    ]
    rows += [
        gpu_row("forward", 8, 1025, "beit_fast triton", "fp16"),
        gpu_row("forward", 8, 1025, "flex_attention", "fp16"),
    ]
    left_out = [{"peer": "sdpa prebuilt bias cudnn", "reason": "No plan.", "cases": ["forward-32x577-bf16"]}]
    return {"conditions": conditions, "date": "2026-02-03", "rows": rows, "left_out": left_out}


def test_picture_of_a_gpu_has_a_line_for_each_mode(house: ModuleType, tmp_path: Path) -> None:
    results = gpu_results()
    lines = house.report.plot.panels_of(results["rows"])
    modes = [panels[0][0]["mode"] for panels in lines]
    assert modes == ["forward", "backward", "training", "training, frozen table"]
    for batches, single in lines:
        assert {(row["batch"], row["tokens"]) for row in batches} == set(GPU_SIZES[:4])
        assert {(row["batch"], row["tokens"]) for row in single} == set(GPU_SIZES[4:])
        assert {row["dtype"] for row in batches + single} == {"bf16"}
    caption = " ".join(house.report.plot.caption(results, [rows for panels in lines for rows in panels]).split())
    assert "driver 580.1" in caption
    assert "Time is the device's" in caption
    house.harness.results.write_results(results, tmp_path / "run.json")
    assert house.report.plot.main([str(tmp_path / "run.json"), "--results", str(tmp_path / "results")]) == 0
    with Image.open(tmp_path / "results" / "nvidia-h200.png") as picture:
        assert len(picture.getcolors(1 << 24) or []) > 50


def targets_on_gpu(house: ModuleType) -> list[Any]:
    """Those of attention: a bench that did not run is not judged."""
    return [
        target
        for target in house.report.targets.TARGETS
        if (target.device, target.bench) == ("cuda", house.harness.results.ATTENTION)
    ]


def test_targets_are_judged_at_every_size(house: ModuleType) -> None:
    verdicts = house.report.targets.judge(gpu_results())
    by_target: dict[str, list[Any]] = {target.text: [] for target in targets_on_gpu(house)}
    for verdict in verdicts:
        by_target[verdict.target.text].append(verdict)
    flash, learned, ready, cudnn, training, memory = by_target.values()
    assert [verdict.met for verdict in flash] == [True] * 7 + [None]  # fp16 had no flash row
    assert all(verdict.against == "flex_attention" for verdict in learned)
    assert [verdict.met for verdict in learned] == [True] * 8
    assert [verdict.ratio for verdict in ready[:7]] == pytest.approx([1.6] * 7)
    assert [verdict.met for verdict in cudnn] == [None if "577" in verdict.case else False for verdict in cudnn[:7]] + [
        None
    ]
    assert [verdict.met for verdict in training] == [False] * 7
    ((case, met, ratio),) = [(verdict.case, verdict.met, verdict.ratio) for verdict in memory]
    assert (case, met, ratio) == ("8x1601 bf16", True, 5.0)


def test_targets_are_printed_with_reasons_and_distances(
    house: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    house.harness.results.write_results(gpu_results(), tmp_path / "run.json")
    assert house.report.targets.main([str(tmp_path / "run.json")]) == 0
    text = capsys.readouterr().out
    assert "NVIDIA H200, torch 2.11.0+cu130, commit 0123abc" in text
    assert "forward no slower than SDPA flash without bias: met at 7 of 7 (ratio needed 1.00)" in text
    assert "forward + backward with the table 3x the best peer: met at 0 of 7 (ratio needed 3.00)" in text
    assert "ratio  2.00  MISSED, 33.3 % less is needed  (flex_attention)" in text
    assert "32x577 bf16   not compared: sdpa prebuilt bias cudnn: No plan." in text
    assert "8x1025 fp16   not compared: sdpa without bias flash was not measured" in text


def test_a_ratio_with_time_of_the_host_in_it_says_so(house: ModuleType) -> None:
    results = gpu_results()
    for row in results["rows"]:
        row["queued_ahead"] = row["peer"] != "sdpa without bias flash"
    flash, learned, *_ = house.report.targets.table(house.report.targets.judge(results)).split("\n\n")
    assert flash.count("(sdpa without bias flash, the device waited for the host)") == 7
    assert "waited" not in learned


def test_a_target_without_our_measurement_says_so(house: ModuleType) -> None:
    results = gpu_results()
    results["rows"] = [row for row in results["rows"] if row["peer"] != "beit_fast triton"]
    verdicts = house.report.targets.judge(results)
    assert len(verdicts) == len(targets_on_gpu(house))
    assert all(verdict.met is None and "was not measured" in verdict.missing for verdict in verdicts)


def test_targets_name_peers_that_exist(house: ModuleType) -> None:
    names = {peer.name for peer in house.baselines.attention.PEERS}
    names |= {name for of_mode in house.bench_patch_embed.PEERS.values() for name in of_mode}
    names |= {peer.name for peer in house.baselines.models.MODEL_PEERS}
    named = {name for target in house.report.targets.TARGETS for name in (target.ours, target.peer) if name is not None}
    assert named <= names
    learnable = {peer.name for peer in house.baselines.attention.PEERS if peer.learnable}
    assert {"flex_attention", "sdpa gathered bias efficient", "transformers sdpa"} <= learnable
    assert not any("prebuilt" in name or "without" in name or "cudnn" in name for name in learnable)


@pytest.mark.parametrize("content", ["", "{}", '{"rows": []}', '{"conditions": {}, "rows": [{"mode": "forward"}]}'])
def test_targets_refuse_what_holds_no_measurement(
    house: ModuleType, tmp_path: Path, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.json").write_text(content)
    assert house.report.targets.main([str(tmp_path / "run.json")]) == 2
    assert "run.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("device", "name", "slug"),
    [
        ("cuda", "NVIDIA H200", "nvidia-h200"),
        ("cpu", "Intel(R) Xeon(R) Gold 6338 CPU @ 2.00GHz", "intel-xeon-gold-6338-cpu-2-threads"),
        ("cpu", "aarch64", "aarch64-cpu-2-threads"),
    ],
)
def test_file_name_of_a_device(house: ModuleType, device: str, name: str, slug: str) -> None:
    assert house.harness.results.device_slug({"device": device, "device_name": name, "threads": 2}) == slug


@pytest.mark.parametrize("content", ["", "{}", '{"machine_info": {"beit_fast": {}}, "benchmarks": []}'])
def test_plot_refuses_what_holds_no_measurement(
    house: ModuleType, tmp_path: Path, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.json").write_text(content)
    assert house.report.plot.main([str(tmp_path / "run.json"), "--out", str(tmp_path)]) == 2
    assert "run.json" in capsys.readouterr().err
    assert house.report.plot.main([str(tmp_path / "missing.json")]) == 2
    assert list(tmp_path.glob("*.png")) == []
