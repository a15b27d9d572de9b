"""`beit-fast predict` on a whole data set: what it records, in which formats, and its errors."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from beit_fast import BeitImageProcessor
from beit_fast.cli.predict.dataset import find_images

from ..support.devices import CPU_ATTENTION
from ..support.prediction import LABELS, predict, read_jsonl, save_checkpoint, save_image, save_images

DIGITS = Path(__file__).parents[2] / "examples" / "digits"
NAMES = (
    "a/same.png",
    "b/same.png",
    "ein Bild.JPG",
    "写真/日本.webp",
    "new\u2028line.png",
    "\U0001f600.bmp",
    "zero.tiff",
)
SIZE = {"height": 32, "width": 32}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder of images with names of all kinds."""
    folder = tmp_path_factory.mktemp("images")
    for index, name in enumerate(NAMES):
        save_image(folder / name, index, (30 + 7 * index, 32))
    return folder


def reference_logits(model, images):
    """Transformers' logits by name, image by image."""
    reference = transformers.BeitForImageClassification.from_pretrained(model).eval()
    processor = BeitImageProcessor(size=SIZE)
    with torch.no_grad():
        return {
            name: reference(processor(Image.open(images / name), return_tensors="pt")["pixel_values"]).logits[0]
            for name in find_images(images).paths
        }


def recorded_logits(path):
    return {record["path"]: torch.tensor(record["logits"]) for record in read_jsonl(path)}


def relative_error(mine, wanted):
    return max(((mine[name] - wanted[name]).norm() / wanted[name].norm()).item() for name in wanted)


class Spy(TorchDispatchMode):
    """Counts the fused operator's calls."""

    calls = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls += function is torch.ops.beit_fast.rel_pos_attention.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("attention", ["eager", "sdpa", "triton"])
def test_predict_logits_match_transformers(attention, model, images, tmp_path, capsys):
    out = tmp_path / "new" / "out.jsonl"
    with Spy() as spy:
        code, text, _ = predict(
            capsys, images, out, "--model", model, "--logits", "--attn", attention, "--batch-size", 3, "--json",
            "--device", "cpu",
        )  # fmt: skip
    facts = json.loads(text)
    assert code == 0
    assert facts["kernel"] == {"triton": CPU_ATTENTION}.get(attention, attention)
    assert spy.calls == (9 if attention == "triton" else 0)  # 3 batches, 3 layers
    assert facts["images"] == len(NAMES)
    assert facts["complete"] == {"images": len(NAMES), "failures": 0}
    assert facts["failures"] == []
    assert facts["images_per_second"] == pytest.approx(len(NAMES) / facts["seconds"])
    assert [record["path"] for record in read_jsonl(out)] == sorted(NAMES)
    assert relative_error(recorded_logits(out), reference_logits(model, images)) < 1e-5
    assert sorted(os.listdir(out.parent)) == ["out.jsonl", "out.jsonl.run"]
    assert sorted(os.listdir(tmp_path / "new" / "out.jsonl.run")) == ["lock", "manifest.json"]


def test_predict_without_bias_differs_from_transformers(model, images, tmp_path, capsys):
    """The comparison above has teeth: without the tables the logits are far away."""
    state = load_file(model / "model.safetensors")
    without = {key: torch.zeros_like(x) if key.endswith("bias_table") else x for key, x in state.items()}
    (tmp_path / "without").mkdir()
    for name in ("config.json", "preprocessor_config.json"):
        (tmp_path / "without" / name).write_bytes((model / name).read_bytes())
    save_file(without, tmp_path / "without" / "model.safetensors", metadata={"format": "pt"})
    out = tmp_path / "out.jsonl"
    assert predict(capsys, images, out, "--model", tmp_path / "without", "--logits", "--device", "cpu")[0] == 0
    assert relative_error(recorded_logits(out), reference_logits(model, images)) > 0.05


