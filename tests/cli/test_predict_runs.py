"""Runs of `beit-fast predict` that are killed, resumed, shared among processes, refused or begun anew."""

import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from beit_fast.cli import main
from beit_fast.cli.predict.command import Predictor
from beit_fast.cli.predict.journal import part_line, read_part

from ..support.prediction import predict, read_jsonl, save_checkpoint, save_image, save_images

COUNT, SIZE = 20, 3

# Runs the command, and at the chosen moment says so and waits to be killed.
STOPPER = """
import os, sys, time
from pathlib import Path
from beit_fast.cli import main
from beit_fast.cli.predict import journal
stop, at, arguments = sys.argv[1], int(sys.argv[2]), sys.argv[3:]

def here():
    print("here", flush=True)
    time.sleep(600)

def append(self, number, records, write=journal.Part.append, count=[0]):
    count[0] += 1
    if count[0] == at:
        line = journal.part_line(number, records)
        self._stream.write(line[:len(line) // 2])
        self._stream.flush()
        here()
    write(self, number, records)

def replace(source, target, move=os.replace, count=[0]):
    if Path(target).name.startswith("out."):
        if at == 1:
            with open(source, "r+b") as stream:
                stream.truncate(10)
            here()
        move(source, target)
        here()
    move(source, target)

def unlink(self, missing_ok=False):
    if self.suffix == ".part":
        here()

if stop == "line":
    journal.Part.append = append
elif stop == "merge":
    os.replace = replace
elif stop == "removal":
    Path.unlink = unlink
sys.exit(main.main(["predict", *arguments]))
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    save_checkpoint(folder)
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Twenty images, the seventh of which is no image."""
    folder = tmp_path_factory.mktemp("images")
    names = save_images(folder, COUNT)
    (folder / names[6]).write_bytes(b"no image")
    return folder


@pytest.fixture
def arguments(model, images, tmp_path):
    return [images, tmp_path / "out.jsonl", "--model", model, "--batch-size", SIZE, "--device", "cpu"]


@pytest.fixture(scope="module")
def whole(model, images, tmp_path_factory):
    """What one process writes that nothing disturbs."""
    out = tmp_path_factory.mktemp("whole") / "out.jsonl"
    command = ["predict", images, out, "--model", model, "--batch-size", SIZE, "--device", "cpu"]
    assert main.main([str(part) for part in command]) == 1
    content = out.read_bytes()
    assert len(content.splitlines()) == COUNT
    return content


@pytest.fixture
def read(monkeypatch):
    """The names of the images that this process reads from now on."""
    names = []

    def spy(self, file, original=Predictor.read):
        names.append(file.name)
        return original(self, file)

    monkeypatch.setattr(Predictor, "read", spy)
    return names


def environment(**variables):
    return os.environ | {"OMP_NUM_THREADS": "1"} | {name: str(value) for name, value in variables.items()}


