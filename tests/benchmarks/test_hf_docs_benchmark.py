"""The tables of Transformers' page: implementations that compute the same, wrong ones without a time, Markdown."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import beit_fast

from ..support.benchmarks import benchmark_house, run_in_a_copy

EAGER, SDPA, TRITON, OPTIMIZED = "transformers eager", "transformers sdpa", "beit_fast triton", "beit_fast optimized"


@pytest.fixture(scope="module")
def house() -> Iterator[ModuleType]:
    with benchmark_house() as module:
        yield module


def small_case(house: ModuleType, mode: str, dtype: str = "fp32") -> Any:
    return house.harness.hf_docs_cases.PageCase(mode, 2, 70, 48, dtype, 2, model="tiny")


def taking_part(house: ModuleType, case: Any) -> list[str]:
    return [peer.name for peer in house.baselines.hf_docs.PEERS if peer.why_missing(case) is None]


def write_reference(house: ModuleType, case: Any, folder: Path) -> str:
    torch.save(vars(house.harness.hf_docs_cases.page_reference(case)), folder / "reference.pt")
    return str(folder / "reference.pt")


def test_the_lines_are_those_of_the_page(house: ModuleType) -> None:
    cases = house.harness.hf_docs_cases.page_cases("cuda")
    assert [(c.mode, c.batch, c.height, c.width, c.dtype, c.device) for c in cases] == [
        ("training", 2, 1048, 640, "fp16", "cuda"),
        *(("inference", batch, 224, 224, "fp16", "cuda") for batch in (1, 4, 16, 32)),
    ]
    assert cases[0].steps == 50
    full = house.harness.hf_docs_cases.page_cases("cpu", full=True)
    assert (full[0].height, full[0].width, full[0].steps) == (1048, 640, 50)
    assert {(c.batch, c.dtype) for c in full[1:]} == {(b, dtype) for b in (1, 4, 16, 32) for dtype in ("fp32", "bf16")}
    quick = house.harness.hf_docs_cases.page_cases("cpu")
    assert (quick[0].height, quick[0].width) == (524, 320)
    assert len({str(case) for case in [*full, *quick]}) == len(full) + 1


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("mode", ["inference", "training"])
def test_every_implementation_is_right(house: ModuleType, tmp_path: Path, mode: str, dtype: str) -> None:
    case = small_case(house, mode, dtype)
    expected = write_reference(house, case, tmp_path)
    names = taking_part(house, case)
    assert {EAGER, SDPA, TRITON} <= set(names)
    for name in names:
        prepared = house.baselines.hf_docs.prepare(name, expected, **dataclasses.asdict(case))
        assert prepared.step().shape == (2, 10)
        errors = prepared.facts["errors"]
        assert ("relative_position_bias_table" in " ".join(errors)) == (mode == "training")
        assert len(errors) > (12 if mode == "training" else 0)


@pytest.mark.parametrize(("mode", "wrong"), [("inference", "logits"), ("training", "logits"), ("training", "lambda_1")])
def test_an_implementation_that_is_wrong_is_refused(house: ModuleType, tmp_path: Path, mode: str, wrong: str) -> None:
    case = small_case(house, mode)
    reference = house.harness.hf_docs_cases.page_reference(case)
    reference.results[wrong][..., :1] += 1e-4 * reference.results[wrong].norm()
    torch.save(vars(reference), tmp_path / "reference.pt")
    for name in taking_part(house, case):
        with pytest.raises(ValueError, match=rf"wrong and not timed\. {wrong}: relative error"):
            house.baselines.hf_docs.prepare(name, str(tmp_path / "reference.pt"), **dataclasses.asdict(case))


def test_a_parameter_without_a_gradient_is_refused(house: ModuleType) -> None:
    case = small_case(house, "training")
    model = house.harness.model_cases.our_model(case.native, "triton", torch.float32)
    model.classifier.requires_grad_(False)
    with pytest.raises(ValueError, match=r"No gradient for classifier\.weight, classifier\.bias"):
        house.baselines.hf_docs.results_of(case, model, house.baselines.hf_docs.step_of(case, model))


def test_a_training_step_starts_from_no_gradients(house: ModuleType) -> None:
    case = small_case(house, "training")
    model = house.harness.model_cases.our_model(case.native, "triton", torch.float32)
    step = house.baselines.hf_docs.step_of(case, model)
    step()
    first = [p.grad.clone() for p in model.parameters()]
    step()
    assert all(torch.equal(p.grad, grad) for p, grad in zip(model.parameters(), first, strict=True))


def test_who_is_missing_says_why(house: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    peers = {peer.name: peer for peer in house.baselines.hf_docs.PEERS}
    assert peers[OPTIMIZED].why_missing(small_case(house, "training")) == "is for inference"
    monkeypatch.delattr(beit_fast, "optimize_for_inference", raising=False)
    reason = peers[OPTIMIZED].why_missing(small_case(house, "inference"))
    assert reason == f"beit_fast {beit_fast.__version__} has no optimize_for_inference"
    monkeypatch.setattr(house.baselines.hf_docs, "not_installed", list)
    for name in (EAGER, SDPA):
        assert peers[name].why_missing(small_case(house, "inference")).startswith("not installed: transformers")


def test_memory_is_reckoned_with_the_scores_that_eager_keeps(house: ModuleType) -> None:
    case = house.harness.hf_docs_cases.page_cases("cpu", full=True)[0]
    eager, triton = (
        next(peer for peer in house.baselines.hf_docs.PEERS if peer.name == name).scores for name in (EAGER, TRITON)
    )
    one_matrix_a_layer = 12 * 2 * 12 * case.tokens**2 * 4
    assert case.bytes_needed(eager) - case.bytes_needed(triton) == eager * one_matrix_a_layer


def page_results(house: ModuleType, device: str = "cpu") -> dict[str, Any]:
    """Rows in which sdpa takes 3/4 of eager's time and 2/3 of its memory, ours half and a quarter."""
    shares = {EAGER: (1.0, 1.0), SDPA: (0.75, 2 / 3), TRITON: (0.5, 0.25), OPTIMIZED: (0.25, 0.5)}
    conditions = {
        **{"device": device, "device_name": "AMD EPYC 9B14 96-Core Processor", "threads": 2, "commit": "0123abc"},
        **{"torch": "2.13.0+cpu", "triton": None, "transformers": "5.23.0", "beit_fast": "0.1.0"},
    }
    rows, left_out = [], []
    for case in house.harness.hf_docs_cases.page_cases(device):
        for peer, (time, memory) in shares.items():
            if case.trains and peer == OPTIMIZED:
                continue
            seconds, held = 0.1 * case.batch * time, int(3e8 * memory)
            rows.append(
                {
                    **{
                        "bench": house.report.hf_docs_tables.BENCHES[device],
                        "threads": 2,
                        "case": str(case),
                        "peer": peer,
                    },
                    **dataclasses.asdict(case),
                    **{"tokens": case.tokens, "kernel": "a kernel", "errors": {"logits": 1e-7}, "median": seconds},
                    **{"iqr": 0.02 * seconds, "rounds": case.steps, "iterations": 1},
                    **{"peak_memory": held, "loaded_memory": held + 1000, "memory_before": 1000},
                }
            )
    left_out.append({"bench": rows[0]["bench"], "peer": OPTIMIZED, "reason": "is for inference", "cases": ["one"]})
    return {"conditions": conditions, "date": "2026-02-03", "rows": rows, "left_out": left_out}


