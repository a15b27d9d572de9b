"""`beit-fast classify`: which images fail, what the scores are, and what is printed when."""

import csv
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from beit_fast import BeitForImageClassification, BeitImageProcessor
from beit_fast.cli import main
from beit_fast.cli.forward import class_entries
from beit_fast.models.class_scores import class_scores, problem_type_of

from ..support.prediction import LABELS, save_checkpoint, save_image

MODES = ("RGB", "L", "LA", "RGBA", "P", "1", "CMYK", "I;16", "YCbCr")


def classify(capsys, model, *arguments):
    code = main.main(["classify", *map(str, arguments), "--model", str(model), "--device", "cpu"])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture
def photographs(tmp_path):
    return [save_image(tmp_path / f"{index}.png", index, size) for index, size in enumerate([(40, 30), (33, 50)])]


@pytest.mark.parametrize("size", [(3, 2000), (2000, 3), (4, 7), (1, 1), (1, 300), (3, 3)])
def test_classify_image_as_thin_as_its_channels_equals_the_processor(size, model, photographs, tmp_path, capsys):
    thin = tmp_path / "thin.png"
    Image.new("RGB", size, (200, 30, 90)).save(thin)
    code, out, _ = classify(capsys, model, *photographs, thin, "--json")
    assert code == 0
    results = json.loads(out)["results"]
    assert [result["image"] for result in results] == [*map(str, photographs), str(thin)]
    pixels = BeitImageProcessor(size={"height": 32, "width": 32})(thin, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        logits = BeitForImageClassification.from_pretrained(model)(pixels).logits[0]
    expected = logits.softmax(-1).topk(5)
    assert [entry["index"] for entry in results[-1]["classes"]] == expected.indices.tolist()
    assert [entry["probability"] for entry in results[-1]["classes"]] == pytest.approx(
        expected.values.tolist(), rel=1e-4
    )


@pytest.mark.parametrize("mode", MODES)
def test_classify_and_predict_agree_on_every_mode(mode, model, tmp_path, capsys):
    suffix = {"CMYK": "tiff", "YCbCr": "jpg"}.get(mode, "png")
    file = save_image(tmp_path / "images" / "a.png", 0, (40, 30))
    with Image.open(file) as picture:
        gray = np.asarray(picture.convert("L")).astype(np.uint16)
        converted = Image.fromarray(257 * gray) if mode == "I;16" else picture.convert(mode)
    file.unlink()
    converted.save(tmp_path / "images" / f"a.{suffix}")
    out = tmp_path / "out.jsonl"
    options = ["--model", str(model), "--device", "cpu"]
    assert main.main(["predict", str(tmp_path / "images"), str(out), *options]) == 0
    capsys.readouterr()
    code, text, _ = classify(capsys, model, tmp_path / "images" / f"a.{suffix}", "--json")
    assert code == 0
    assert json.loads(text)["results"][0]["classes"] == json.loads(out.read_text())["classes"]


@pytest.mark.parametrize("form", ["text", "json", "csv"])
def test_classify_image_that_the_processor_refuses_fails_alone(form, photographs, tmp_path, capsys):
    """Its size is that of no patch, since the processor does not resize."""
    save_checkpoint(tmp_path / "model")
    BeitImageProcessor(do_resize=False).save_pretrained(tmp_path / "model")
    small, wide = tmp_path / "small.png", tmp_path / "float.tiff"
    Image.new("RGB", (3, 5)).save(small)
    Image.new("F", (40, 40)).save(wide)
    options = [] if form == "text" else [f"--{form}"]
    code, out, err = classify(capsys, tmp_path / "model", photographs[0], small, wide, photographs[1], *options)
    assert code == 1
    assert all(str(path) in out for path in photographs)
    assert f"failed: {small}: images of 5x3 pixels are smaller than one patch of 8x8" in err
    assert f"failed: {wide}: has mode 'F', floating point without a fixed range (expected an image file of 8" in err
    if form == "json":
        assert [failure["image"] for failure in json.loads(out)["failures"]] == [str(small), str(wide)]


def test_classify_empty_path_is_not_the_current_folder(model, photographs, capsys):
    code, _, err = classify(capsys, model, photographs[0], "")
    assert code == 1
    assert "the path is empty (expected an image file)" in err


def test_classify_folder_fails_and_names_predict(model, photographs, tmp_path, capsys):
    code, out, err = classify(capsys, model, photographs[0], tmp_path)
    assert code == 1
    assert str(photographs[0]) in out
    assert f"failed: {tmp_path}: is a folder (expected an image file; for a folder: beit-fast predict)" in err


@pytest.mark.parametrize("form", ["text", "json"])
def test_classify_error_of_the_model_keeps_the_results_before_it(form, model, photographs, capsys, monkeypatch):
    forward, calls = BeitForImageClassification.forward, []

    def fail(self, *arguments, **options):
        calls.append(None)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return forward(self, *arguments, **options)

    monkeypatch.setattr(BeitForImageClassification, "forward", fail)
    options = ["--json"] if form == "json" else []
    code, out, err = classify(capsys, model, *photographs, "--batch-size", 1, *options)
    assert code == 2
    assert err.splitlines()[-1] == "beit-fast classify: out of memory"
    assert str(photographs[0]) in out
    assert str(photographs[1]) not in out
    if form == "json":
        assert [result["image"] for result in json.loads(out)["results"]] == [str(photographs[0])]


def test_classify_prints_each_batch_as_it_comes(model, photographs, capsys, monkeypatch):
    forward, printed = BeitForImageClassification.forward, []

    def spy(self, *arguments, **options):
        printed.append(capsys.readouterr().out)
        return forward(self, *arguments, **options)

    monkeypatch.setattr(BeitForImageClassification, "forward", spy)
    code, out, _ = classify(capsys, model, *photographs, "--batch-size", 1, "--top", 1)
    assert code == 0
    assert printed[0] == ""
    assert printed[1].splitlines()[0] == str(photographs[0])
    assert out.splitlines()[0] == str(photographs[1])


def test_classify_outputs_not_finite_are_a_failure(photographs, tmp_path, capsys):
    model = save_checkpoint(tmp_path / "model")
    with torch.no_grad():
        model.classifier.bias[0] = torch.nan
    model.save_pretrained(tmp_path / "model")
    code, out, err = classify(capsys, tmp_path / "model", photographs[0])
    assert (code, out) == (1, "")
    assert f"failed: {photographs[0]}: the model returned classes that are not finite" in err


def test_classify_csv_has_one_row_a_class(model, tmp_path, capsys):
    image = save_image(tmp_path / 'a "b",\nc.png', 0)
    code, out, err = classify(capsys, model, image, "--csv", "--top", 2)
    rows = list(csv.DictReader(io.StringIO(out)))
    assert code == 0
    assert [row["image"] for row in rows] == [str(image)] * 2
    assert [row["rank"] for row in rows] == ["1", "2"]
    assert [row["label"] for row in rows] == [LABELS[int(row["index"])] for row in rows]
    _, text, _ = classify(capsys, model, image, "--json", "--top", 2)
    expected = [entry["probability"] for entry in json.loads(text)["results"][0]["classes"]]
    assert [float(row["probability"]) for row in rows] == expected
    assert "attention: " in err


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({}, "single_label_classification"),
        ({"problem_type": "multi_label_classification"}, "multi_label_classification"),
        ({"problem_type": "regression"}, "regression"),
        ({"num_labels": 1, "id2label": {0: "age"}}, "regression"),
    ],
)
def test_classify_scores_follow_problem_type_and_num_labels(options, problem, photographs, tmp_path, capsys):
    model = save_checkpoint(tmp_path / "model", **options)
    assert problem_type_of(model.config) == problem
    code, out, _ = classify(capsys, tmp_path / "model", photographs[0], "--json", "--top", 2)
    assert code == 0
    pixels = BeitImageProcessor(size={"height": 32, "width": 32})(photographs[0], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        logits = model(pixels).logits[0]
    count = min(2, len(logits))
    expected = {
        "single_label_classification": [
            ("probability", *pair) for pair in zip(*logits.softmax(-1).topk(count), strict=True)
        ],
        "multi_label_classification": [
            ("probability", *pair) for pair in zip(*logits.sigmoid().topk(count), strict=True)
        ],
        "regression": [("value", value, index) for index, value in enumerate(logits)],
    }[problem]
    classes = json.loads(out)["results"][0]["classes"]
    assert len(classes) == len(expected)
    for entry, (name, value, index) in zip(classes, expected, strict=True):
        assert entry.keys() == {"index", "label", name}
        assert entry["index"] == int(index)
        assert entry[name] == pytest.approx(float(value), rel=1e-4, abs=1e-6)
    _, text, _ = classify(capsys, tmp_path / "model", photographs[0])
    assert ("%" in text) == (problem != "regression")


def test_class_scores_are_float32_of_any_dtype():
    logits = torch.tensor([[0.0, 2.0]], dtype=torch.bfloat16)
    assert torch.equal(class_scores(logits, "regression"), torch.tensor([[0.0, 2.0]]))
    torch.testing.assert_close(
        class_scores(logits, "multi_label_classification")[0], torch.tensor([0.5, 0.8808]), rtol=0, atol=1e-4
    )
    torch.testing.assert_close(
        class_scores(logits, "single_label_classification")[0], torch.tensor([0.1192, 0.8808]), rtol=0, atol=1e-4
    )


def test_class_entries_lists_at_most_all_labels(model):
    config = BeitForImageClassification.from_pretrained(model).config
    assert [entry["index"] for entry in class_entries(torch.arange(5.0), config, 9)] == [4, 3, 2, 1, 0]


@pytest.mark.parametrize("name", ["BeitModel", "BeitForMaskedImageModeling", "BeitForSemanticSegmentation"])
def test_classify_checkpoint_without_classifier_exits_with_error(name, photographs, tmp_path, capsys, recwarn):
    options = {"num_hidden_layers": 4, "out_indices": [1, 2, 3, 4], "pool_scales": (1, 2)}
    save_checkpoint(tmp_path / "model", name, **(options if "Segmentation" in name else {}))
    code, out, err = classify(capsys, tmp_path / "model", photographs[0])
    assert (code, out) == (2, "")
    assert err.startswith(f"beit-fast classify: {tmp_path / 'model'} does not contain ")
    assert "parameters of BeitForImageClassification, which would be random: " in err
    assert err.endswith("classifier.bias, classifier.weight (expected a checkpoint for image classification)\n") or (
        "pooler.layernorm.weight" in err
    )
    assert len(err.splitlines()) == 1
    assert not recwarn.list
