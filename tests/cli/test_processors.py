"""The image processors of the commands: found, named, written, or one error; never guessed."""

import argparse
import json
from pathlib import Path

import pytest
import torch

from beit_fast import BeitConfig, BeitForImageClassification, BeitForSemanticSegmentation, BeitImageProcessor
from beit_fast.cli import main

from ..support.models import MEAN, STD
from ..support.prediction import save_image
from ..support.transformers_reference import TINY, randomize
from .test_commands import SEGMENTATION, save

DIGITS = Path(__file__).parents[2] / "examples" / "digits"
SIZE = {"height": 32, "width": 32}


@pytest.fixture
def model(tmp_path):
    """A classifier without an image processor, in the folder `m`."""
    model = BeitForImageClassification(BeitConfig(**(TINY | {"use_relative_position_bias": True}))).eval()
    randomize(model)
    model.save_pretrained(tmp_path / "m")
    return model


@pytest.fixture
def image(tmp_path):
    return save_image(tmp_path / "image.png", seed=0, size=(40, 30))


def run(capsys, *arguments):
    code = main.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def top(capsys, image, folder, *options):
    """The most probable class of an image by the command: index and probability."""
    code, out, err = run(
        capsys, "classify", image, "--model", folder, "--top", 1, "--json", "--device", "cpu", *options
    )
    assert code == 0, err
    entry = json.loads(out)["results"][0]["classes"][0]
    return entry["index"], pytest.approx(entry["probability"], rel=1e-4)


def expected(model, image, processor):
    with torch.no_grad():
        probabilities = model(processor(image, return_tensors="pt")["pixel_values"]).logits.softmax(-1)[0]
    return probabilities.argmax().item(), probabilities.max().item()


def written(folder):
    return BeitImageProcessor.from_pretrained(folder)


def save_timm_config(folder, **entries):
    """Replace `config.json` by one of timm's hub repositories."""
    cfg = {"input_size": [3, 32, 32], "mean": MEAN, "std": STD, "interpolation": "bilinear", "crop_pct": 0.8} | entries
    config = {"architecture": "beitv2_base_patch16_224", "num_classes": 5, "pretrained_cfg": cfg}
    (folder / "config.json").write_text(json.dumps(config))


def test_classify_uses_the_pixel_normalization_of_the_model(tmp_path, model, image, capsys):
    """Regression: mean and standard deviation were 0.5, though the model stored others."""
    model.set_pixel_normalization(MEAN, STD)
    model.save_pretrained(tmp_path / "m")
    right = BeitImageProcessor(size=SIZE, image_mean=MEAN, image_std=STD)
    assert top(capsys, image, tmp_path / "m") == expected(model, image, right)
    assert expected(model, image, right) != pytest.approx(expected(model, image, BeitImageProcessor(size=SIZE)))


@pytest.mark.parametrize("place", ["folder", "file", "flat"])
def test_classify_uses_the_pretrained_cfg_of_timm(tmp_path, model, image, capsys, place):
    """timm resizes the short edge to 32 / 0.8 = 40 pixels, then crops 32 from the center."""
    save_timm_config(tmp_path / "m")
    if place == "flat":  # as older versions of timm wrote it
        config = json.loads((tmp_path / "m" / "config.json").read_text())
        (tmp_path / "m" / "config.json").write_text(json.dumps({**config, **config.pop("pretrained_cfg")}))
    options = {"resample": "bilinear", "size": {"shortest_edge": 40}, "do_center_crop": True, "crop_size": SIZE}
    right = BeitImageProcessor(**options, image_mean=MEAN, image_std=STD)
    source = tmp_path / "m" / "model.safetensors" if place == "file" else tmp_path / "m"
    model = BeitForImageClassification.from_pretrained(source)  # eps of timm
    assert top(capsys, image, source) == expected(model, image, right)


def test_commands_use_the_options_in_a_file_of_timm(tmp_path, model, image, capsys):
    """timm's training script saves its options beside the weights, as an `argparse.Namespace`."""
    file = tmp_path / "model_best.pth.tar"
    options = argparse.Namespace(mean=MEAN, std=STD, crop_pct=0.8, crop_mode=None, interpolation="bilinear")
    torch.save({"arch": "beit", "args": options, "state_dict": model.state_dict()}, file)
    names = {"resample": "bilinear", "size": {"shortest_edge": 40}, "do_center_crop": True, "crop_size": SIZE}
    right = BeitImageProcessor(**names, image_mean=MEAN, image_std=STD)
    assert top(capsys, image, file) == expected(BeitForImageClassification.from_pretrained(file), image, right)
    assert run(capsys, "convert", file, tmp_path / "out", "--task", "image-classification")[0] == 0
    assert written(tmp_path / "out").to_dict() == right.to_dict()


@pytest.mark.parametrize("command", ["classify", "segment", "predict"])
def test_unknown_preprocessing_is_one_error_that_names_the_option(tmp_path, image, capsys, command):
    if command == "segment":
        save(BeitForSemanticSegmentation, tmp_path / "m", **SEGMENTATION)
    else:
        save(BeitForImageClassification, tmp_path / "m")
    (tmp_path / "m" / "preprocessor_config.json").unlink()
    places = {
        "classify": [image],
        "segment": [image, "--out", tmp_path / "o.png"],
        "predict": [tmp_path, tmp_path / "o.jsonl"],
    }
    code, out, err = run(capsys, command, *places[command], "--model", tmp_path / "m", "--device", "cpu")
    assert (code, out) == (2, "")
    line = err.splitlines()[-1]
    assert line.startswith(f"beit-fast {command}: the preprocessing of '{tmp_path / 'm'}' is not known")
    for part in ("preprocessor_config.json", "pixel_mean", "pretrained_cfg", "--processor"):
        assert part in line, part
    assert not list(tmp_path.glob("o.*"))