def test_predict_classes_are_the_most_probable(model, images, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    code, text, _ = predict(capsys, images, out, "--model", model, "--top", 2, "--device", "cpu")
    assert code == 0
    assert f"results: {out}: {len(NAMES)} images, 0 failed" in text
    assert f"{len(NAMES)} images in " in text
    assert " images/s" in text
    for record in read_jsonl(out):
        assert record.keys() == {"path", "classes", "error"}
        values, indices = reference_logits(model, images)[record["path"]].softmax(-1).topk(2)
        assert [entry["index"] for entry in record["classes"]] == indices.tolist()
        assert [entry["label"] for entry in record["classes"]] == [LABELS[index] for index in indices.tolist()]
        assert [entry["probability"] for entry in record["classes"]] == pytest.approx(values.tolist(), rel=1e-4)


@pytest.mark.parametrize(("seconds", "lines"), [(0, 3), (60, 0)])
def test_predict_without_a_terminal_logs_its_progress(seconds, lines, model, images, tmp_path, capsys, monkeypatch):
    """Regression: a long run in a batch system said nothing until its end."""
    monkeypatch.setattr("beit_fast.cli.predict.command._LOG_SECONDS", seconds)
    size = -(-len(NAMES) // 3)
    code, _, err = predict(capsys, images, tmp_path / "out.jsonl", "--model", model, "--batch-size", size)
    assert code == 0
    found = [line.split(",")[0] for line in err.splitlines() if " images/s, 0 failed" in line]
    assert found == [f"{min(n * size, len(NAMES))} of {len(NAMES)} images" for n in (1, 2, 3)][:lines]


@pytest.mark.parametrize("name", ["BeitForImageClassification", "BeitModel", "BeitForSemanticSegmentation"])
def test_predict_features_of_any_checkpoint(name, images, tmp_path, capsys):
    options = {"num_hidden_layers": 4, "out_indices": [1, 2, 3, 4], "pool_scales": (1, 2)}
    save_checkpoint(tmp_path / "model", name, **(options if "Segmentation" in name else {}))
    out = tmp_path / "out.jsonl"
    code, _, err = predict(capsys, images, out, "--model", tmp_path / "model", "--features", "--device", "cpu")
    assert code == 0
    pooler = "does not contain pooler.layernorm.bias, pooler.layernorm.weight: they have their initial values"
    assert (pooler in err) == (name == "BeitForSemanticSegmentation")
    records = {record["path"]: record["features"] for record in read_jsonl(out)}
    reference = transformers.BeitModel.from_pretrained(tmp_path / "model").eval()
    pixels = BeitImageProcessor(size=SIZE)(images / NAMES[0], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = reference(pixels).pooler_output[0]
    torch.testing.assert_close(torch.tensor(records[NAMES[0]]), expected, rtol=1e-4, atol=1e-5)


def test_predict_optimized_classifies_held_out_digits(tmp_path, capsys):
    """With trained weights, packed: digits that the shipped model has not seen."""
    out = tmp_path / "digits.jsonl"
    code, _, _ = predict(
        capsys, DIGITS / "images", out, "--model", DIGITS, "--top", 1, "--optimize", "--device", "cpu"
    )  # fmt: skip
    names = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
    records = read_jsonl(out)
    assert (code, len(records)) == (0, 20)
    assert [record["classes"][0]["label"] for record in records] == [names[int(r["path"][0])] for r in records]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_predict_optimized_calls_the_operator_and_matches_transformers(dtype, model, images, tmp_path, capsys):
    with Spy() as spy:
        code, _, _ = predict(
            capsys, images, tmp_path / "out.jsonl", "--model", model, "--logits", "--optimize", "--dtype", dtype,
            "--attn", "triton", "--device", "cpu",
        )  # fmt: skip
    assert code == 0
    assert spy.calls > 0
    bound = {"float32": 1e-5, "bfloat16": 5e-2}[dtype]
    assert relative_error(recorded_logits(tmp_path / "out.jsonl"), reference_logits(model, images)) < bound


@pytest.mark.parametrize("output", [("--top", 3), ("--logits",), ("--features",)])
def test_predict_parquet_equals_jsonl(output, model, images, tmp_path, capsys):
    parquet = pytest.importorskip("pyarrow.parquet")
    folder = tmp_path / "images"
    folder.symlink_to(images)
    broken = save_image(tmp_path / "broken.png", 0)
    broken.write_bytes(broken.read_bytes()[:100])
    listed = tmp_path / "list.txt"
    listed.write_text("\n".join(["broken.png", *(f"images/{name}" for name in NAMES if "\u2028" not in name)]))
    for name in ("out.jsonl", "out.parquet"):
        code, _, _ = predict(
            capsys, listed, tmp_path / name, "--model", model, *output, "--batch-size", 4, "--device", "cpu"
        )
        assert code == 1
    table = parquet.read_table(tmp_path / "out.parquet")
    assert table.column_names == ["path", output[0].strip("-").replace("top", "classes"), "error"]
    assert table.to_pylist() == read_jsonl(tmp_path / "out.jsonl")


def test_predict_parquet_without_pyarrow_exits_with_error(model, images, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    code, out, err = predict(capsys, images, tmp_path / "out.parquet", "--model", model)
    assert (code, out) == (2, "")
    assert "pip install 'beit-fast[parquet]'" in err
    assert not list(tmp_path.iterdir())


def test_predict_unreadable_images_are_recorded(model, tmp_path, capsys):
    save_images(tmp_path / "images", 5)
    (tmp_path / "images" / "empty.png").touch()
    (tmp_path / "images" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    cut = save_image(tmp_path / "images" / "cut.png", 0)
    cut.write_bytes(cut.read_bytes()[:200])
    out = tmp_path / "out.jsonl"
    code, text, err = predict(
        capsys, tmp_path / "images", out, "--model", model, "--batch-size", 2, "--json", "--device", "cpu"
    )
    assert code == 1
    errors = {record["path"]: record["error"] for record in read_jsonl(out) if record["error"]}
    assert errors.keys() == {"empty.png", "gone.png", "cut.png"}
    assert {failure["image"]: failure["reason"] for failure in json.loads(text)["failures"]} == errors
    assert json.loads(text)["complete"] == {"images": 8, "failures": 3}
    assert errors["gone.png"] == "cannot be read: there is no such file"
    assert "does not recognize its format" in errors["empty.png"]
    assert "damaged or truncated" in errors["cut.png"]
    assert str(tmp_path) not in out.read_text()
    for name, reason in errors.items():
        assert f"failed: {name}: {reason}" in err
    assert all((record["classes"] is None) == (record["path"] in errors) for record in read_jsonl(out))


def test_predict_outputs_not_finite_are_recorded_as_errors(tmp_path, capsys):
    """float16 overflows for some images only: their numbers are not passed on."""
    model = save_checkpoint(tmp_path / "model")
    with torch.no_grad():
        model.classifier.bias[0] = torch.inf
    model.save_pretrained(tmp_path / "model")
    save_images(tmp_path / "images", 2)
    arguments = (tmp_path / "images", tmp_path / "out.jsonl", "--model", tmp_path / "model", "--device", "cpu")
    assert predict(capsys, *arguments)[0] == 1
    assert [record["error"] for record in read_jsonl(tmp_path / "out.jsonl")] == [
        "the model returned classes that are not finite"
    ] * 2


def test_predict_images_of_several_sizes_without_resizing(tmp_path, capsys):
    model = save_checkpoint(tmp_path / "model")
    processor = BeitImageProcessor(do_resize=False)
    processor.save_pretrained(tmp_path / "model")
    sizes = {"a.png": (32, 32), "b.png": (48, 40), "c.png": (32, 32), "d.png": (64, 3 * 8), "e.png": (8, 8)}
    for index, (name, size) in enumerate({**sizes, "small.png": (8, 3)}.items()):
        save_image(tmp_path / "images" / name, index, size)
    out = tmp_path / "out.jsonl"
    code, _, err = predict(
        capsys, tmp_path / "images", out, "--model", tmp_path / "model", "--logits", "--device", "cpu"
    )
    assert code == 1
    assert "failed: small.png: images of 8x3 pixels are smaller than one patch of 8x8" in err
    *records, small = read_jsonl(out)
    assert small["logits"] is None
    assert [record["path"] for record in records] == list(sizes)
    for name, found in ((record["path"], torch.tensor(record["logits"])) for record in records):
        with torch.no_grad():
            expected = model(**processor(Image.open(tmp_path / "images" / name), return_tensors="pt")).logits[0]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_predict_weights_file_equals_its_folder(model, images, tmp_path, capsys):
    for name, checkpoint in (("folder", model), ("file", model / "model.safetensors")):
        assert predict(capsys, images, tmp_path / f"{name}.jsonl", "--model", checkpoint, "--device", "cpu")[0] == 0
    assert (tmp_path / "folder.jsonl").read_bytes() == (tmp_path / "file.jsonl").read_bytes()


def test_predict_list_reads_its_images(model, images, tmp_path, capsys):
    """Relative to the list, or absolute; each once; missing ones are failures; hidden and odd names are taken."""
    save_image(tmp_path / "near" / ".hidden.png", 0)
    save_image(tmp_path / "near" / "no suffix.png", 1).rename(tmp_path / "near" / "no suffix")
    far = str(images / NAMES[0])
    listed = tmp_path / "near" / "list.txt"
    listed.write_bytes(f"\ufeffno suffix\r\n\r\n./.hidden.png\n{far}\n{far}\nmissing.png\nno suffix".encode())
    out = tmp_path / "out.jsonl"
    code, _, err = predict(capsys, listed, out, "--model", model, "--device", "cpu")
    records = {record["path"]: record["error"] for record in read_jsonl(out)}
    assert code == 1
    assert list(records) == sorted([".hidden.png", far, "missing.png", "no suffix"])
    assert [name for name, error in records.items() if error] == ["missing.png"]
    assert "left out: 2 repeated lines" in err


def test_find_images_in_a_folder_selects_by_suffix(tmp_path):
    save_images(tmp_path, 4)
    for name in ("notes.txt", ".hidden.png", ".folder/hidden.png", "png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    os.mkfifo(tmp_path / "pipe.png")  # reading it would wait for ever
    (tmp_path / "part" / "up").symlink_to(tmp_path)
    (tmp_path / "linked").symlink_to(tmp_path / "part")
    found = find_images(tmp_path)
    assert found.paths == ("001.png", "002.png", "linked/000.png", "linked/003.png", "part/000.png", "part/003.png")
    assert found.note == "left out: 2 files with other suffixes"


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have Unicode names only")
def test_predict_names_not_utf8_need_jsonl(model, tmp_path, capsys):
    name = os.fsdecode(b"caf\xe9 \xc3\xa9.png")
    save_image(tmp_path / "images" / "x.png", 0).rename(tmp_path / "images" / name)
    out = tmp_path / "out.jsonl"
    assert predict(capsys, tmp_path / "images", out, "--model", model, "--device", "cpu")[0] == 0
    assert [record["path"] for record in read_jsonl(out)] == [name]
    out.read_bytes().decode("utf-8")
    pytest.importorskip("pyarrow")
    code, _, err = predict(capsys, tmp_path / "images", tmp_path / "out.parquet", "--model", model)
    assert code == 2
    assert "not UTF-8" in err
    assert "caf" in err


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ("nowhere", "there is no such file or folder (expected a folder, or a text file"),
        ("empty", "does not contain images: none of its 1 files ends in"),
        ("empty/list.txt", "is empty (expected one path per line)"),
        ("image.png", "is an image (expected a folder of images"),
        ("binary", "is not a text file (expected a folder of images"),
    ],
)
def test_predict_without_images_exits_with_error(dataset, message, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "list.txt").write_text("\n \n")
    save_image(tmp_path / "image.png", 0)
    (tmp_path / "binary").write_bytes(bytes(100))
    before = sorted(tmp_path.rglob("*"))
    code, out, err = predict(capsys, tmp_path / dataset, tmp_path / "out.jsonl", "--model", "unused")
    assert (code, out) == (2, "")
    assert message in err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("out.txt",), "is not supported (expected .jsonl, .ndjson, .parquet, .pq, or --format)"),
        (("out.jsonl", "--format", "parquet"), "means jsonl, but --format is parquet"),
        (("folder.jsonl",), "is a folder"),
        (("exists.jsonl",), "exists, but 'exists.jsonl.run' beside it does not"),
        (("out.jsonl", "--device", "cpu", "--dtype", "int8"), "dtype"),
    ],
)
def test_predict_wrong_out_exits_with_error(arguments, message, model, images, tmp_path, capsys):
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "exists.jsonl").write_text("precious")
    code, out, err = predict(capsys, images, tmp_path / arguments[0], "--model", model, *arguments[1:])
    assert (code, out) == (2, "")
    assert message in err
    assert sorted(os.listdir(tmp_path)) == ["exists.jsonl", "folder.jsonl"]
    assert (tmp_path / "exists.jsonl").read_text() == "precious"


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
@pytest.mark.parametrize(("problem", "key"), [("regression", "value"), ("multi_label_classification", "probability")])
def test_predict_scores_follow_the_problem_type(problem, key, form, images, tmp_path, capsys):
    save_checkpoint(tmp_path / "model", problem_type=problem)
    out = tmp_path / f"out.{form}"
    assert predict(capsys, images, out, "--model", tmp_path / "model", "--top", 2, "--device", "cpu")[0] == 0
    records = read_jsonl(out) if form == "jsonl" else pytest.importorskip("pyarrow.parquet").read_table(out).to_pylist()
    for record in records:
        logits = reference_logits(tmp_path / "model", images)[record["path"]]
        if problem == "regression":
            values, indices = logits, torch.arange(5)
        else:
            values, indices = logits.sigmoid().topk(2)
        assert [entry["index"] for entry in record["classes"]] == indices.tolist()
        assert [entry.keys() for entry in record["classes"]] == [{"index", "label", key}] * len(indices)
        assert [entry[key] for entry in record["classes"]] == pytest.approx(values.tolist(), rel=1e-4, abs=1e-5)


def test_predict_checkpoint_without_classifier_exits_with_error(images, tmp_path, capsys, recwarn):
    save_checkpoint(tmp_path / "model", "BeitForMaskedImageModeling")
    code, out, err = predict(capsys, images, tmp_path / "out.jsonl", "--model", tmp_path / "model")
    assert (code, out) == (2, "")
    assert "does not contain 4 parameters of BeitForImageClassification, which would be random: " in err
    assert "classifier.bias, classifier.weight" in err
    assert "--features" in err
    assert not recwarn.list
    assert sorted(os.listdir(tmp_path)) == ["model"]
