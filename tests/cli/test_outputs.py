"""Files that commands write: checked before a model is loaded, never an input, whole or not at all."""

import os

import numpy as np
import pytest
from PIL import Image

from beit_fast.cli import main
from beit_fast.cli.outputs import class_format, color_format
from beit_fast.utils.files import atomic_write

from ..support.prediction import save_checkpoint, save_image

SEGMENTATION = {"num_hidden_layers": 4, "out_indices": [1, 2, 3, 4], "auxiliary_channels": 6, "pool_scales": (1, 2)}


def run(capsys, *arguments):
    code = main.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("segmenter")
    save_checkpoint(folder, "BeitForSemanticSegmentation", **SEGMENTATION)
    return folder


@pytest.fixture
def photograph(tmp_path):
    return save_image(tmp_path / "photograph.png", 0, (40, 30))


@pytest.fixture
def no_model(monkeypatch):
    """Loading a model is an error of the test."""

    def load(*arguments, **options):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("beit_fast.checkpoint.loading.load_model", load)


def files_below(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--out", "o"], "a color picture cannot be written to '{}/o' (expected a suffix such as .png)"),
        (["--out", "o.raw"], "a color picture cannot be written to '{}/o.raw' (expected a suffix such as .png)"),
        (["--out", "folder.png"], "'{}/folder.png' is a folder (expected the file to write)"),
        (["--out", "file/o.png"], "the picture cannot be written to '{}/file/o.png': Not a directory"),
        (["--out", "photograph.png"], "'{}/photograph.png' is an input of this command"),
        (["--out", "same.png"], "'{}/same.png' is an input of this command"),
        (["--out", "o.png", "--labels", "l.jpg"], "classes cannot be written to '{}/l.jpg' (expected the suffix .png"),
        (["--out", "o.png", "--labels", "l.gif"], "classes cannot be written to '{}/l.gif' (expected the suffix .png"),
        (["--out", "o.png", "--labels", "l"], "classes cannot be written to '{}/l' (expected the suffix .png"),
        (["--out", "o.png", "--labels", "same.png"], "'{}/same.png' is an input of this command"),
        (["--out", "o.png", "--labels", "o.png"], "--out and --labels are the same file"),
    ],
)
def test_segment_outputs_are_checked_before_the_model_is_loaded(
    options, message, photograph, no_model, tmp_path, capsys
):
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").write_text("not a folder")
    (tmp_path / "same.png").symlink_to(photograph)
    before = files_below(tmp_path)
    places = [option if option.startswith("--") else tmp_path / option for option in options]
    code, out, err = run(capsys, "segment", photograph, "--model", "unused", *places)
    assert (code, out) == (2, "")
    assert err.startswith("beit-fast segment: " + message.format(tmp_path))
    assert "unfinished" not in err
    assert str(os.getpid()) not in err.replace(str(tmp_path), "")
    assert files_below(tmp_path) == before


def test_segment_folder_without_permission_is_named_before_the_model_is_loaded(
    photograph, no_model, tmp_path, capsys, monkeypatch
):
    """The answer of `os.access` is replaced, because root may write everywhere."""
    closed = tmp_path / "closed"
    closed.mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: os.fspath(path) != os.fspath(closed))
    out = closed / "new" / "o.png"
    code, _, err = run(capsys, "segment", photograph, "--model", "unused", "--out", out)
    assert code == 2
    assert err == f"beit-fast segment: the picture cannot be written to {str(out)!r}: Permission denied\n"


def test_segment_unreadable_image_is_noticed_before_the_model_is_loaded(no_model, tmp_path, capsys):
    code, _, err = run(capsys, "segment", tmp_path / "none.png", "--model", "unused", "--out", tmp_path / "o.png")
    assert code == 2
    assert "there is no such file" in err


@pytest.mark.parametrize("suffix", ["png", "tif", "tiff"])
def test_segment_labels_keep_all_16_bits(suffix, tmp_path):
    name = class_format(tmp_path / f"l.{suffix}")
    ids = np.array([[0, 149, 65535]], dtype=np.uint16)
    Image.fromarray(ids).save(tmp_path / "l", format=name)
    assert np.array_equal(np.array(Image.open(tmp_path / "l")), ids)


@pytest.mark.parametrize("name", ["a.png", "a.JPG", "a.webp", "a.bmp", "a.tiff", "a.b.png"])
def test_segment_pictures_have_the_usual_suffixes(name, tmp_path):
    assert color_format(tmp_path / name)


