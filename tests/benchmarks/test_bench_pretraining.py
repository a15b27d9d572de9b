"""The pre-training benchmark: its batches, its step and its targets."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from benchmarks.baselines import pretraining
from benchmarks.harness.pretraining_cases import (
    BENCHES,
    PretrainingCase,
    masked_images,
    our_masked_model,
    pretraining_cases,
    pretraining_reference,
    set_drop_path,
)
from benchmarks.harness.results import file_name
from benchmarks.report import plot_models, targets

TINY = PretrainingCase("tiny", 48, 2, "fp32")
CONDITIONS = {"device": "cpu", "device_name": "A CPU", "threads": 2, "commit": "0123abc", "torch": "2.13.0"}


def test_masked_images_hide_75_of_196_patches_alike_in_each_dtype() -> None:
    batches = [masked_images(PretrainingCase("base", 224, 4, dtype)) for dtype in ("fp32", "bf16")]
    assert batches[0].mask.sum(1).tolist() == [75] * 4
    assert batches[0].labels.shape == (300,)
    for name in ("pixels", "mask", "labels"):
        assert torch.equal(*(getattr(batch, name) for batch in batches))
    assert [part.labels.shape for part in batches[0].split()] == [(75,)] * 4


def test_set_drop_path_returns_the_rates_before() -> None:
    model = our_masked_model(TINY, "eager")
    assert set_drop_path(model, 0.0) == [0.1]
    assert set_drop_path(model, [0.3]) == [0.0]
    assert set_drop_path(model, 0.0) == [0.3]


def test_prepare_restores_drop_path_and_the_step_updates_every_parameter(tmp_path: Any, monkeypatch: Any) -> None:
    built = []
    ours = dataclasses.replace(
        pretraining.BASELINES[0], build=lambda case: built.append(our_masked_model(case, "sdpa")) or built[0]
    )
    monkeypatch.setattr(pretraining, "BASELINES", (ours,))
    torch.save(vars(pretraining_reference(TINY)), tmp_path / "reference.pt")
    prepared = pretraining.prepare(ours.name, str(tmp_path / "reference.pt"), **dataclasses.asdict(TINY))
    (model,) = built
    assert set_drop_path(model, 0.1) == [0.1]
    before = {name: p.clone() for name, p in model.named_parameters()}
    assert prepared.facts["loss"] == pytest.approx(9.0, abs=0.2)
    assert torch.isfinite(prepared.step())
    assert not [name for name, p in model.named_parameters() if torch.equal(p, before[name]) or p.grad is not None]


def test_parameter_without_gradient_is_wrong() -> None:
    model = our_masked_model(TINY, "eager")
    model.beit.embeddings.mask_token.requires_grad_(False)
    with pytest.raises(ValueError, match=r"wrong and not timed\. No gradient for .*mask_token"):
        pretraining.results_of(TINY, model, masked_images(TINY))


def test_targets_of_pretraining_are_those_of_fp32(tmp_path: Any) -> None:
    cases = pretraining_cases("cpu")
    assert {(case.batch, case.dtype) for case in cases} == {(4, "fp32"), (4, "bf16"), (8, "fp32"), (8, "bf16")}
    speeds = {"beit_fast triton": 1.5, "transformers sdpa": 1.0, "transformers eager": 1.1}
    measured = {"bench": BENCHES["cpu"], "threads": 2, "kernel": "cpp", "rounds": 5, "range": [0.5, 2.0]}
    measured |= {"peak_memory": 1 << 20, "loaded_memory": 1 << 30, "images_per_second": 1.0}
    rows = [
        {
            **dataclasses.asdict(case),
            **measured,
            "case": str(case),
            "tokens": 197,
            "baseline": name,
            "median": 1 / speed,
        }
        for case in cases
        for name, speed in speeds.items()
    ]
    content = {"conditions": {**CONDITIONS, "beit_fast": "0.1.0"}, "date": "2026-02-03", "rows": rows, "left_out": []}
    found = [(v.target.baseline, v.met, round(v.ratio or 0, 2)) for v in targets.judge(content)]
    assert found == [("transformers sdpa", True, 1.5)] * 2 + [("transformers eager", False, 1.36)] * 2
    caption = " ".join(plot_models.model_caption(content, 200).split())
    assert "One bias table for all layers" in caption
    assert "fused AdamW" in caption
    assert plot_models.draw_models(content, tmp_path / "picture.png").stat().st_size > 20_000
    assert file_name(content["conditions"], BENCHES["cpu"]) == "a-cpu-pre-training"
