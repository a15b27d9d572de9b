"""How commands end as processes: Ctrl-C, closed pipes, full disks and encodings."""

import errno
import io
import json
import os
import signal
import subprocess
import sys

import pytest

from beit_fast import BeitForImageClassification
from beit_fast.checkpoint import loading
from beit_fast.cli import main
from beit_fast.cli.process import run

from ..support.prediction import fork, save_checkpoint, save_image

LINES = {
    "info": "info",
    "classify": "classify IMAGE --model MODEL --device cpu",
    "segment": "segment IMAGE --model MODEL --out o.png --device cpu",
    "predict": "predict IMAGES o.jsonl --model MODEL --device cpu",
    "convert": "convert MODEL converted",
    "selftest": "selftest --device cpu",
    "tune": "tune --show",
    "pretrain": "pretrain IMAGES run",
    "finetune": "finetune IMAGES run --model MODEL",
    "eval": "eval IMAGES --model MODEL",
}


@pytest.fixture
def image(tmp_path):
    return save_image(tmp_path / "images" / "写真.png", 0)


def function_of(command):
    module, _ = main._COMMANDS[command]
    return f"beit_fast.cli{module}.{main._FUNCTIONS.get(command, command)}"


def arguments_of(command, model, image):
    places = {"IMAGE": str(image), "IMAGES": str(image.parent), "MODEL": str(model)}
    return [places.get(word, word) for word in LINES[command].split()]


@pytest.mark.parametrize("command", main._COMMANDS)
def test_command_interrupted_exits_with_130_and_one_line(command, model, image, monkeypatch, capsys):
    def interrupt(options):
        raise KeyboardInterrupt

    monkeypatch.setattr(function_of(command), interrupt)
    assert main.main(arguments_of(command, model, image)) == 130
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"beit-fast {command}: interrupted\n")


@pytest.mark.parametrize("command", main._COMMANDS)
def test_command_with_a_closed_pipe_exits_with_141_in_silence(command, model, image, monkeypatch, capsys):
    def close(options):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr(function_of(command), close)
    assert main.main(arguments_of(command, model, image)) == 141
    assert capsys.readouterr() == ("", "")


def test_classify_interrupted_keeps_the_results_before_it(model, image, monkeypatch, capsys):
    forward, calls = BeitForImageClassification.forward, []

    def interrupt(self, *arguments, **options):
        calls.append(None)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return forward(self, *arguments, **options)

    monkeypatch.setattr(BeitForImageClassification, "forward", interrupt)
    options = ["--model", str(model), "--device", "cpu", "--batch-size", "1", "--json"]
    assert main.main(["classify", str(image), str(image), *options]) == 130
    out, err = capsys.readouterr()
    assert len(json.loads(out)["results"]) == 1
    assert err.endswith("beit-fast classify: interrupted\n")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has other pipes")
@pytest.mark.parametrize("arguments", [("info",), ("classify", "--help")])
def test_process_with_a_closed_pipe_exits_with_141_in_silence(arguments):
    """With a buffer, as by default: without one argparse ignores the error of printing the help."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "beit_fast", *arguments]
    with open(writing, "wb") as pipe:
        done = subprocess.run(command, env=environment, stdout=pipe, stderr=subprocess.PIPE, check=False, timeout=120)
    assert (done.returncode, done.stderr) == (141, b"")


def run_in_fork(arguments, tmp_path, stdout=None, encoding="utf-8"):
    """Run the command in a fork whose stdout is a real file or pipe; return its exit code, stdout and stderr."""
    target = tmp_path / "stdout"

    def child():
        descriptor = os.open(target, os.O_WRONLY | os.O_CREAT) if stdout is None else stdout
        os.dup2(descriptor, 1)
        sys.stdout = io.TextIOWrapper(io.FileIO(1, "w", closefd=False), encoding=encoding, errors="strict")
        return main.main(arguments)

    process = fork(child, tmp_path / "child")
    process.join(60)
    return process.exitcode, target.read_bytes() if stdout is None else b"", (tmp_path / "child.err").read_text()


@pytest.mark.parametrize("command", ["classify", "segment", "convert", "info"])
def test_command_whose_reader_is_gone_exits_with_141(command, model, image, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if command == "segment":
        model = tmp_path / "segmenter"
        options = {"num_hidden_layers": 4, "out_indices": [1, 2, 3, 4], "pool_scales": (1, 2), "auxiliary_channels": 6}
        save_checkpoint(model, "BeitForSemanticSegmentation", **options)
    reading, writing = os.pipe()
    os.close(reading)
    code, _, err = run_in_fork(arguments_of(command, model, image), tmp_path, writing)
    os.close(writing)
    assert code == 141
    assert "Broken pipe" not in err
    assert "Traceback" not in err


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
def test_command_with_a_full_disk_is_one_error(model, image, tmp_path):
    full = os.open("/dev/full", os.O_WRONLY)
    code, _, err = run_in_fork(arguments_of("classify", model, image), tmp_path, full)
    os.close(full)
    assert code == 2
    assert err.splitlines()[-1] == "beit-fast classify: [Errno 28] No space left on device"
    assert "Traceback" not in err


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
@pytest.mark.parametrize("name", ["写真.png", "caf\udce9.png"])
def test_classify_prints_names_in_any_encoding(encoding, name, model, image, tmp_path):
    """The second name is not UTF-8."""
    path = image.with_name(name)
    os.rename(image, path)
    code, out, _ = run_in_fork(arguments_of("classify", model, path), tmp_path, encoding=encoding)
    assert code == 0
    first = out.splitlines()[0]
    can_encode = encoding == "utf-8" and "\udce9" not in name
    assert first == (str(path).encode() if can_encode else str(path).encode(encoding, "backslashreplace"))


def test_run_without_stdout_prints_nothing(monkeypatch):
    """A process may start with closed streams."""
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert run("beit-fast", lambda: print("text") or 0) == 0


def test_run_restores_the_errors_of_stdout(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict")
    monkeypatch.setattr(sys, "stdout", stream)
    assert run("beit-fast", lambda: print("é") or 0) == 0
    assert (stream.errors, stream.buffer.getvalue()) == ("strict", b"\\xe9\n")


@pytest.mark.parametrize("command", ["classify", "predict"])
def test_process_group_interrupted_by_the_terminal_exits_with_130(command, model, image, tmp_path, monkeypatch):
    """While the model is being loaded."""
    monkeypatch.chdir(tmp_path)

    def child():
        signal.signal(signal.SIGINT, signal.default_int_handler)
        loading.load_model = lambda *arguments, **options: os.kill(os.getpid(), signal.SIGINT)
        return main.main(arguments_of(command, model, image))

    process = fork(child, tmp_path / "child")
    process.join(60)
    assert process.exitcode == 130
    assert (tmp_path / "child.err").read_text() == f"beit-fast {command}: interrupted\n"