@pytest.mark.parametrize("form", ["folder", "file"])
def test_processor_option_names_the_preprocessing(tmp_path, model, image, capsys, form):
    right = BeitImageProcessor(size=SIZE, image_mean=MEAN, image_std=STD, resample="nearest")
    file = right.save_pretrained(tmp_path / "p")[0]
    named = tmp_path / "p" if form == "folder" else file
    assert top(capsys, image, tmp_path / "m", "--processor", named) == expected(model, image, right)


def test_processor_option_replaces_that_of_the_checkpoint(tmp_path, model, image, capsys):
    BeitImageProcessor(size=SIZE).save_pretrained(tmp_path / "m")
    right = BeitImageProcessor(size=SIZE, image_mean=MEAN, image_std=STD)
    right.save_pretrained(tmp_path / "p")
    assert top(capsys, image, tmp_path / "m", "--processor", tmp_path / "p") == expected(model, image, right)


def test_preprocessing_that_is_not_supported_is_one_error(tmp_path, model, image, capsys):
    save_timm_config(tmp_path / "m", interpolation="random", crop_pct=7, crop_mode="border")
    code, out, err = run(capsys, "classify", image, "--model", tmp_path / "m", "--device", "cpu")
    assert (code, out) == (2, "")
    for part in ("interpolation='random'", "crop_pct=7", "crop_mode='border'", "--processor"):
        assert part in err, part
    (tmp_path / "m" / "preprocessor_config.json").write_text('{"image_processor_type": "DPTImageProcessor"}')
    code, _, err = run(capsys, "classify", image, "--model", tmp_path / "m", "--device", "cpu")
    assert code == 2
    assert "options of DPTImageProcessor are not supported" in err
    assert "--processor" in err


def test_convert_keeps_the_image_processor(tmp_path, capsys):
    """Regression: 87.6 % from the source were 67.3 % from the converted checkpoint."""
    assert run(capsys, "convert", DIGITS, tmp_path / "out")[0] == 0
    digit = DIGITS / "images" / "8_28.png"
    assert top(capsys, digit, tmp_path / "out") == top(capsys, digit, DIGITS)
    assert written(tmp_path / "out").to_dict() == written(DIGITS).to_dict()


def test_convert_with_image_size_fits_the_processor(tmp_path, model, capsys):
    BeitImageProcessor(size=SIZE, image_mean=MEAN, image_std=STD, note="kept").save_pretrained(tmp_path / "m")
    assert run(capsys, "convert", tmp_path / "m", tmp_path / "wide", "--image-size", "48x64")[0] == 0
    wide = written(tmp_path / "wide")
    assert (wide.size, wide.image_mean, wide.other_fields) == ({"height": 48, "width": 64}, MEAN, {"note": "kept"})
    assert written(tmp_path / "m").size == SIZE


def test_convert_writes_the_pretrained_cfg_of_timm(tmp_path, model, capsys):
    """Regression: mean and standard deviation of timm's files were dropped."""
    save_timm_config(tmp_path / "m")
    task = ("--task", "image-classification")
    assert run(capsys, "convert", tmp_path / "m", tmp_path / "out", *task)[0] == 0
    found = written(tmp_path / "out")
    assert (found.image_mean, found.image_std) == (MEAN, STD)
    assert (found.size, found.do_center_crop, found.crop_size) == ({"shortest_edge": 40}, True, SIZE)
    assert run(capsys, "convert", tmp_path / "m", tmp_path / "large", *task, "--image-size", 64)[0] == 0
    assert written(tmp_path / "large").size == {"shortest_edge": 80}
    save_timm_config(tmp_path / "m", crop_mode="squash", crop_pct=1.0)
    assert run(capsys, "convert", tmp_path / "m", tmp_path / "squash", *task)[0] == 0
    assert (written(tmp_path / "squash").size, written(tmp_path / "squash").do_center_crop) == (SIZE, False)


def test_convert_with_unknown_preprocessing_says_so_and_writes_none(tmp_path, model, capsys):
    code, _, err = run(capsys, "convert", tmp_path / "m", tmp_path / "out")
    assert code == 0
    assert "no image processor was written; pass --processor" in err
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]
    named = ("--processor", DIGITS)
    assert run(capsys, "convert", tmp_path / "m", tmp_path / "named", *named)[0] == 0
    assert written(tmp_path / "named").to_dict() == written(DIGITS).to_dict()


def test_convert_does_not_leave_the_processor_of_another_checkpoint(tmp_path, model, capsys):
    BeitImageProcessor(size=99).save_pretrained(tmp_path / "out")
    code, _, err = run(capsys, "convert", tmp_path / "m", tmp_path / "out")
    assert code == 2
    assert "of another checkpoint; remove it, or pass --processor" in err
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["preprocessor_config.json"]
