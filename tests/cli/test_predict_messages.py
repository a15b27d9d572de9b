"""What `beit-fast predict` says about a data set that changed, and to torchrun."""

import json
import os

import pytest

from beit_fast.cli import main
from beit_fast.cli.process import report_to_torchrun

from ..support.prediction import BATCH_SIZE, COUNT, predict, read_jsonl, save_image, save_images


@pytest.fixture
def run_arguments(model, tmp_path):
    """A run on seven images of its own."""
    save_images(tmp_path / "images", 7)
    options = ["--model", model, "--batch-size", BATCH_SIZE, "--workers", 0, "--device", "cpu"]
    return [tmp_path / "images", tmp_path / "out.jsonl", *options]


def later(path):
    """Set the time of the last change to an hour from now."""
    time = os.stat(path).st_mtime + 3600
    os.utime(path, (time, time))


@pytest.mark.parametrize("state", ["complete", "killed"])
def test_predict_names_images_that_were_modified_afterwards(state, run_arguments, tmp_path, capsys):
    """Regression: "already complete" although the contents had changed."""
    assert predict(capsys, *run_arguments)[0] == 0
    first = read_jsonl(tmp_path / "out.jsonl")[0]["path"]
    if state == "killed":
        (tmp_path / "out.jsonl").unlink()
        predict_part(run_arguments, tmp_path, capsys)
    code, _, err = predict(capsys, *run_arguments)
    assert code == 0
    assert "modified" not in err
    if state == "killed":
        (tmp_path / "out.jsonl").unlink()
        predict_part(run_arguments, tmp_path, capsys)
    later(tmp_path / "images" / first)
    code, _, err = predict(capsys, *run_arguments)
    assert code == 0
    assert f"1 image was modified after it was predicted: {first}; --overwrite predicts all images again" in err


def predict_part(arguments, folder, capsys):
    """Predict the batches of rank 0 of 2 only."""
    os.environ |= {"RANK": "0", "WORLD_SIZE": "2"}
    try:
        assert predict(capsys, *arguments)[0] == 0
    finally:
        del os.environ["RANK"], os.environ["WORLD_SIZE"]
    assert not (folder / "out.jsonl").exists()


def test_predict_with_a_new_image_says_how_to_predict_only_it(run_arguments, model, tmp_path, capsys):
    assert predict(capsys, *run_arguments)[0] == 0
    save_image(tmp_path / "images" / "new.png", 99)
    code, _, err = predict(capsys, *run_arguments)
    assert code == 2
    assert "images: 7 before, 8 now" in err
    assert err.endswith("; for new images only, pass a list of them and another OUT\n")
    (tmp_path / "list.txt").write_text("images/new.png\n")
    assert predict(capsys, tmp_path / "list.txt", tmp_path / "new.jsonl", *run_arguments[2:])[0] == 0
    assert [record["path"] for record in read_jsonl(tmp_path / "new.jsonl")] == ["images/new.png"]
    code, _, err = predict(capsys, *run_arguments, "--top", 1)
    assert "for new images only" not in err


def test_predict_complete_run_leaves_a_manifest_and_a_lock(run_arguments, tmp_path, capsys):
    assert predict(capsys, *run_arguments)[0] == 0
    assert sorted(path.name for path in (tmp_path / "out.jsonl.run").iterdir()) == ["lock", "manifest.json"]


@pytest.mark.parametrize("words", [("each image once, sorted by path",), ("OUT.run with OUT",)])
def test_predict_help_says_what_results_and_progress_are(words, capsys):
    with pytest.raises(SystemExit):
        main.main(["predict", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert all(word in text for word in words)


def test_predict_failures_are_on_the_page_of_torchrun(arguments, tmp_path, capsys, monkeypatch):
    """Regression: the page of torchrun did not say why the exit code is 1. Its own classes read the file."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

    file = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
    assert predict(capsys, *arguments)[0] == 1
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=1, error_file=str(file))
    page = str(ChildFailedError("beit_fast", {0: failure}))
    assert f"1 of {COUNT} images failed, see the errors in {tmp_path / 'out.jsonl'}" in page
    file.unlink()
    assert predict(capsys, tmp_path / "none", *arguments[1:])[0] == 2
    assert "no data set at" in json.loads(file.read_text())["message"]["message"]


def test_report_to_torchrun_without_torchrun_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    report_to_torchrun("reason")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "none" / "error.json"))
    report_to_torchrun("reason")
    assert list(tmp_path.iterdir()) == []