def cells_of(table: str) -> list[dict[str, str]]:
    head, _, *body = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    assert len(set(head)) == len(head)
    return [dict(zip(head, line, strict=True)) for line in body]


def test_the_training_table(house: ModuleType) -> None:
    rows = [row for row in page_results(house, "cuda")["rows"] if row["mode"] == "training"]
    (line,) = cells_of(house.report.hf_docs_tables.training_table(rows))
    assert line == {
        **{"num_training_steps": "50", "batch_size": "2", "image_size": "(1048, 640)", "dtype": "fp16"},
        **{"is_cuda": "True", "Time per batch (eager - s)": "0.2000", "Time per batch (sdpa - s)": "0.1500"},
        **{"Time per batch (triton - s)": "0.1000", "SDPA speedup (%)": "33.3", "triton speedup (%)": "100.0"},
        **{"Eager peak mem (MB)": "600.0", "SDPA peak mem (MB)": "400.0", "triton peak mem (MB)": "150.0"},
        **{"SDPA mem saving (%)": "50.0", "triton mem saving (%)": "300.0"},
    }


def test_the_inference_table(house: ModuleType) -> None:
    rows = [row for row in page_results(house)["rows"] if row["mode"] == "inference"]
    lines = cells_of(house.report.hf_docs_tables.inference_table(rows))
    assert [line["Image batch size"] for line in lines] == ["1", "4"]
    expected = {
        "Eager (s/iter)": "0.1000",
        "Eager ±IQR/2, %": "±1.0%",
        "SDPA speedup": "1.33",
        "triton speedup": "2.00",
    }
    expected |= {"optimized speedup": "4.00", "SDPA memory saved (%)": "50.0", "optimized memory (MB)": "300.0"}
    assert lines[0] == lines[0] | expected


