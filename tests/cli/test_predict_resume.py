"""Runs of `beit-fast predict` that are killed, interrupted, resumed, retried or started from the beginning."""

import itertools
import json
import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path

import pytest

from beit_fast.cli.predict.command import Predictor
from beit_fast.cli.predict.dataset import ImageBatches
from beit_fast.cli.predict.journal import Run

from ..support.prediction import (
    BATCH_SIZE,
    COUNT,
    done_in,
    fork,
    main_predict,
    names_in,
    predict,
    read_jsonl,
    save_images,
)


def stop_at(place, count, reached):
    """Patch this process so that it sets `reached` and waits at a place of the run."""
    move, remove, calls = os.replace, shutil.rmtree, itertools.count(1)

    def wait():
        reached.set()
        time.sleep(600)

    def replace(source, target):
        is_batch, is_out = Path(target).parent.name == "batches", Path(target).name == "out.jsonl"
        if (place == "batch" and is_batch and next(calls) == count) or (place == "merge" and is_out):
            with open(source, "r+b") as stream:
                stream.truncate(10)
            wait()
        move(source, target)
        if place == "manifest" and is_out:
            wait()

    def rmtree(*arguments, **options):
        if place == "removal":
            wait()
        remove(*arguments, **options)

    os.replace, shutil.rmtree = replace, rmtree


def kill_at(place, count, arguments):
    """SIGKILL a run at a place: half of a file is written, or a step is missing."""
    reached = multiprocessing.get_context("fork").Event()

    def run():
        stop_at(place, count, reached)
        return main_predict(*arguments)

    process = fork(run)
    assert reached.wait(60)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL


@pytest.mark.parametrize(("place", "workers", "done"), [("batch", 2, 3), ("merge", 0, 7)])
def test_predict_killed_resumes_without_reading_again(
    place, workers, done, arguments, images, whole, read, tmp_path, capsys
):
    """Also while the workers of the killed process are still alive: they hold no lock."""
    out, folder = tmp_path / "out.jsonl", tmp_path / "out.jsonl.run"
    kill_at(place, 4, [*arguments, "--workers", workers])
    assert not out.exists()
    assert done_in(folder) == list(range(done))
    code, text, _ = predict(capsys, *arguments, "--json")
    facts = json.loads(text)
    assert code == 1
    assert read == [name for number in range(done, 7) for name in names_in(number, images)]
    assert (facts["images"], facts["already_done"]) == (len(read), COUNT - len(read))
    assert facts["complete"] == {"images": COUNT, "failures": 1}
    assert out.read_bytes() == whole


@pytest.mark.parametrize("place", ["manifest", "removal"])
def test_predict_killed_after_the_results_keeps_them(place, arguments, images, read, tmp_path, capsys):
    """Before the manifest has the counts, or before the batches are removed."""
    names = sorted(path.relative_to(images).as_posix() for path in images.rglob("*.png"))
    listed = tmp_path / "list.txt"
    listed.write_text("\n".join(str(images / name) for name in names[:6]))  # all of them are readable
    arguments = [listed, *arguments[1:]]
    kill_at(place, 1, arguments)
    content = (tmp_path / "out.jsonl").read_bytes()
    code, text, _ = predict(capsys, *arguments, "--json")
    assert (code, read) == (0, [])
    assert json.loads(text)["complete"] == {"images": 6, "failures": 0}
    assert (tmp_path / "out.jsonl").read_bytes() == content
    assert [record["path"] for record in read_jsonl(tmp_path / "out.jsonl")] == [str(images / n) for n in names[:6]]
    assert sorted(os.listdir(tmp_path / "out.jsonl.run")) == ["lock", "manifest.json"]


@pytest.mark.slow
def test_predict_killed_repeatedly_completes(arguments, whole, tmp_path):
    """Killed at arbitrary moments, as one process and as two in turns."""
    out, folder = tmp_path / "out.jsonl", tmp_path / "out.jsonl.run"
    before: list[int] = []
    for world in itertools.cycle((1, 2)):
        ranks = [
            fork(lambda: main_predict(*arguments, "--workers", 1), RANK=rank, WORLD_SIZE=world) for rank in range(world)
        ]
        deadline = time.monotonic() + 120
        while len(done_in(folder)) <= len(before) and not out.exists() and time.monotonic() < deadline:
            time.sleep(0.002)
        for process in ranks:
            process.kill()
            process.join()
        if out.exists():
            break
        now = done_in(folder)
        assert set(before) < set(now), "a batch was lost, or none was done"
        before = now
    assert out.read_bytes() == whole


