"""`beit-fast segment` on several images and folders, and its legend."""

import json
import os
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont

from beit_fast.cli import main
from beit_fast.cli.legend import with_legend
from beit_fast.cli.overlay import class_color, class_shares, overlay
from beit_fast.models.segmentation import BeitForSemanticSegmentation

from ..support.prediction import save_checkpoint, save_image

SEGMENTATION = {"num_hidden_layers": 4, "out_indices": [1, 2, 3, 4], "auxiliary_channels": 6, "pool_scales": (1, 2)}
LABELS = {0: "sky", 1: "river", 2: "人物", 3: "house", 4: "tree"}


def run(capsys, *arguments):
    code = main.main(["segment", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("segmenter")
    save_checkpoint(folder, "BeitForSemanticSegmentation", id2label=LABELS, **SEGMENTATION)
    return folder


@pytest.fixture
def photographs(tmp_path):
    """A folder with three photographs, one in a subfolder, and one file that is not an image."""
    folder = tmp_path / "photographs"
    for seed, name in enumerate(("a.png", "b.png", "part/a.png")):
        save_image(folder / name, seed, (40, 30 + seed))
    (folder / "note.txt").write_text("not an image")
    return folder


@pytest.fixture
def no_model(monkeypatch):
    """Loading a model is an error of the test."""

    def load(*arguments, **options):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("beit_fast.checkpoint.loading.load_model", load)


def pictures_in(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_segment_folder_writes_what_single_images_give(segmenter, photographs, tmp_path, capsys):
    options = ["--model", segmenter, "--device", "cpu", "--json"]
    out, labels = tmp_path / "out", tmp_path / "labels"
    code, text, err = run(capsys, photographs, "--out", out, "--labels", labels, *options)
    assert code == 0
    assert f"{photographs}: left out: 1 file with other suffixes" in err
    results = json.loads(text)["results"]
    assert pictures_in(out) == pictures_in(labels) == ["a.png", "b.png", "part/a.png"]
    assert [Path(result["image"]).relative_to(photographs).as_posix() for result in results] == pictures_in(out)
    for result, name in zip(results, pictures_in(out), strict=True):
        one, classes = tmp_path / "one.png", tmp_path / "classes.png"
        code, text, _ = run(capsys, photographs / name, "--out", one, "--labels", classes, *options)
        assert code == 0
        single = json.loads(text)
        assert (single["out"], single["classes"]) == (str(one), result["classes"])
        assert (result["out"], result["labels"]) == (str(out / name), str(labels / name))
        assert one.read_bytes() == (out / name).read_bytes()
        assert classes.read_bytes() == (labels / name).read_bytes()


def test_segment_several_images_print_colors_under_their_names(segmenter, photographs, tmp_path, capsys):
    """Regression: segment accepted one image, and no output had the colors."""
    images = [photographs / "b.png", photographs / "a.png", photographs / "b.png"]
    code, text, err = run(capsys, *images, "--out", tmp_path / "out", "--model", segmenter, "--device", "cpu")
    assert code == 0
    lines = text.splitlines()
    assert [line for line in lines if "%" not in line] == [
        *(str(images[0]), f"picture: {tmp_path / 'out' / 'b.png'}"),
        *(str(images[1]), f"picture: {tmp_path / 'out' / 'a.png'}"),
    ]
    for line in lines:
        if "%" in line:
            _, _, index, color, label = line.split()
            assert (color, label) == ("#" + bytes(class_color(int(index))).hex(), LABELS[int(index)])
    assert "left out: 1 repeated image" in err
    assert "attention: " in err


@pytest.mark.parametrize("form", ["text", "json"])
def test_segment_unreadable_images_do_not_lose_the_others(form, segmenter, photographs, tmp_path, capsys):
    broken, none = photographs / "broken.png", photographs / "none.png"
    broken.write_bytes((photographs / "a.png").read_bytes()[:200])
    options = [
        "--out",
        tmp_path / "out",
        "--model",
        segmenter,
        "--device",
        "cpu",
        *(["--json"] if form == "json" else []),
    ]
    code, text, err = run(capsys, none, broken, photographs / "a.png", *options)
    assert code == 1
    assert pictures_in(tmp_path / "out") == ["a.png"]
    reasons = {none: "cannot be read: there is no such file", broken: "cannot be decoded, the file is damaged"}
    for path, reason in reasons.items():
        assert err.count(f"failed: {path}: {reason}") == 1
    if form == "json":
        answer = json.loads(text)
        assert [failure["image"] for failure in answer["failures"]] == [str(none), str(broken)]
        assert [result["image"] for result in answer["results"]] == [str(photographs / "a.png")]
    else:
        assert text.splitlines()[0] == str(photographs / "a.png")


@pytest.mark.parametrize("form", ["text", "json"])
def test_segment_without_a_readable_image_loads_no_model(form, no_model, tmp_path, capsys):
    arguments = [tmp_path / "none.png", tmp_path / "neither.png", "--out", tmp_path / "out", "--model", "unused"]
    code, text, err = run(capsys, *arguments, *(["--json"] if form == "json" else []))
    assert code == 1
    assert err.splitlines() == [
        f"failed: {tmp_path / name}: cannot be read: there is no such file" for name in ("none.png", "neither.png")
    ]
    if form == "json":
        assert (json.loads(text)["kernel"], len(json.loads(text)["failures"])) == (None, 2)
    assert not (tmp_path / "out").exists()


def test_segment_outputs_not_finite_are_a_failure(segmenter, photographs, tmp_path, capsys, monkeypatch):
    forward, calls = BeitForSemanticSegmentation.forward, []

    def spoil(self, *arguments, **options):
        outputs = forward(self, *arguments, **options)
        calls.append(None)
        if len(calls) == 1:
            outputs.logits.fill_(float("nan"))
        return outputs

    monkeypatch.setattr(BeitForSemanticSegmentation, "forward", spoil)
    code, _, err = run(capsys, photographs, "--out", tmp_path / "out", "--model", segmenter, "--device", "cpu")
    assert code == 1
    assert f"failed: {photographs / 'a.png'}: the model returned logits that are not finite" in err
    assert pictures_in(tmp_path / "out") == ["b.png", "part/a.png"]


def test_segment_names_that_differ_in_suffix_only_keep_it(segmenter, tmp_path, capsys):
    for name in ("a.png", "a.tif", "b.jpg"):
        save_image(tmp_path / "images" / name, 0)
    options = ["--out", tmp_path / "out", "--model", segmenter, "--device", "cpu"]
    assert run(capsys, tmp_path / "images", *options)[0] == 0
    assert pictures_in(tmp_path / "out") == ["a.png.png", "a.tif.png", "b.png"]


@pytest.mark.parametrize(
    ("images", "options", "message"),
    [
        (["photographs"], ["--out", "o.png"], "'{0}/o.png' is the name of one picture (expected a folder"),
        (["photographs"], ["--out", "o", "--labels", "l.png"], "'{0}/l.png' is the name of one picture"),
        (["photographs"], ["--out", "file"], "the pictures cannot be written to '{0}/file': Not a directory"),
        (["photographs"], ["--out", "photographs"], "'{0}/photographs' is inside the folder of images"),
        (["photographs"], ["--out", "photographs/o"], "'{0}/photographs/o' is inside the folder of images"),
        (["photographs"], ["--out", "link/o"], "'{0}/link/o' is inside the folder of images"),
        (["photographs"], ["--out", "o", "--labels", "photographs"], "'{0}/photographs' is inside the folder"),
        (["photographs"], ["--out", "o", "--labels", "o"], "pictures need different names, but these would be "),
        (["photographs"], ["--out", "blocked"], "'{0}/blocked/a.png' is a folder (expected the file to write)"),
        (
            ["clash"],
            ["--out", "o"],
            "pictures need different names, but these would be written twice: '{0}/o/a.png' for ",
        ),
        (["empty"], ["--out", "o"], "the folder '{0}/empty' does not contain images"),
        (
            ["photographs/a.png", "photographs/b.png"],
            ["--out", "photographs"],
            "'{0}/photographs/a.png' is an input of this command",
        ),
        (
            ["photographs/a.png", "photographs/part/a.png"],
            ["--out", "o"],
            "pictures need different names, but these would be written twice: "
            "'{0}/o/a.png' for '{0}/photographs/a.png' and '{0}/photographs/part/a.png' (rename images",
        ),
    ],
)
def test_segment_folders_are_checked_before_the_model_is_loaded(
    images, options, message, photographs, no_model, tmp_path, capsys
):
    (tmp_path / "file").write_text("not a folder")
    (tmp_path / "blocked" / "a.png").mkdir(parents=True)
    (tmp_path / "empty").mkdir()
    save_image(tmp_path / "clash" / "a.jpg", 0)
    save_image(tmp_path / "clash" / "a.png" / "b.png", 0)  # the folder a.png
    (tmp_path / "link").symlink_to(photographs)
    before = pictures_in(tmp_path)
    places = [option if option.startswith("--") else tmp_path / option for option in options]
    code, text, err = run(capsys, *(tmp_path / image for image in images), "--model", "unused", *places)
    assert (code, text) == (2, "")
    assert err.splitlines()[-1].startswith("beit-fast segment: " + message.format(tmp_path))
    assert pictures_in(tmp_path) == before


def test_segment_full_disk_keeps_whole_pictures_only(segmenter, photographs, tmp_path, capsys, monkeypatch):
    save, saved = Image.Image.save, []

    def full(self, path, format=None, **options):
        saved.append(path)
        if len(saved) == 4:  # the classes of the second image
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save(self, path, format=format, **options)

    out, labels = tmp_path / "out", tmp_path / "labels"
    monkeypatch.setattr(Image.Image, "save", full)
    code, text, err = run(
        capsys, photographs, "--out", out, "--labels", labels, "--model", segmenter, "--device", "cpu"
    )
    assert code == 2
    assert f"the picture cannot be written to {str(labels / 'b.png')!r}: No space left on device" in err
    assert f"picture: {out / 'a.png'}" in text
    assert pictures_in(out) == pictures_in(labels) == ["a.png"]


def test_segment_reads_a_pipe(segmenter, photographs, tmp_path, capsys):
    """It can be read once only."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=((photographs / "a.png").read_bytes(),))
    writer.start()
    options = ["--model", segmenter, "--device", "cpu"]
    assert run(capsys, pipe, photographs / "b.png", "--out", tmp_path / "out", *options)[0] == 0
    writer.join()
    assert run(capsys, photographs / "a.png", "--out", tmp_path / "a.png", *options)[0] == 0
    assert (tmp_path / "out" / "pipe.png").read_bytes() == (tmp_path / "a.png").read_bytes()


@pytest.mark.parametrize("size", [(40, 30), (1200, 400)])
def test_legend_has_the_classes_that_occur_and_covers_no_pixel(size, monkeypatch):
    drawn = []
    font = ImageFont.FreeTypeFont
    original = font.getmask2
    monkeypatch.setattr(
        font,
        "getmask2",
        lambda self, text, *rest, **options: drawn.append(text) or original(self, text, *rest, **options),
    )
    classes = torch.zeros(size[::-1], dtype=torch.long)
    classes[0, 0], classes[5:] = 2, 4
    photograph = Image.new("RGB", size, "blue")
    shares = class_shares(classes, LABELS)
    plain = overlay(photograph, classes, 5, 0.5)
    picture = with_legend(plain, shares)
    assert np.array_equal(np.array(picture)[: size[1], : size[0]], np.array(plain))
    panel = np.array(picture)[size[1] :].reshape(-1, 3)
    colors = {tuple(color) for color in np.unique(panel, axis=0).tolist()}
    assert {class_color(index) for index in (0, 2, 4)} <= colors
    assert not {class_color(index) for index in (1, 3)} & colors
    percent = [f"{100 * share['share']:.1f} %" if share["share"] >= 0.001 else "< 0.1 %" for share in shares]
    names = [{2: "class 2"}.get(share["index"], share["label"]) for share in shares]  # the font lacks 人
    assert [text for text in drawn if "%" in text] == [f"{a}  {b}" for a, b in zip(percent, names, strict=True)]


def test_legend_text_is_inside_the_picture_and_apart():
    """Every row has ink between its swatch and the edge, and rows do not touch."""
    shares = [{"index": i, "label": "W" * 60, "share": 1 / 7, "color": "#ff0000"} for i in range(7)]
    picture = np.array(with_legend(Image.new("RGB", (30, 20)), shares))[20:]
    assert (picture[:, -3:] == 255).all()
    has_ink = (picture < 128).all(-1).any(1).astype(int)
    assert (np.diff(has_ink, prepend=0) == 1).sum() == 7


def test_segment_without_a_legend_keeps_the_size(segmenter, photographs, tmp_path, capsys):
    options = ["--out", tmp_path / "o.png", "--model", segmenter, "--device", "cpu"]
    assert run(capsys, photographs / "a.png", *options)[0] == 0
    taller = Image.open(tmp_path / "o.png").size
    assert run(capsys, photographs / "a.png", *options, "--no-legend")[0] == 0
    assert Image.open(tmp_path / "o.png").size == (30, 40)
    assert taller[0] > 30
    assert taller[1] > 40


def test_segment_without_freetype_names_the_option(photographs, no_model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("PIL.features.check", lambda feature: feature != "freetype2")
    code, _, err = run(capsys, photographs / "a.png", "--out", tmp_path / "o.png", "--model", "unused")
    assert code == 2
    assert "built with FreeType; pass --no-legend" in err