def test_a_missing_number_is_a_dash(house: ModuleType) -> None:
    rows = [row for row in page_results(house)["rows"] if row["mode"] == "inference" and row["peer"] != EAGER]
    rows = [{**row, "peak_memory": None} for row in rows]
    line = cells_of(house.report.hf_docs_tables.inference_table(rows))[0]
    absent = {name for name, value in line.items() if value == "-"}
    assert absent == {name for name in line if name.startswith("Eager") or "memory" in name or "speedup" in name}


def test_plot_writes_the_tables(house: ModuleType, tmp_path: Path) -> None:
    results = page_results(house)
    house.harness.results.write_results(results, tmp_path / "run.json")
    assert house.report.plot.main([str(tmp_path / "run.json"), "--results", str(tmp_path)]) == 0
    text = (tmp_path / "amd-epyc-9b14-cpu-page.md").read_text()
    assert (tmp_path / "amd-epyc-9b14-cpu-page.json").exists()
    for condition in ("AMD EPYC 9B14", "2 threads", "torch 2.13.0+cpu", "0123abc", "2026-02-03", "`--full`"):
        assert condition in text
    assert house.report.hf_docs_tables.training_table(results["rows"][:3]) in text
    assert "- beit_fast optimized, one: is for inference" in text


PROBE = """
from .baselines import hf_docs as page_peers
from .harness.hf_docs_cases import PageCase

def test_page(race_apart, monkeypatch):
    ours = tuple(peer for peer in page_peers.PEERS if not peer.packages)
    monkeypatch.setattr(page_peers, "PEERS", ours)
    page_peers.race_page(PageCase("training", 2, 64, 48, "fp32", 2, model="tiny"), race_apart, 1)
"""


def test_a_race_writes_the_rows_that_the_tables_need(house: ModuleType, tmp_path: Path) -> None:
    """Of ours alone: to import Transformers takes each process longer than all else."""
    run = run_in_a_copy(tmp_path, PROBE, "--rows=run.jsonl")
    assert run.returncode == 0, run.stdout + run.stderr
    results = house.harness.results.read_results(tmp_path / "run.jsonl")
    (row,) = results["rows"]
    assert (row["peer"], row["rounds"], row["iterations"]) == (TRITON, 2, 1)
    assert [(entry["peer"], entry["reason"]) for entry in results["left_out"]] == [(OPTIMIZED, "is for inference")]
    (line,) = cells_of(house.report.hf_docs_tables.training_table(results["rows"]))
    assert line["num_training_steps"] == "2"
    measured = {name for name, value in line.items() if value != "-" and ("mem" in name or "Time" in name)}
    assert measured == {"Time per batch (triton - s)", "triton peak mem (MB)"}