def test_predict_unfinished_batch_file_is_ignored(arguments, whole, tmp_path, capsys):
    """The temporary file of a killed process is not a batch."""
    assert predict(capsys, *arguments)[0] == 1
    batches = tmp_path / "out.jsonl.run" / "batches"
    (tmp_path / "out.jsonl").unlink()
    last = batches / "00000006.json"
    (batches / ".123-4.unfinished.00000006.json").write_bytes(last.read_bytes()[:10])
    last.unlink()
    assert predict(capsys, *arguments)[0] == 1
    assert (tmp_path / "out.jsonl").read_bytes() == whole


def test_predict_damaged_batch_file_is_named(arguments, whole, tmp_path, capsys):
    assert predict(capsys, *arguments)[0] == 1
    file = tmp_path / "out.jsonl.run" / "batches" / "00000003.json"
    (tmp_path / "out.jsonl").unlink()
    file.write_bytes(bytes(100))
    code, _, err = predict(capsys, *arguments)
    assert code == 2
    assert f"{str(file)!r} is damaged; delete it and rerun the same command" in err
    file.unlink()
    assert predict(capsys, *arguments)[0] == 1
    assert (tmp_path / "out.jsonl").read_bytes() == whole


def test_share_write_any_name_round_trips(tmp_path):
    """Newlines, names that are not UTF-8, and the signs of JSON."""
    records = [{"path": 'a\n"\\ \u2028 \udcff 写', "classes": None, "error": "e"}, {"path": "b", "error": None}]
    run, written = Run(tmp_path / "out.jsonl", {}, 1), []
    with run.join(0, 1) as share:
        share.write(0, records)

    def write(path, batches):
        path.touch()
        written.extend(batches)

    assert run.finish(write) == (2, 1)
    assert written == [records]


def test_predict_complete_run_is_not_repeated(arguments, read, tmp_path, capsys):
    """The exit code is that of the run: an image failed, so a script does not take the results for complete."""
    assert predict(capsys, *arguments)[0] == 1
    before = (tmp_path / "out.jsonl").stat()
    read.clear()
    code, text, _ = predict(capsys, *arguments)
    assert (code, read) == (1, [])
    assert f"{tmp_path / 'out.jsonl'} is already complete: {COUNT} images, 1 failed" in text
    assert (tmp_path / "out.jsonl").stat() == before


def test_predict_removed_results_are_written_again(arguments, whole, read, tmp_path, capsys):
    """From the batches that are kept because an image failed."""
    predict(capsys, *arguments)
    (tmp_path / "out.jsonl").unlink()
    read.clear()
    assert predict(capsys, *arguments)[0] == 1
    assert read == []
    assert (tmp_path / "out.jsonl").read_bytes() == whole


def test_predict_retry_failed_repeats_the_batch(model, tmp_path, capsys, read):
    """The results are those of a run that could read all images at once."""
    names = save_images(tmp_path / "images", 8)
    good = (tmp_path / "images" / names[4]).read_bytes()
    (tmp_path / "images" / names[4]).write_bytes(good[:100])
    out, fresh = tmp_path / "out.jsonl", tmp_path / "fresh.jsonl"
    options = ("--model", model, "--batch-size", BATCH_SIZE, "--workers", 0, "--device", "cpu")
    assert predict(capsys, tmp_path / "images", out, *options)[0] == 1
    broken = out.read_bytes()
    assert predict(capsys, tmp_path / "images", out, *options, "--retry-failed")[0] == 1
    assert out.read_bytes() == broken
    (tmp_path / "images" / names[4]).write_bytes(good)
    read.clear()
    assert predict(capsys, tmp_path / "images", out, *options)[0] == 1
    assert read == []
    assert predict(capsys, tmp_path / "images", out, *options, "--retry-failed")[0] == 0
    assert read == [name.rpartition("/")[2] for name in names[3:6]]
    assert predict(capsys, tmp_path / "images", fresh, *options)[0] == 0
    assert out.read_bytes() == fresh.read_bytes()
    read.clear()
    assert predict(capsys, tmp_path / "images", out, *options, "--retry-failed")[0] == 0
    assert read == []
    assert not (tmp_path / "out.jsonl.run" / "batches").exists()


