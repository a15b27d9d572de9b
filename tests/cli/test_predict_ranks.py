"""Several processes of `beit-fast predict` on one run, and runs that end with an error."""

import fcntl
import json
import multiprocessing
import os
import socket
import subprocess
import sys
import time

import pytest
import torch

from beit_fast.cli.predict.ranks import Ranks

from ..support.prediction import (
    BATCH_SIZE,
    COUNT,
    done_in,
    fork,
    main_predict,
    names_in,
    predict,
    save_checkpoint,
    save_image,
)


@pytest.fixture
def set_rank(monkeypatch):
    def set_rank(rank, world):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(world))

    return set_rank


def test_predict_in_two_processes_shares_the_images(arguments, whole, tmp_path):
    """The process that ends last writes the results."""
    ranks = [
        fork(lambda: main_predict(*arguments, "--json"), tmp_path / str(rank), RANK=rank, WORLD_SIZE=2, LOCAL_RANK=rank)
        for rank in range(2)
    ]
    for process in ranks:
        process.join(120)
    facts = [json.loads((tmp_path / f"{rank}.out").read_text()) for rank in range(2)]
    assert [fact["rank"] for fact in facts] == [0, 1]
    assert [fact["images"] for fact in facts] == [11, 9]  # 4 batches, the last one of two images, and 3
    codes = [process.exitcode for process in ranks]
    assert 1 in codes
    assert codes == [0 if fact["complete"] is None else 1 for fact in facts]
    assert (tmp_path / "out.jsonl").read_bytes() == whole


@pytest.mark.parametrize("first", [(0, 3), (4, 5)])
def test_predict_resumes_with_another_number_of_processes(
    first, arguments, whole, read, images, tmp_path, capsys, monkeypatch, set_rank
):
    set_rank(*first)
    code, text, _ = predict(capsys, *arguments)
    assert code == 0
    assert f"rank {first[0]} of {first[1]}: other ranks are still running" in text
    assert not (tmp_path / "out.jsonl").exists()
    done = done_in(tmp_path / "out.jsonl.run")
    assert done == list(range(first[0], 7, first[1]))
    read.clear()
    monkeypatch.undo()
    code, text, _ = predict(capsys, *arguments, "--json")
    assert code == 1
    assert json.loads(text)["images"] == sum(len(names_in(number, images)) for number in {*range(7)} - {*done})
    assert (tmp_path / "out.jsonl").read_bytes() == whole


def test_predict_complete_run_with_failures_exits_with_1_on_rank_0_only(arguments, tmp_path, capsys, set_rank):
    """torchrun then ends with an error once, as in the run that wrote the results."""
    assert predict(capsys, *arguments)[0] == 1
    codes = []
    for rank in range(2):
        set_rank(rank, 2)
        code, text, _ = predict(capsys, *arguments)
        assert f"is already complete: {COUNT} images, 1 failed" in text
        codes.append(code)
    assert codes == [1, 0]


def test_predict_with_more_ranks_than_batches(arguments, whole, tmp_path, capsys, set_rank):
    codes = []
    for rank in reversed(range(9)):
        set_rank(rank, 9)
        codes.append(predict(capsys, *arguments)[0])
    assert codes == [0] * 8 + [1]
    assert (tmp_path / "out.jsonl").read_bytes() == whole


def test_predict_second_process_of_a_rank_exits_with_error(arguments, tmp_path, capsys, monkeypatch, set_rank):
    set_rank(0, 2)
    predict(capsys, *arguments)
    folder = tmp_path / "out.jsonl.run"
    done = done_in(folder)
    locked = multiprocessing.get_context("fork").Event()

    def hold():
        with (folder / "0-of-2.lock").open("ab") as stream:
            fcntl.lockf(stream, fcntl.LOCK_EX)
            locked.set()
            time.sleep(600)

    process = fork(hold)
    assert locked.wait(60)
    code, _, err = predict(capsys, *arguments)
    assert code == 2
    assert "is this command already running?" in err
    monkeypatch.delenv("RANK")
    monkeypatch.delenv("WORLD_SIZE")
    for more in ((), ("--overwrite",), ("--retry-failed",)):
        code, _, err = predict(capsys, *arguments, *more)
        assert code == 2
        assert "0-of-2.lock" in err
        assert "wait until it has ended" in err
    assert done_in(folder) == done
    process.kill()
    process.join()
    assert predict(capsys, *arguments)[0] == 1


@pytest.fixture(scope="module")
def started(model, images, tmp_path_factory):
    """A run of which rank 0 of 2 is done, on copies that can be changed."""
    root = tmp_path_factory.mktemp("started")
    for name, source in (("images", images), ("model", model)):
        (root / name).mkdir()
        for path in source.iterdir():
            (root / name / path.name).symlink_to(path)
    arguments = [root / "images", root / "out.jsonl", "--model", root / "model", "--batch-size", BATCH_SIZE]
    arguments += ["--workers", 0, "--device", "cpu"]
    process = fork(lambda: main_predict(*arguments), RANK=0, WORLD_SIZE=2)
    process.join()
    assert process.exitcode == 0
    return arguments


