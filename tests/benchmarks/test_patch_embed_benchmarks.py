"""The benchmark of patch embedding: peers that compute the same, wrong ones without a time, targets and picture."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from PIL import Image

from ..support.benchmarks import benchmark_house


@pytest.fixture(scope="module")
def house() -> Iterator[ModuleType]:
    with benchmark_house() as module:
        yield module


def small_case(house: ModuleType, mode: str, dtype: str = "fp32") -> Any:
    return house.bench_patch_embed.PatchCase(mode, 2, dtype, image=24, patch=8, embed=12)


def test_every_race_names_itself_once_and_all_are_in_a_full_run(house: ModuleType) -> None:
    bench = house.bench_patch_embed
    for full in (False, True):
        names = [bench.race_name(*race) for race in bench.races(full)]
        assert len(set(names)) == len(names) > 0
    races = {(case.mode, case.dtype, case.batch, threads) for case, threads in bench.races(full=True)}
    assert {
        (mode, dtype, batch, threads)
        for mode in bench.PEERS
        for dtype in ("fp32", "bf16")
        for batch in (1, 8)
        for threads in (1, 2)
    } < races


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("mode", ["float pixels", "uint8 pixels"])
def test_every_peer_is_right(house: ModuleType, tmp_path: Path, mode: str, dtype: str) -> None:
    bench, case = house.bench_patch_embed, small_case(house, mode, dtype)
    torch.save(vars(bench.reference(case)), tmp_path / "reference.pt")
    for peer in bench.PEERS[mode]:
        prepared = bench.prepare(peer, str(tmp_path / "reference.pt"), **vars(case))
        tokens = prepared.step()
        assert tokens.shape == (2, 10, 12)
        assert tokens.dtype == bench.DTYPES[dtype]
        assert set(prepared.facts["errors"]) == {"tokens"}
        assert prepared.facts["kernel"].startswith("fused/" if peer == bench.OURS else "torch")
    inputs = bench.draw(case)
    assert (inputs.pos is not None) == (mode == "uint8 pixels")
    assert torch.equal(inputs.pixels, bench.draw(case).pixels)


@pytest.mark.parametrize("mode", ["float pixels", "uint8 pixels"])
def test_a_peer_that_is_wrong_is_refused(house: ModuleType, tmp_path: Path, mode: str) -> None:
    bench, case = house.bench_patch_embed, small_case(house, mode)
    reference = bench.reference(case)
    tokens = reference.results["tokens"]
    tokens[:, 0] += 1e-4 * tokens.norm()  # CLS alone
    torch.save(vars(reference), tmp_path / "reference.pt")
    for peer in bench.PEERS[mode]:
        with pytest.raises(ValueError, match=r"wrong and not timed\. tokens: relative error"):
            bench.prepare(peer, str(tmp_path / "reference.pt"), **vars(case))


def patch_results(house: ModuleType) -> dict[str, Any]:
    conditions = {
        **{"device": "cpu", "device_name": "AMD EPYC 9B14 96-Core Processor", "threads": 2, "commit": "0123abc"},
        **{"torch": "2.13.0+cpu", "triton": None, "transformers": "5.23.0", "beit_fast": "0.1.0"},
    }
    speeds = {"beit_fast fused": 1.2, "unfold + linear": 1.25, "conv": 1.0, "conv channels_last": 0.8}
    speeds["normalise + conv"] = 0.8
    rows = []
    for case, threads in house.bench_patch_embed.races(full=True):
        for peer in house.bench_patch_embed.PEERS[case.mode]:
            median = case.flops * 1e-11 / speeds[peer] / threads
            rows.append(
                {
                    **{"bench": "cpu patch embedding", "threads": threads, "case": str(case), **vars(case)},
                    **{"tokens": 197, "peer": peer, "kernel": "a kernel", "errors": {"tokens": 1e-7}},
                    **{"median": median, "iqr": 0.0, "rounds": 9, "iterations": 1, "peak_memory": 2**20},
                    **{"flops": case.flops, "tflops": case.flops / median / 1e12},
                }
            )
    return {"conditions": conditions, "date": "2026-02-03", "rows": rows, "left_out": []}


def test_targets(house: ModuleType) -> None:
    by_target: dict[str, list[Any]] = {}
    for verdict in house.report.targets.judge(patch_results(house)):
        if verdict.target.bench == "cpu patch embedding":
            by_target.setdefault(verdict.target.text, []).append(verdict)
    close, faster, from_bytes = by_target.values()
    assert [(v.ratio, v.met, v.against) for v in close] == [(pytest.approx(0.96), False, "unfold + linear")] * 8
    assert [v.met for v in faster] == [False] * 8
    assert [(v.ratio, v.met) for v in from_bytes] == [(pytest.approx(1.5), True)] * 8


def test_picture(house: ModuleType, tmp_path: Path) -> None:
    results = patch_results(house)
    house.harness.results.write_results(results, tmp_path / "run.json")
    assert house.report.plot.main([str(tmp_path / "run.json"), "--out", str(tmp_path)]) == 0
    with Image.open(tmp_path / "amd-epyc-9b14-cpu-patch-embedding.png") as picture:
        assert len(picture.getcolors(1 << 24) or []) > 50
    panels = house.report.plot_patches.patch_panels(results["rows"])
    assert [[(rows[0]["mode"], rows[0]["dtype"]) for rows in line] for line in panels] == [
        [(mode, dtype) for dtype in ("bf16", "fp16", "fp32")] for mode in ("float pixels", "uint8 pixels")
    ]
    peers = {peer for of_mode in house.bench_patch_embed.PEERS.values() for peer in of_mode}
    assert peers == set(house.report.plot_patches.COLOURS)
    caption = " ".join(house.report.plot_patches.patch_caption(results, 200).split())
    for condition in ("AMD EPYC 9B14", "torch 2.13.0+cpu", "0123abc", "3x224x224 pixels", "patches of 16", "E=768"):
        assert condition in caption