def test_predict_overwrite_keeps_the_old_results_until_the_end(arguments, whole, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out.jsonl"
    out.write_text("other results")
    assert predict(capsys, *arguments)[0] == 2
    assert out.read_text() == "other results"

    def fail(self, file):
        assert out.read_text() == "other results"
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(ImageBatches, "read", fail)
        with pytest.raises(MemoryError):
            predict(capsys, *arguments, "--overwrite")
    assert out.read_text() == "other results"
    assert predict(capsys, *arguments)[0] == 1  # resumes what --overwrite started
    assert out.read_bytes() == whole
    assert predict(capsys, *arguments, "--top", 1, "--overwrite")[0] == 1
    assert {len(record["classes"] or [0]) for record in read_jsonl(out)} == {1}


@pytest.mark.parametrize("workers", [0, 2])
def test_predict_interrupted_says_how_to_resume(workers, arguments, whole, tmp_path, capsys, monkeypatch):
    original, calls = Predictor.records, itertools.count(1)

    def interrupt(self, paths, batch):
        if next(calls) == 3:
            raise KeyboardInterrupt
        return original(self, paths, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Predictor, "records", interrupt)
        code, out, err = predict(capsys, *arguments, "--workers", workers)
    assert (code, out) == (130, "")
    assert err.splitlines()[-1] == "beit-fast predict: stopped; rerun the same command to resume"
    assert not multiprocessing.active_children()
    assert done_in(tmp_path / "out.jsonl.run") == [0, 1]
    assert predict(capsys, *arguments)[0] == 1
    assert (tmp_path / "out.jsonl").read_bytes() == whole


def test_predict_interrupted_overwrite_says_that_it_would_begin_again(
    arguments, whole, read, tmp_path, capsys, monkeypatch
):
    original, calls = Predictor.records, itertools.count(1)

    def interrupt(self, paths, batch):
        if next(calls) == 3:
            raise KeyboardInterrupt
        return original(self, paths, batch)

    (tmp_path / "out.jsonl").write_text("other results")
    with monkeypatch.context() as patch:
        patch.setattr(Predictor, "records", interrupt)
        code, _, err = predict(capsys, *arguments, "--overwrite")
    assert code == 130
    assert err.splitlines()[-1] == ("beit-fast predict: stopped; rerun the same command without --overwrite to resume")
    read.clear()
    assert predict(capsys, *arguments)[0] == 1
    assert len(read) == COUNT - 2 * BATCH_SIZE
    assert (tmp_path / "out.jsonl").read_bytes() == whole


def test_predict_ctrl_c_stops_the_workers_too(arguments, whole, tmp_path, capsys):
    """The terminal sends SIGINT to all processes of the group: one message, and no process is left."""
    reached = multiprocessing.get_context("fork").Event()

    def run():
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a shell ignores SIGINT
        stop_at("batch", 3, reached)
        return main_predict(*arguments, "--workers", 2)

    process = fork(run, tmp_path / "stopped")
    try:
        assert reached.wait(60)
        os.killpg(process.pid, signal.SIGINT)
        process.join(60)
    finally:
        process.kill()
    assert process.exitcode == 130
    assert "rerun the same command to resume" in (tmp_path / "stopped.err").read_text()
    assert "Traceback" not in (tmp_path / "stopped.err").read_text()
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
    assert predict(capsys, *arguments)[0] == 1
    assert (tmp_path / "out.jsonl").read_bytes() == whole


def test_predict_full_disk_can_be_resumed(arguments, whole, tmp_path, capsys, monkeypatch):
    def full(path, batches):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("beit_fast.cli.predict.results._write_jsonl", full)
        code, out, err = predict(capsys, *arguments)
    assert (code, out) == (2, "")
    assert "No space left" in err
    assert not (tmp_path / "out.jsonl").exists()
    assert predict(capsys, *arguments)[0] == 1
    assert (tmp_path / "out.jsonl").read_bytes() == whole