@pytest.mark.parametrize(
    ("change", "message", "differences"),
    [
        (["--batch-size", 4], "batch size: 3 before, 4 now", 1),
        (["--top", 2], "top: 5 before, 2 now", 1),
        (["--logits"], "output: 'classes' before, 'logits' now", 2),
        (["--attn", "eager"], "attention: None before, 'eager' now", 1),
        (["--dtype", "bfloat16"], "dtype: 'float32' before, 'bfloat16' now", 2),
        (["--optimize"], "optimize: False before, True now", 1),
        ("another image", "images: 20 before, 21 now", 2),
        ("another model", "model: ", 1),
        ("another processor", "model: ", 1),
    ],
)
def test_predict_with_other_options_exits_with_error(change, message, differences, started, tmp_path, capsys):
    """Nothing of the run is changed."""
    arguments, more = list(started), tmp_path / "more"
    if change == "another image":
        more = save_image(started[0] / "more.png", 99)
    elif change == "another model":
        save_checkpoint(more, seed=1)
        arguments[3] = more
    elif change == "another processor":
        more.write_text('{"size": {"height": 32, "width": 32}, "image_std": [1, 1, 1]}')
        arguments += ["--processor", more]
    else:
        arguments += change
    run = started[0].parent / "out.jsonl.run"
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    code, out, err = predict(capsys, *arguments)
    if more.is_file():
        more.unlink()
    assert (code, out) == (2, "")
    assert "was started with other options" in err
    assert message in err
    assert err.count(" before, ") == differences
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_predict_damaged_manifest_exits_with_error(arguments, whole, tmp_path, capsys):
    predict(capsys, *arguments)
    for content in ("{", "{}"):
        (tmp_path / "out.jsonl.run" / "manifest.json").write_text(content)
        code, _, err = predict(capsys, *arguments)
        assert code == 2
        assert "manifest.json" in err
    assert predict(capsys, *arguments, "--overwrite")[0] == 1
    assert (tmp_path / "out.jsonl").read_bytes() == whole


@pytest.mark.parametrize("option", ["--overwrite", "--retry-failed"])
def test_predict_ranks_without_an_address_exits_with_error(option, arguments, tmp_path, capsys, monkeypatch, set_rank):
    set_rank(1, 2)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.setenv("MASTER_PORT", "1")
    code, _, err = predict(capsys, *arguments, option)
    assert code == 2
    assert "need MASTER_ADDR in the environment (set by torchrun)" in err
    assert not (tmp_path / "out.jsonl.run").exists()


def free_port():
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return held.getsockname()[1]


@pytest.mark.slow
def test_predict_under_torchrun(arguments, whole, tmp_path):
    """From nothing by `--overwrite`, then a part: rank 0 carries out both options before the other ranks start."""
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", free_port()]
    (tmp_path / "out.jsonl").write_text("of another run")
    for option, images in (("--overwrite", COUNT), ("--retry-failed", BATCH_SIZE)):
        command = [sys.executable, *launch, "-m", "beit_fast", "predict", *arguments, option]
        done = subprocess.run(
            list(map(str, command)), env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
        )
        assert done.returncode == 1, done.stderr  # torchrun's own, because one image cannot be read
        assert "20 images, 1 failed" in done.stdout
        counts = [line.split(": ")[1].split()[0] for line in done.stdout.splitlines() if " images in " in line]
        assert sum(map(int, counts)) == images
        assert (tmp_path / "out.jsonl").read_bytes() == whole


def test_predict_error_of_rank_zero_stops_all_ranks(arguments, tmp_path, capsys):
    assert predict(capsys, *arguments)[0] == 1
    before = (tmp_path / "out.jsonl").stat()
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    command = [*arguments, "--top", 1, "--retry-failed"]
    ranks = [
        fork(lambda: main_predict(*command), tmp_path / str(rank), RANK=rank, WORLD_SIZE=2, **address)
        for rank in range(2)
    ]
    for process in ranks:
        process.join(240)
    assert [process.exitcode for process in ranks] == [2, 2]
    assert all("was started with other options" in (tmp_path / f"{rank}.err").read_text() for rank in range(2))
    assert (tmp_path / "out.jsonl").stat() == before


def test_predict_restarted_by_torchrun_does_not_overwrite_again(
    arguments, whole, tmp_path, capsys, monkeypatch, set_rank
):
    set_rank(0, 2)
    assert predict(capsys, *arguments)[0] == 0
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    set_rank(1, 2)
    assert predict(capsys, *arguments, "--overwrite")[0] == 1
    assert (tmp_path / "out.jsonl").read_bytes() == whole


@pytest.mark.parametrize(("rank", "world"), [("0", None), (None, "2"), ("2", "2"), ("-1", "2"), ("x", "2"), ("0", "0")])
def test_ranks_inconsistent_environment_raises(rank, world, monkeypatch):
    for name, value in (("RANK", rank), ("WORLD_SIZE", world)):
        monkeypatch.setenv(name, value) if value is not None else monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match="RANK=") as caught:
        Ranks.from_environment()
    assert f"RANK={rank!r} and WORLD_SIZE={world!r}" in str(caught.value)


def test_ranks_device_is_one_gpu_per_rank(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    ranks = Ranks(rank=5, world=8, local_rank=1, local_world=4)
    assert ranks.device(None) == ranks.device("cuda") == torch.device("cuda", 1)
    assert ranks.device("cuda:0") == torch.device("cuda", 0)
    assert ranks.device("cpu") == torch.device("cpu")
    with pytest.raises(ValueError, match="no GPU for rank 2 of this machine, which has 2"):
        Ranks(rank=2, world=8, local_rank=2, local_world=4).device(None)
