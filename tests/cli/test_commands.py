"""`beit-fast classify`, `segment` and `convert`, as a user runs them, against the same steps in Python."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from beit_fast import BeitConfig, BeitForImageClassification, BeitForSemanticSegmentation
from beit_fast.cli import main
from beit_fast.cli.devices import usable_device
from beit_fast.cli.overlay import class_color
from beit_fast.image_processing import BeitImageProcessor

from ..support.devices import CPU_ATTENTION, DEFAULT_ATTENTION
from ..support.transformers_reference import TINY, randomize

DIGITS = Path(__file__).parents[2] / "examples" / "digits"
SEGMENTATION = {"num_hidden_layers": 4, "out_indices": [1, 2, 3, 4], "auxiliary_channels": 6, "pool_scales": (1, 2)}


def save(cls, folder, **options):
    model = cls(BeitConfig(**(TINY | {"use_relative_position_bias": True} | options))).eval()
    randomize(model)
    model.save_pretrained(folder)
    BeitImageProcessor(size=model.config.image_height_width).save_pretrained(folder)
    return model


@pytest.fixture
def photographs(tmp_path):
    generator = np.random.default_rng(0)
    paths = []
    for index, size in enumerate([(40, 30), (33, 50), (64, 64)]):
        path = tmp_path / f"{index}.png"
        Image.fromarray(generator.integers(0, 256, (*size, 3), dtype=np.uint8)).save(path)
        paths.append(str(path))
    return paths


def run(capsys, *arguments):
    code = main.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize("attention", ["eager", "sdpa", "triton"])
def test_classify_matches_the_model(tmp_path, photographs, capsys, attention):
    model = save(
        BeitForImageClassification, tmp_path / "model", id2label={i: f"class {i}" for i in range(5)}, num_labels=5
    )
    code, out, _ = run(
        capsys, "classify", *photographs, "--model", tmp_path / "model", "--attn", attention, "--json", "--top", 2,
        "--batch-size", 2, "--device", "cpu",
    )  # fmt: skip
    assert code == 0
    answer = json.loads(out)
    assert answer["kernel"] == {"triton": CPU_ATTENTION}.get(attention, attention)
    assert [result["image"] for result in answer["results"]] == photographs
    processor = BeitImageProcessor(size={"height": 32, "width": 32})
    pixels = processor([Image.open(path) for path in photographs], return_tensors="pt")["pixel_values"]
    probabilities = model(pixels).logits.softmax(-1)
    for result, row in zip(answer["results"], probabilities, strict=True):
        values, indices = row.topk(2)
        assert [entry["index"] for entry in result["classes"]] == indices.tolist()
        assert [entry["label"] for entry in result["classes"]] == [f"class {i}" for i in indices.tolist()]
        assert [entry["probability"] for entry in result["classes"]] == pytest.approx(values.tolist(), rel=1e-4)


def test_classify_prints_readable_text(tmp_path, photographs, capsys):
    save(BeitForImageClassification, tmp_path / "model")
    code, out, err = run(
        capsys, "classify", photographs[0], "--model", tmp_path / "model", "--top", 1, "--device", "cpu"
    )
    first, second = out.splitlines()
    assert code == 0
    assert first == photographs[0]
    assert "%" in second
    assert err.splitlines() == [f"attention: {DEFAULT_ATTENTION}"]


def test_classify_unreadable_images_are_named(tmp_path, photographs, capsys):
    save(BeitForImageClassification, tmp_path / "model")
    broken = tmp_path / "broken.png"
    broken.write_bytes(Path(photographs[0]).read_bytes()[:100])
    code, out, err = run(
        capsys, "classify", broken, photographs[1], tmp_path / "none.png", "--model", tmp_path / "model", "--json",
        "--device", "cpu",
    )  # fmt: skip
    answer = json.loads(out)
    assert code == 1
    assert [result["image"] for result in answer["results"]] == [photographs[1]]
    assert [failure["image"] for failure in answer["failures"]] == [str(broken), str(tmp_path / "none.png")]
    none_line, broken_line = err.splitlines()  # missing files are named before the model is loaded
    assert broken_line.startswith(f"failed: {broken}: cannot be decoded, the file is damaged or truncated")
    assert none_line == f"failed: {tmp_path / 'none.png'}: cannot be read: there is no such file"


@pytest.mark.parametrize("form", ["text", "json"])
def test_classify_without_a_readable_image_names_no_kernel(tmp_path, capsys, form):
    save(BeitForImageClassification, tmp_path / "model")
    options = ["--json"] if form == "json" else []
    none = tmp_path / "none.png"
    code, out, err = run(capsys, "classify", none, "--model", tmp_path / "model", "--device", "cpu", *options)
    assert code == 1
    if form == "json":
        assert json.loads(out)["kernel"] is None
    else:
        assert out == ""
        assert "attention" not in err


def test_segment_unreadable_image_is_named_once(tmp_path, capsys):
    save(BeitForSemanticSegmentation, tmp_path / "model", **SEGMENTATION)
    none, out = tmp_path / "none.png", tmp_path / "overlay.png"
    code, _, err = run(capsys, "segment", none, "--model", tmp_path / "model", "--out", out, "--device", "cpu")
    assert code == 2
    assert err == f"beit-fast segment: {str(none)!r} cannot be read: there is no such file\n"


@pytest.mark.parametrize("command", ["classify", "segment", "predict"])
@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("nope", "--device 'nope' is not supported (expected cpu, cuda or cuda:INDEX)"),
        ("meta", "--device 'meta' cannot be used here (expected cpu, cuda or cuda:INDEX)"),
        ("cuda", "--device 'cuda' cannot be used here: torch finds no CUDA device"),
        ("cuda:1", "--device 'cuda:1' cannot be used here: torch finds no CUDA device"),
    ],
)
def test_device_that_is_missing_is_one_plain_error(
    tmp_path, photographs, capsys, monkeypatch, command, device, message
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    save(BeitForSemanticSegmentation if command == "segment" else BeitForImageClassification, tmp_path / "model",
         **(SEGMENTATION if command == "segment" else {}))  # fmt: skip
    places = {
        "classify": [photographs[0]],
        "segment": [photographs[0], "--out", tmp_path / "overlay.png"],
        "predict": [tmp_path, tmp_path / "out.jsonl"],
    }
    code, out, err = run(capsys, command, *places[command], "--model", tmp_path / "model", "--device", device)
    assert (code, out) == (2, "")
    assert err.splitlines()[-1] == f"beit-fast {command}: {message}"


def test_usable_device_index_beyond_the_gpus_counts_them(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert usable_device(None) == usable_device("cuda") == torch.device("cuda")
    assert usable_device("cuda:0") == torch.device("cuda", 0)
    with pytest.raises(ValueError, match=r"--device 'cuda:1' cannot be used here: torch finds 1 CUDA device$"):
        usable_device("cuda:1")


def test_segment_writes_overlay_and_classes(tmp_path, photographs, capsys):
    model = save(BeitForSemanticSegmentation, tmp_path / "model", **SEGMENTATION)
    code, out, _ = run(
        capsys, "segment", photographs[0], "--model", tmp_path / "model", "--out", tmp_path / "new" / "overlay.png",
        "--labels", tmp_path / "labels.png", "--opacity", 1, "--json", "--device", "cpu",
    )  # fmt: skip
    assert code == 0
    answer = json.loads(out)
    assert sum(entry["share"] for entry in answer["classes"]) == pytest.approx(1.0)
    processor = BeitImageProcessor(size={"height": 32, "width": 32})
    with torch.no_grad():
        outputs = model(processor(Image.open(photographs[0]), return_tensors="pt")["pixel_values"])
    expected = processor.post_process_semantic_segmentation(outputs, [(40, 30)])[0].numpy()
    assert np.array_equal(np.array(Image.open(tmp_path / "labels.png")), expected)
    overlay = np.array(Image.open(tmp_path / "new" / "overlay.png"))
    palette = np.array([class_color(index) for index in range(5)])
    assert np.array_equal(overlay[:40, :30], palette[expected])
    assert not [path for path in tmp_path.rglob(".*") if path.is_file()]


def test_convert_rewrites_and_resizes(tmp_path, photographs, capsys):
    model = save(BeitForImageClassification, tmp_path / "model")
    code, out, _ = run(capsys, "convert", tmp_path / "model", tmp_path / "same")
    assert code == 0
    assert "BeitForImageClassification" in out
    again = load_file(tmp_path / "same" / "model.safetensors")
    assert again.keys() == model.state_dict().keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in model.state_dict().items())
    code, _, _ = run(
        capsys, "convert", tmp_path / "model", tmp_path / "wide", "--image-size", "48x64", "--dtype", "bfloat16"
    )
    resized = BeitForImageClassification.from_pretrained(tmp_path / "wide")
    assert code == 0
    assert resized.config.image_height_width == (48, 64)
    assert resized.dtype == torch.bfloat16


def test_convert_to_a_folder_that_cannot_be_made_names_it(tmp_path, capsys):
    save(BeitForImageClassification, tmp_path / "model")
    (tmp_path / "file").write_text("not a folder")
    target = tmp_path / "file" / "out"
    code, _, err = run(capsys, "convert", tmp_path / "model", target)
    assert code == 2
    assert err == f"beit-fast convert: the checkpoint cannot be written to {str(target)!r}: Not a directory\n"


def test_convert_missing_parameters_exits_with_error(tmp_path, capsys):
    save(BeitForImageClassification, tmp_path / "model")
    code, _, err = run(capsys, "convert", tmp_path / "model", tmp_path / "out", "--task", "masked-image-modeling")
    assert code == 2
    assert "would be random" in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("empty", "the folder '{}/empty' does not contain weights (expected model.safetensors or "),
        ("picture.png", "'{}/picture.png' is not a weights file (expected .safetensors, "),
        ("weights.bin", "the task of {}/weights.bin is not known: it has no config.json; pass --task (one of model, "),
        ("unnamed", "the task of {}/unnamed is not known: its config.json names no model; pass --task (one of "),
        ("other", "the task of {}/other is not known: its config.json names ['ViTModel']; pass --task (one of "),
    ],
)
def test_convert_says_why_it_cannot_know_the_task(source, message, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "picture.png")
    torch.save({}, tmp_path / "weights.bin")
    for name, architectures in (("unnamed", None), ("other", ["ViTModel"])):
        save(BeitForImageClassification, tmp_path / name)
        config = json.loads((tmp_path / name / "config.json").read_text())
        (tmp_path / name / "config.json").write_text(json.dumps({**config, "architectures": architectures}))
    code, out, err = run(capsys, "convert", tmp_path / source, tmp_path / "out", "--local-files-only")
    assert (code, out) == (2, "")
    assert err.startswith("beit-fast convert: " + message.format(tmp_path))
    assert not (tmp_path / "out").exists()


def test_convert_weights_file_finds_the_configuration_beside_it(tmp_path, capsys):
    save(BeitForImageClassification, tmp_path / "model")
    code, out, _ = run(capsys, "convert", tmp_path / "model" / "model.safetensors", tmp_path / "out")
    assert code == 0
    assert "BeitForImageClassification" in out


@pytest.mark.parametrize(
    "arguments",
    [
        ("classify", "IMAGE", "--model", "nobody/nothing"),
        ("segment", "IMAGE", "--model", "nobody/nothing", "--out", "o.png"),
    ],
)
def test_commands_missing_checkpoint_is_one_message(arguments, photographs, capsys):
    arguments = [photographs[0] if argument == "IMAGE" else argument for argument in arguments]
    code, out, err = run(capsys, *arguments, "--local-files-only", "--device", "cpu")
    assert (code, out) == (2, "")
    assert "nobody/nothing" in err
    assert "local folder" in err


@pytest.mark.parametrize("attention", ["eager", "sdpa", "triton"])
def test_classify_held_out_digits_are_correct(capsys, attention):
    """From image files to labels, with trained weights."""
    names = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    files = sorted((DIGITS / "images").glob("*.png"))
    code, out, _ = run(
        capsys, "classify", *files, "--model", DIGITS, "--attn", attention, "--json", "--top", 1, "--device", "cpu"
    )
    assert code == 0
    answers = [result["classes"][0]["label"] for result in json.loads(out)["results"]]
    assert len(files) == 20
    assert answers == [names[int(file.name.split("_")[0])] for file in files]
