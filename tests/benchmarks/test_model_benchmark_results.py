"""What is made of measurements of whole models: targets, within one heat, and the picture."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
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


SPEEDS = {
    "beit_fast optimized": 3.0,
    "beit_fast optimized high": 3.7,
    "beit_fast triton": 1.6,
    "transformers accelerated": 1.8,
    "transformers sdpa": 1.0,
    "transformers sdpa compiled": 1.2,
    "openvino": 2.9,
}


def row(case: Any, peer: str, median: float, threads: int = 2, **more: Any) -> dict[str, Any]:
    return {
        **{"bench": "cpu models" if case.device == "cpu" else "models", "threads": threads, "case": str(case)},
        **asdict(case),
        **{"tokens": case.tokens, "flops": case.flops, "peer": peer, "kernel": "a kernel", "errors": {"logits": 1e-7}},
        **{"median": median, "iqr": 0.0, "range": [0.9 * median, 1.1 * median], "rounds": 7, "iterations": 1},
        **{"peak_memory": (1 if "optimized" in peer else 2) * 2**28, "loaded_memory": 2**30},
        **{"images_per_second": case.batch / median, "tflops": case.flops / median / 1e12},
        **more,
    }


def results_of(house: ModuleType, device: str) -> dict[str, Any]:
    conditions = {
        **{"device": device, "device_name": "AMD EPYC 9B14 96-Core Processor", "threads": 2, "commit": "0123abc"},
        **{"torch": "2.13.0+cpu", "triton": None, "transformers": "5.23.0", "beit_fast": "0.1.0"},
    }
    peers = house.baselines.models.MODEL_PEERS
    rows = [
        row(case, peer, case.flops * 1e-11 / speed)
        for case in house.harness.model_cases.model_cases(device, every_peer=True)
        for peer, speed in SPEEDS.items()
        if any(one.name == peer and case.mode in one.modes and case.dtype in one.dtypes for one in peers)
    ]
    left_out = [{"peer": "timm", "reason": "stayed at home", "cases": ["a", "b"], "bench": "cpu models"}]
    return {"conditions": conditions, "date": "2026-02-03", "rows": rows, "left_out": left_out}


def verdicts_of(house: ModuleType, results: dict[str, Any]) -> dict[str, list[Any]]:
    by_target: dict[str, list[Any]] = {}
    for verdict in house.report.targets.judge(results):
        if verdict.target.bench in ("cpu models", "models"):
            by_target.setdefault(verdict.target.text, []).append(verdict)
    return by_target


def test_targets_of_a_cpu(house: ModuleType) -> None:
    verdicts = verdicts_of(house, results_of(house, "cpu"))
    met = {text: [verdict.met for verdict in group] for text, group in verdicts.items()}
    assert met == {
        "base 224 B=1 fp32 2.8x transformers sdpa, at float32_matmul_precision high": [True],
        "base 224 B=8 fp32 2.4x transformers sdpa, at float32_matmul_precision high": [True],
        "base 640 B=1 fp32 3.6x transformers sdpa, at float32_matmul_precision high": [True],
        "base 224 B=1 fp32 2.8x transformers sdpa": [True],
        "base 224 B=8 fp32 2.4x transformers sdpa": [True],
        "base 640 B=1 fp32 3.6x transformers sdpa": [False],
        "base 224 B=1 bf16 1.35x transformers sdpa": [True],
        "base 640 B=1 bf16 3.2x transformers sdpa": [False],
        "base 224 B=1 fp32 level with OpenVINO": [True],
        "base 224 B=8 fp32 level with OpenVINO": [True],
        "base 640 B=1 fp32 level with OpenVINO": [True],
        "base 224 B=1 bf16 level with OpenVINO": [True],
        "base 640 B=1 bf16 level with OpenVINO": [True],
        "accelerated Transformers 1.7x transformers sdpa, base 640 B=1 fp32": [True],
        "accelerated Transformers 2.0x transformers sdpa, base 640 B=1 bf16": [False],
        "goal: 1.05x OpenVINO at 640": [False, False],
        "a forward at 640 adds at most a third of what transformers sdpa adds": [False, False],
        "training step of base 224 B=4 fp32 1.5x transformers sdpa": [True],
    }
    assert verdicts["base 224 B=1 fp32 2.8x transformers sdpa"][0].case == "base 1x197 fp32, threads 2"


def test_targets_of_a_gpu(house: ModuleType) -> None:
    verdicts = verdicts_of(house, results_of(house, "cuda"))
    assert {text: [verdict.met for verdict in group] for text, group in verdicts.items()} == {
        "base 224 B=64 bf16 2.0x transformers sdpa": [True],
        "base 224 B=64 bf16 1.3x transformers sdpa compiled": [True],
        "base 224 B=1 bf16 4.0x transformers sdpa": [False],
        "large 640 bf16 2x transformers sdpa": [True],
        "training step of large 640 bf16 2x transformers sdpa": [False],
        "training step of large 640 bf16 with half the memory of transformers sdpa": [False],
    }


def test_ratios_are_taken_within_one_heat(house: ModuleType) -> None:
    case = house.harness.model_cases.ModelCase("inference", "base", 224, 1, "fp32")
    results = results_of(house, "cpu")
    ours, theirs, runtime = "beit_fast optimized", "transformers sdpa", "openvino"
    timed = ((1, ours, 1.0), (1, theirs, 4.0), (2, ours, 2.0), (2, runtime, 2.2))
    results["rows"] = [row(case, peer, median, heat=heat) for heat, peer, median in timed]
    verdicts = verdicts_of(house, results)
    (against_theirs,) = verdicts["base 224 B=1 fp32 2.8x transformers sdpa"]
    (against_runtime,) = verdicts["base 224 B=1 fp32 level with OpenVINO"]
    assert (against_theirs.ratio, against_runtime.ratio) == pytest.approx((4.0, 1.1))
    assert against_runtime.case == "base 1x197 fp32, threads 2, heat 2"
    (panel,) = house.report.plot_models.model_panels(results["rows"])
    assert [(one["peer"], one["median"]) for one in panel] == [(ours, 1.5), (runtime, 2.2), (theirs, 4.0)]
    assert panel[0]["range"] == pytest.approx([0.9, 2.2])
    results["rows"] = [one for one in results["rows"] if one["peer"] == ours]
    assert [verdict.met for verdict in verdicts_of(house, results)["base 224 B=1 fp32 level with OpenVINO"]] == [None]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_picture(house: ModuleType, tmp_path: Path, device: str) -> None:
    results = results_of(house, device)
    house.harness.results.write_results(results, tmp_path / "run.json")
    assert house.report.plot.main([str(tmp_path / "run.json"), "--results", str(tmp_path / "results")]) == 0
    name = "amd-epyc-9b14-cpu-models" if device == "cpu" else "amd-epyc-9b14-models"
    kept = house.harness.results.read_results(tmp_path / "results" / f"{name}.json")
    assert kept["rows"] == results["rows"]
    with Image.open(tmp_path / "results" / f"{name}.png") as picture:
        assert len(picture.getcolors(1 << 24) or []) > 50
    caption = " ".join(house.report.plot_models.model_caption(kept, 200).split())
    for condition in ("AMD EPYC 9B14", "threads 2", "torch 2.13.0+cpu", "0123abc", "2026-02-03", "7 rounds"):
        assert condition in caption
    assert ("timm: stayed at home (a, b)" in caption) == (device == "cpu")


def test_picture_without_memory(house: ModuleType, tmp_path: Path) -> None:
    results = results_of(house, "cpu")
    results["rows"] = [{**one, "peak_memory": None, "loaded_memory": None} for one in results["rows"]]
    assert house.report.plot_models.draw_models(results, tmp_path / "picture.png").exists()


def test_every_peer_has_a_colour(house: ModuleType) -> None:
    names = [peer.name for peer in house.baselines.models.MODEL_PEERS]
    assert len(set(names)) == len(names)
    assert set(names) == set(house.report.plot_models.COLOURS)
    assert len(set(house.report.plot_models.COLOURS.values())) == len(names)
