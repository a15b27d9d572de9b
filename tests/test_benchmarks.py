"""The benchmark house: every peer computes the same thing, wrong is never timed, and pictures say their conditions."""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from PIL import Image

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
PACKAGE = "beit_fast_benchmarks"


@pytest.fixture(scope="module")
def house() -> Iterator[ModuleType]:
    """The folder `benchmarks/` as a package, whatever else is called so."""
    spec = importlib.util.spec_from_file_location(PACKAGE, BENCHMARKS / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[PACKAGE] = module
    spec.loader.exec_module(module)
    for name in ("cases", "peers", "plot"):
        importlib.import_module(f"{PACKAGE}.{name}")
    yield module
    for name in [name for name in sys.modules if name.split(".")[0] == PACKAGE]:
        del sys.modules[name]


def small_case(house: ModuleType, mode: str, dtype: torch.dtype = torch.float32) -> Any:
    return house.cases.Case(mode, 2, (3, 3), dtype, "cpu", heads=2, head_dim=8)


def test_peers_are_declared_once_and_drawn_alike(house: ModuleType) -> None:
    names = [peer.name for peer in house.peers.PEERS]
    assert len(set(names)) == len(names)
    assert set(names) == set(house.plot.STYLES)
    looks = list(house.plot.STYLES.values())
    assert len(set(looks)) == len(looks)


def test_every_case_names_itself_once(house: ModuleType) -> None:
    for device in ("cpu", "cuda"):
        for full in (False, True):
            names = [str(case) for case in house.cases.cases(device, full)]
            assert len(set(names)) == len(names) > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("mode", ["forward", "training", "training, frozen table"])
def test_every_peer_that_can_run_is_right(house: ModuleType, mode: str, dtype: torch.dtype) -> None:
    case = small_case(house, mode, dtype)
    checked = []
    for peer in house.peers.PEERS:
        if peer.compiles or peer.why_missing(case) is not None:
            continue
        inputs = house.cases.draw(case)
        results = house.cases.results_of(case, inputs, peer.build(case, inputs), peer.biased)
        expected = house.cases.reference(case, peer.biased)
        assert results.keys() == expected.results.keys()
        for name, exact in expected.results.items():
            error = house.cases.relative_error(results[name], exact)
            assert error <= expected.budgets[name], f"{peer.name}: {name}"
        assert results["out"].is_contiguous()
        assert house.cases.step_of(case, inputs, peer.build(case, inputs), peer.biased)() is not None
        checked.append(peer.name)
    assert {"beit_fast triton", "beit_fast eager", "transformers sdpa"} <= set(checked)


def test_a_peer_that_cannot_take_part_says_why(house: ModuleType) -> None:
    training = small_case(house, "training")
    peers = {peer.name: peer for peer in house.peers.PEERS}
    assert "inference only" in peers["flex_attention"].why_missing(training)
    assert "gradient" in peers["sdpa prebuilt bias"].why_missing(training)
    assert "CUDA backend" in peers["sdpa prebuilt bias cudnn"].why_missing(training)
    assert "no table" in peers["sdpa without bias"].why_missing(training)


def test_counts_of_work_and_bytes(house: ModuleType) -> None:
    case = house.cases.Case("forward", 8, (14, 14), torch.bfloat16, "cpu")
    assert case.flops == 4 * 8 * 12 * 197 * 197 * 64
    assert case.least_bytes(biased=False) == 4 * 8 * 197 * 768 * 2
    assert case.least_bytes(biased=True) - case.least_bytes(biased=False) == 732 * 12 * 2
    training = house.cases.Case("training", 8, (14, 14), torch.bfloat16, "cpu")
    assert training.flops * 2 == case.flops * 7


PROBE = """
import math
from pathlib import Path

import pytest
import torch

from .cases import Case, textbook_attention
from .peers import Peer
from beit_fast.position_bias import gather_bias

CALLS = Path(__file__).parent / "calls.txt"


def peer(name, change_bias=lambda bias: bias, change_out=lambda out: out):
    def build(case, inputs):
        def run():
            with CALLS.open("a") as file:
                file.write(name + "\\n")
            bias = change_bias(gather_bias(inputs.table, case.window))
            return change_out(textbook_attention(inputs.q, inputs.k, inputs.v, bias, case.scale))

        return run

    return Peer(name, "a probe", build, lambda case: "probe")


PEERS = [
    peer("right"),
    peer("transposed", change_bias=lambda bias: bias.transpose(1, 2)),
    peer("nan", change_out=lambda out: out * math.nan),
    peer("frozen", change_bias=lambda bias: bias.detach() + 0 * bias),
    Peer("absent", "a probe", lambda case, inputs: None, lambda case: "probe", lambda case: "stayed at home"),
]


@pytest.mark.parametrize("peer", PEERS, ids=str)
def test_probe(peer, race):
    race(Case("training", 2, (3, 3), torch.float32, "cpu", heads=2, head_dim=8), peer)
"""


def test_wrong_is_refused_before_it_is_timed(tmp_path: Path) -> None:
    """Only `frozen` has the right output: its table gradient is zero, and that is seen too."""
    folder = tmp_path / "benchmarks"
    folder.mkdir()
    for name in ("__init__.py", "cases.py", "peers.py", "conftest.py"):
        shutil.copy(BENCHMARKS / name, folder)
    (folder / "bench_probe.py").write_text(PROBE)
    (tmp_path / "pytest.ini").write_text("[pytest]\npython_files = bench_*.py\naddopts = --import-mode=importlib -ra\n")
    command = [sys.executable, "-m", "pytest", "benchmarks", "--device=cpu", "--benchmark-json=run.json"]
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=alone, timeout=120, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "3 failed, 1 passed, 1 skipped" in done.stdout
    assert "transposed is wrong on training-2x10-fp32 and was not timed. out: relative error" in done.stdout
    assert "nan is wrong on training-2x10-fp32 and was not timed. out: relative error nan" in done.stdout
    assert "frozen is wrong on training-2x10-fp32 and was not timed. table: relative error" in done.stdout
    assert "absent: stayed at home" in done.stdout
    assert "measured on: " in done.stdout
    calls = (folder / "calls.txt").read_text().split()
    assert [calls.count(name) for name in ("transposed", "nan", "frozen")] == [1, 1, 1]
    assert calls.count("right") > 5
    (measured,) = json.loads((tmp_path / "run.json").read_text())["benchmarks"]
    facts = measured["extra_info"]
    assert facts["peer"] == "right"
    assert facts["kernel"] == "probe"
    assert facts["tflops"] == pytest.approx(facts["flops"] / measured["stats"]["median"] / 1e12)
    assert set(facts["errors"]) == {"out", "q", "k", "v", "table"}
    assert facts["least_bytes"] > 0


def measured(mode: str, batch: int, tokens: int, dtype: str, peer: str, memory: int | None) -> dict[str, Any]:
    """One entry as pytest-benchmark writes it, with the fixture's facts."""
    side = math.isqrt(tokens - 1)
    return {
        "extra_info": {
            **{"mode": mode, "batch": batch, "tokens": tokens, "window": [side, side], "heads": 12, "head_dim": 64},
            **{"dtype": dtype, "peer": peer, "kernel": "triton/composite", "biased": True, "tflops": 0.123456789},
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
    assert house.plot.main([str(run), "--results", str(tmp_path / "results")]) == 0
    text = (tmp_path / "results" / "amd-epyc-9b14-cpu-2-threads.json").read_text()
    results = json.loads(text)
    assert "a-private-host-name" not in text
    assert results["conditions"]["commit"] == "0123abc"
    assert results["date"] == "2026-02-03"
    assert len(results["rows"]) == 24
    row = results["rows"][0]
    assert tuple(row) == house.plot.ROW_FIELDS
    assert (row["median"], row["iqr"], row["rounds"], row["errors"]) == (0.01235, 1e-4, 9, {"out": 1.235e-7})
    with Image.open(tmp_path / "results" / "amd-epyc-9b14-cpu-2-threads.png") as picture:
        assert picture.width > 1000
        assert len(picture.getcolors(1 << 24) or []) > 50


def test_plot_reads_its_own_results_again(house: ModuleType, tmp_path: Path) -> None:
    write_run(tmp_path / "run.json")
    house.plot.main([str(tmp_path / "run.json"), "--results", str(tmp_path)])
    first = (tmp_path / "amd-epyc-9b14-cpu-2-threads.json").read_bytes()
    again = tmp_path / "again"
    assert house.plot.main([str(tmp_path / "amd-epyc-9b14-cpu-2-threads.json"), "--results", str(again)]) == 0
    assert (again / "amd-epyc-9b14-cpu-2-threads.json").read_bytes() == first


def test_plot_draws_where_memory_was_not_measured(house: ModuleType, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run.json", memory=None)
    assert house.plot.main([str(run), "--out", str(tmp_path / "out")]) == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["amd-epyc-9b14-cpu-2-threads.png"]


def test_picture_takes_the_commonest_batch_of_a_size_and_says_its_conditions(house: ModuleType, tmp_path: Path) -> None:
    results = house.plot.read_results(write_run(tmp_path / "run.json"))
    panels = house.plot.panels_of(results["rows"])
    assert [rows[0]["mode"] for rows in panels] == ["forward", "training"]
    assert {(row["tokens"], row["batch"]) for row in panels[0]} == {(197, 1), (577, 1), (1025, 1)}
    caption = " ".join(house.plot.caption(results, panels).split())
    for condition in ("AMD EPYC 9B14", "2 CPU threads", "torch 2.13.0+cpu", "0123abc", "2026-02-03", "H=12, D=64"):
        assert condition in caption


@pytest.mark.parametrize(
    ("device", "name", "slug"),
    [
        ("cuda", "NVIDIA H200", "nvidia-h200"),
        ("cpu", "Intel(R) Xeon(R) Gold 6338 CPU @ 2.00GHz", "intel-xeon-gold-6338-cpu-2-threads"),
        ("cpu", "aarch64", "aarch64-cpu-2-threads"),
    ],
)
def test_file_name_of_a_device(house: ModuleType, device: str, name: str, slug: str) -> None:
    assert house.plot.device_slug({"device": device, "device_name": name, "threads": 2}) == slug


@pytest.mark.parametrize("content", ["", "{}", '{"machine_info": {"beit_fast": {}}, "benchmarks": []}'])
def test_plot_refuses_what_holds_no_measurement(
    house: ModuleType, tmp_path: Path, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.json").write_text(content)
    assert house.plot.main([str(tmp_path / "run.json"), "--out", str(tmp_path)]) == 2
    assert "run.json" in capsys.readouterr().err
    assert house.plot.main([str(tmp_path / "missing.json")]) == 2
    assert list(tmp_path.glob("*.png")) == []