def start(code, *arguments, **variables):
    command = [sys.executable, *code, *map(str, arguments)]
    return subprocess.Popen(
        command, env=environment(**variables), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def done_in(folder):
    """The batches that the parts hold."""
    return sorted(batch.number for part in folder.glob("*.part") for batch in read_part(part)[0])


def name_of(number, images):
    """The names of the images of a batch."""
    names = sorted(path.relative_to(images).as_posix() for path in images.rglob("*.png"))
    return [name.rpartition("/")[2] for name in names[number * SIZE : (number + 1) * SIZE]]


@pytest.mark.parametrize(("stop", "at", "left"), [("line", 4, 3), pytest.param("merge", 1, 7, marks=pytest.mark.slow)])
def test_a_killed_run_goes_on_where_it_was(stop, at, left, arguments, images, whole, read, tmp_path, capsys):
    """SIGKILL with half a line on the disk, or half of the results: nothing is read twice, nothing is missing."""
    process = start(["-c", STOPPER, stop, str(at)], *arguments)
    assert process.stdout.readline() == "here\n", process.communicate()
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    out, folder = tmp_path / "out.jsonl", tmp_path / "out.jsonl.run"
    assert not out.exists()
    assert done_in(folder) == list(range(left))
    code, text, _ = predict(capsys, *arguments, "--json")
    facts = json.loads(text)
    assert code == 1
    assert sorted(read) == sorted(name for number in range(left, 7) for name in name_of(number, images))
    assert (facts["images"], facts["found_done"]) == (len(read), COUNT - len(read))
    assert facts["complete"] == {"images": COUNT, "failures": 1}
    assert out.read_bytes() == whole


@pytest.mark.slow
@pytest.mark.parametrize(("stop", "at"), [("merge", 2), ("removal", 1)])
def test_killed_after_the_results_are_there(stop, at, arguments, images, whole, read, tmp_path, capsys):
    """Before the manifest says so, or before the parts are removed."""
    names = sorted(path.relative_to(images).as_posix() for path in images.rglob("*.png"))
    listed = tmp_path / "list.txt"
    listed.write_text("\n".join(str(images / name) for name in names[:6]))  # all can be read
    arguments = [listed, *arguments[1:]]
    process = start(["-c", STOPPER, stop, str(at)], *arguments)
    assert process.stdout.readline() == "here\n", process.communicate()
    process.kill()
    process.wait()
    content = (tmp_path / "out.jsonl").read_bytes()
    code, text, _ = predict(capsys, *arguments, "--json")
    assert (code, read) == (0, [])
    assert json.loads(text)["complete"] == {"images": 6, "failures": 0}
    assert (tmp_path / "out.jsonl").read_bytes() == content
    assert [record["path"] for record in read_jsonl(tmp_path / "out.jsonl")] == [str(images / n) for n in names[:6]]


@pytest.mark.slow
def test_killed_again_and_again(arguments, images, whole, tmp_path):
    """Killed at moments that nobody chose, by one process and by two in turns, until it is complete."""
    out, folder = tmp_path / "out.jsonl", tmp_path / "out.jsonl.run"
    patience = itertools.count(1)
    before: list[int] = []
    while not out.exists():
        worlds = (1, 2)[next(patience) % 2]
        ranks = [
            start(["-m", "beit_fast", "predict"], *arguments, RANK=rank, WORLD_SIZE=worlds) for rank in range(worlds)
        ]
        deadline = time.monotonic() + 120
        while len(done_in(folder)) <= len(before) and not out.exists() and time.monotonic() < deadline:
            time.sleep(0.002)
        for process in ranks:
            process.kill()
            process.communicate()
        now = done_in(folder)
        assert set(before) <= set(now), "a batch was lost"
        assert len(now) == len(set(now)), "a batch was done twice"
        assert len(now) > len(before) or out.exists()
        before = now
    assert out.read_bytes() == whole


@pytest.mark.parametrize("kept", ["nothing", "checksum", "half", "all but the newline", "one digit wrong", "zeros"])
def test_a_torn_line_is_cut_off(kept, arguments, whole, read, images, tmp_path, capsys, monkeypatch):
    """Whatever a kill or a power failure left of the last line."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert predict(capsys, *arguments)[0] == 0
    part = tmp_path / "out.jsonl.run" / "1-of-2.part"
    lines = part.read_bytes().splitlines(keepends=True)
    assert [batch.number for batch in read_part(part)[0]] == [1, 3, 5]
    last = lines[-1]
    torn = {
        "nothing": b"",
        "checksum": last[:9],
        "half": last[: len(last) // 2],
        "all but the newline": last[:-1],
        "one digit wrong": last.replace(b"0.", b"1.", 1),
        "zeros": bytes(len(last)),
    }[kept]
    part.write_bytes(b"".join(lines[:-1]) + torn)
    read.clear()
    assert predict(capsys, *arguments)[0] == 0
    assert sorted(read) == sorted(name_of(5, images))
    assert part.read_bytes() == b"".join(lines)
    monkeypatch.setenv("RANK", "0")
    assert predict(capsys, *arguments)[0] == 1
    assert (tmp_path / "out.jsonl").read_bytes() == whole


def test_two_processes_share_the_images(arguments, whole, tmp_path):
    """Side by side; the one that ends last writes the results."""
    ranks = [
        start(["-m", "beit_fast", "predict"], *arguments, "--json", RANK=rank, WORLD_SIZE=2, LOCAL_RANK=rank)
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=120) for process in ranks]
    facts = [json.loads(out) for out, _ in outputs]
    assert [fact["rank"] for fact in facts] == [0, 1]
    assert [fact["images"] for fact in facts] == [11, 9]  # 4 batches, the last of two images, and 3
    assert {fact["images"] + fact["found_done"] for fact in facts} == {11, 9}
    assert 1 in [process.returncode for process in ranks]
    for process, fact in zip(ranks, facts, strict=True):
        assert process.returncode == (0 if fact["complete"] is None else 1)
    assert (tmp_path / "out.jsonl").read_bytes() == whole


@pytest.mark.parametrize("first", [(0, 3), (2, 3), (6, 7), (4, 5)])
def test_another_number_of_processes_goes_on(first, arguments, whole, read, images, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RANK", str(first[0]))
    monkeypatch.setenv("WORLD_SIZE", str(first[1]))
    code, text, _ = predict(capsys, *arguments)
    assert code == 0
    assert f"rank {first[0]} of {first[1]}: other ranks have not ended" in text
    assert not (tmp_path / "out.jsonl").exists()
    done = done_in(tmp_path / "out.jsonl.run")
    assert done == list(range(first[0], 7, first[1]))
    read.clear()
    monkeypatch.delenv("RANK")
    monkeypatch.delenv("WORLD_SIZE")
    assert predict(capsys, *arguments)[0] == 1
    assert sorted(read) == sorted(name for number in {*range(7)} - {*done} for name in name_of(number, images))
    assert (tmp_path / "out.jsonl").read_bytes() == whole


def test_more_ranks_than_batches(arguments, whole, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "9")
    codes = []
    for rank in reversed(range(9)):
        monkeypatch.setenv("RANK", str(rank))
        codes.append(predict(capsys, *arguments)[0])
    assert codes == [0] * 8 + [1]
    assert (tmp_path / "out.jsonl").read_bytes() == whole


def test_a_complete_run_is_left_alone(arguments, read, tmp_path, capsys):
    predict(capsys, *arguments)
    before = (tmp_path / "out.jsonl").stat()
    read.clear()
    code, text, _ = predict(capsys, *arguments)
    assert (code, read) == (0, [])
    assert f"{tmp_path / 'out.jsonl'} is complete already: {COUNT} images, 1 failed" in text
    assert (tmp_path / "out.jsonl").stat() == before


def test_results_that_somebody_removed_are_made_anew(arguments, whole, read, tmp_path, capsys):
    predict(capsys, *arguments)
    (tmp_path / "out.jsonl").unlink()
    read.clear()
    assert predict(capsys, *arguments)[0] == 1
    assert len(read) == COUNT
    assert (tmp_path / "out.jsonl").read_bytes() == whole


def test_a_damaged_manifest_is_refused(arguments, whole, tmp_path, capsys):
    predict(capsys, *arguments)
    for content in ("{", "{}"):
        (tmp_path / "out.jsonl.run" / "manifest.json").write_text(content)
        code, _, err = predict(capsys, *arguments)
        assert code == 2
        assert "manifest.json" in err
    assert predict(capsys, *arguments, "--overwrite")[0] == 1
    assert (tmp_path / "out.jsonl").read_bytes() == whole


def test_failed_images_are_retried_when_asked(model, tmp_path, capsys, read):
    """With their batches, so that the results are those of a run that could read them at once."""
    names = save_images(tmp_path / "images", 8)
    good = (tmp_path / "images" / names[4]).read_bytes()
    (tmp_path / "images" / names[4]).write_bytes(good[:100])
    out, fresh = tmp_path / "out.jsonl", tmp_path / "fresh.jsonl"
    options = ("--model", model, "--batch-size", 3, "--device", "cpu")
    assert predict(capsys, tmp_path / "images", out, *options)[0] == 1
    broken = out.read_bytes()
    assert predict(capsys, tmp_path / "images", out, *options, "--retry-failed")[0] == 1
    assert out.read_bytes() == broken
    (tmp_path / "images" / names[4]).write_bytes(good)
    read.clear()
    assert predict(capsys, tmp_path / "images", out, *options)[0] == 0
    assert read == []
    assert predict(capsys, tmp_path / "images", out, *options, "--retry-failed")[0] == 0
    assert sorted(read) == sorted(name.rpartition("/")[2] for name in names[3:6])
    assert predict(capsys, tmp_path / "images", fresh, *options)[0] == 0
    assert out.read_bytes() == fresh.read_bytes()
    read.clear()
    assert predict(capsys, tmp_path / "images", out, *options, "--retry-failed")[0] == 0
    assert read == []
    assert not list((tmp_path / "out.jsonl.run").glob("*.part"))


@pytest.mark.parametrize(
    ("change", "named", "differences"),
    [
        (["--batch-size", 4], "batch size: 3 then, 4 now", 1),
        (["--top", 2], "top: 5 then, 2 now", 1),
        (["--logits"], "output: 'classes' then, 'logits' now", 2),
        (["--attn", "eager"], "attention: None then, 'eager' now", 1),
        (["--dtype", "bfloat16"], "dtype: 'float32' then, 'bfloat16' now", 2),
        (["--optimize"], "optimize: False then, True now", 1),
        ("an image more", "images: 20 then, 21 now", 2),
        ("another model", "model: ", 1),
        ("another processor", "model: ", 1),
    ],
)
def test_other_options_are_refused(change, named, differences, arguments, model, images, tmp_path, capsys, monkeypatch):
    """While a run is under way and after it: nothing of it is touched."""
    folder = tmp_path / "images"
    folder.mkdir()
    for path in images.iterdir():
        (folder / path.name).symlink_to(path)
    checkpoint = tmp_path / "model"
    checkpoint.mkdir()
    for path in model.iterdir():
        (checkpoint / path.name).symlink_to(path)
    arguments = [folder, arguments[1], "--model", checkpoint, *arguments[4:]]
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert predict(capsys, *arguments)[0] == 0
    if change == "an image more":
        save_image(folder / "more.png", 99)
    elif change == "another model":
        checkpoint = tmp_path / "other"
        save_checkpoint(checkpoint, seed=1)
    elif change == "another processor":
        (checkpoint / "preprocessor_config.json").write_text(
            '{"size": {"height": 32, "width": 32}, "image_std": [1, 1, 1]}'
        )
    else:
        arguments += change
    arguments[3] = checkpoint
    run = tmp_path / "out.jsonl.run"
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    code, out, err = predict(capsys, *arguments)
    assert (code, out) == (2, "")
    assert "was begun with other options" in err
    assert named in err
    assert err.count(" then, ") == differences
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before


def test_overwrite_begins_anew_and_keeps_the_old_results_until_then(arguments, whole, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out.jsonl"
    out.write_text("somebody else's")
    assert predict(capsys, *arguments)[0] == 2
    assert out.read_text() == "somebody else's"

    def stop(self, file):
        assert out.read_text() == "somebody else's"
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(Predictor, "read", stop)
        with pytest.raises(MemoryError):
            predict(capsys, *arguments, "--overwrite")
    assert out.read_text() == "somebody else's"
    assert predict(capsys, *arguments)[0] == 1  # goes on with what --overwrite began
    assert out.read_bytes() == whole
    assert predict(capsys, *arguments, "--top", 1, "--overwrite")[0] == 1
    assert {len(record["classes"] or [0]) for record in read_jsonl(out)} == {1}


def test_a_part_is_written_by_one_process_only(arguments, tmp_path, capsys, monkeypatch):
    fcntl = pytest.importorskip("fcntl")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    predict(capsys, *arguments)
    part = tmp_path / "out.jsonl.run" / "0-of-2.part"
    content = part.read_bytes()
    with part.open("ab") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        code, _, err = predict(capsys, *arguments)
        assert code == 2
        assert "is this command running already?" in err
        monkeypatch.delenv("RANK")
        monkeypatch.delenv("WORLD_SIZE")
        for more in ((), ("--overwrite",), ("--retry-failed",)):
            code, _, err = predict(capsys, *arguments, *more)
            assert code == 2
            assert "0-of-2.part" in err
            assert "wait until it has ended" in err
    assert part.read_bytes() == content


def test_an_interrupt_says_how_to_go_on(arguments, whole, tmp_path, capsys, monkeypatch):
    original, calls = Predictor.records, itertools.count(1)

    def interrupt(self, paths, images):
        if next(calls) == 3:
            raise KeyboardInterrupt
        return original(self, paths, images)

    with monkeypatch.context() as patch:
        patch.setattr(Predictor, "records", interrupt)
        code, out, err = predict(capsys, *arguments)
    assert (code, out) == (130, "")
    assert "the same command goes on from here" in err
    assert done_in(tmp_path / "out.jsonl.run") == [0, 1]
    assert predict(capsys, *arguments)[0] == 1
    assert (tmp_path / "out.jsonl").read_bytes() == whole


def test_a_full_disk_is_one_message_and_the_run_goes_on_later(arguments, whole, tmp_path, capsys, monkeypatch):
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


@pytest.mark.parametrize("option", ["--overwrite", "--retry-failed"])
def test_ranks_that_cannot_meet_say_so(option, arguments, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.setenv("MASTER_PORT", "1")
    code, _, err = predict(capsys, *arguments, option)
    assert code == 2
    assert "need MASTER_ADDR in the environment, which torchrun sets" in err
    assert not (tmp_path / "out.jsonl.run").exists()


def test_lines_survive_any_name(tmp_path):
    """Newlines, names that are not UTF-8 and JSON's own signs."""
    records = [{"path": 'a\n"\\ \u2028 \udcff 写', "classes": None, "error": "e"}, {"path": "b", "error": None}]
    part = tmp_path / "0-of-1.part"
    part.write_bytes(part_line(7, records) + part_line(12, records[1:]))
    (first, second), end = read_part(part)
    assert (first.number, first.failures, second.number, second.failures) == (7, 1, 12, 0)
    assert end == part.stat().st_size
    assert json.loads(part.read_bytes()[first.offset : first.offset + first.size]) == records


def free_port():
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return held.getsockname()[1]


@pytest.mark.slow
def test_under_torchrun(arguments, whole, tmp_path):
    """As users start it: from nothing, then with options that one rank carries out before the other begins."""
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", free_port()]
    for option, images in (((), COUNT), (("--overwrite",), COUNT), (("--retry-failed",), SIZE)):
        process = start([*map(str, launch), "-m", "beit_fast", "predict"], *arguments, *option)
        out, err = process.communicate(timeout=240)
        assert process.returncode == 1, err  # torchrun's own, since one image cannot be read
        assert "20 images, 1 failed" in out
        done = [line.split(": ")[1].split()[0] for line in out.splitlines() if " images in " in line]
        assert sum(map(int, done)) == images
        assert (tmp_path / "out.jsonl").read_bytes() == whole


@pytest.mark.slow
def test_a_refusal_of_rank_zero_ends_all_ranks(arguments, tmp_path, capsys):
    """Nobody waits for what will not come."""
    assert predict(capsys, *arguments)[0] == 1
    before = (tmp_path / "out.jsonl").stat()
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    command = ["-m", "beit_fast", "predict", *map(str, arguments), "--top", "1", "--retry-failed"]
    ranks = [start(command, RANK=rank, WORLD_SIZE=2, **meeting) for rank in range(2)]
    errors = [process.communicate(timeout=240)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [2, 2]
    assert all("was begun with other options" in error for error in errors)
    assert (tmp_path / "out.jsonl").stat() == before


@pytest.mark.slow
def test_torchrun_that_restarts_does_not_overwrite_again(arguments, whole, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert predict(capsys, *arguments)[0] == 0
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    monkeypatch.setenv("RANK", "1")
    assert predict(capsys, *arguments, "--overwrite")[0] == 1
    assert (tmp_path / "out.jsonl").read_bytes() == whole