def test_segment_writes_both_pictures_or_none(segmenter, photograph, tmp_path, capsys, monkeypatch):
    out, labels = tmp_path / "o.jpg", tmp_path / "new" / "l.tiff"
    arguments = ["segment", photograph, "--model", segmenter, "--out", out, "--labels", labels, "--device", "cpu"]
    save = Image.Image.save

    def full(self, path, format=None, **options):
        if self.mode == "I;16" and isinstance(path, os.PathLike):
            raise OSError(28, "No space left on device")
        save(self, path, format=format, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", full)
        code, text, err = run(capsys, *arguments)
    assert (code, text) == (2, "")
    assert err == f"beit-fast segment: the picture cannot be written to {str(labels)!r}: No space left on device\n"
    assert not out.exists()
    assert not labels.exists()
    code, text, err = run(capsys, *arguments)
    assert code == 0
    assert text.splitlines()[-1] == f"picture: {out}"
    assert err.startswith("attention: ")
    assert Image.open(out).format == "JPEG"
    assert Image.open(labels).format == "TIFF"


@pytest.mark.parametrize("name", ["BeitModel", "BeitForImageClassification"])
def test_segment_checkpoint_without_head_writes_nothing(name, photograph, tmp_path, capsys, recwarn):
    """Also a classifier whose configuration has the four stages of a segmenter, as on the hub."""
    save_checkpoint(tmp_path / "model", name, **SEGMENTATION)
    out = tmp_path / "overlay.png"
    code, text, err = run(capsys, "segment", photograph, "--model", tmp_path / "model", "--out", out, "--device", "cpu")
    assert (code, text) == (2, "")
    assert "parameters of BeitForSemanticSegmentation, which would be random: auxiliary_head." in err
    assert err.endswith("(expected a checkpoint for semantic segmentation)\n")
    assert not out.exists()
    assert not recwarn.list


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("file/o.jsonl", "the results cannot be written to '{}/file/o.jsonl': Not a directory"),
        ("list.jsonl", "'{}/list.jsonl' is an input of this command"),
        ("photograph.png", "'{}/photograph.png' is an input of this command"),
        ("exists.jsonl", "'{}/exists.jsonl' exists, but 'exists.jsonl.run' beside it does not"),
    ],
)
def test_predict_out_is_checked_before_the_model_is_loaded(out, message, photograph, no_model, tmp_path, capsys):
    (tmp_path / "file").write_text("not a folder")
    (tmp_path / "exists.jsonl").write_text("precious")
    (tmp_path / "list.jsonl").write_text("photograph.png\n")
    before = files_below(tmp_path)
    start = [] if out == "exists.jsonl" else ["--overwrite"]
    code, text, err = run(
        capsys, "predict", tmp_path / "list.jsonl", tmp_path / out, "--format", "jsonl", "--model", "unused", *start
    )
    assert (code, text) == (2, "")
    assert err.splitlines()[-1].startswith("beit-fast predict: " + message.format(tmp_path))
    assert files_below(tmp_path) == before


@pytest.mark.parametrize("command", ["predict", "segment"])
def test_output_that_is_a_device_is_not_replaced(command, photograph, no_model, tmp_path, capsys):
    pipe = tmp_path / "pipe.png"
    os.mkfifo(pipe)
    options = ["--format", "jsonl"] if command == "predict" else []
    places = [photograph.parent, pipe] if command == "predict" else [photograph, "--out", pipe]
    code, _, err = run(capsys, command, *places, "--model", "unused", *options)
    assert code == 2
    assert f"{str(pipe)!r} is not a regular file, so it cannot be replaced" in err


def test_convert_target_is_checked_before_the_model_is_loaded(no_model, tmp_path, capsys):
    (tmp_path / "file").write_text("not a folder")
    save_checkpoint(tmp_path / "model")
    code, _, err = run(capsys, "convert", tmp_path / "model", tmp_path / "file")
    assert code == 2
    assert err == (
        f"beit-fast convert: the checkpoint cannot be written to {str(tmp_path / 'file')!r}: Not a directory\n"
    )


@pytest.mark.parametrize("source", ["model", "model/model.safetensors"])
def test_convert_onto_its_source_is_refused(source, no_model, tmp_path, capsys):
    save_checkpoint(tmp_path / "model")
    before = {file.name: file.read_bytes() for file in (tmp_path / "model").iterdir()}
    code, _, err = run(capsys, "convert", tmp_path / source, tmp_path / "model")
    assert code == 2
    assert f"{str(tmp_path / 'model')!r} is an input of this command (expected another" in err
    assert {file.name: file.read_bytes() for file in (tmp_path / "model").iterdir()} == before


def test_atomic_write_errors_name_the_file(tmp_path):
    path = tmp_path / "none" / "file.txt"
    with pytest.raises(FileNotFoundError) as caught, atomic_write(path) as unfinished:
        unfinished.write_text("content")
    assert str(caught.value) == f"[Errno 2] No such file or directory: {str(path)!r}"
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(IsADirectoryError) as caught, atomic_write(folder) as unfinished:
        unfinished.write_text("content")
    assert str(caught.value) == f"[Errno 21] Is a directory: {str(folder)!r}"
    assert os.listdir(tmp_path) == ["folder"]
