"""The console script `beit-fast`: what needs no torch, and Ctrl-C during the first imports."""

import json
import os
import subprocess
import sys
import tomllib

import pytest

from beit_fast import __version__

from ..support.checkout import ROOT

FAKE_TORCH = """
import os, signal, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored if the tests run in the background
os.kill(os.getpid(), signal.SIGINT)
time.sleep(60)
"""


def run_script(*arguments, path=None):
    """Run the entry point as the script of an installation does; print at exit whether torch was imported."""
    code = (
        "import atexit, sys, beit_fast_command;"
        "atexit.register(lambda: print('torch' in sys.modules, file=sys.stderr));"
        "sys.argv[0] = 'beit-fast'; sys.exit(beit_fast_command.main())"
    )
    paths = os.pathsep.join(filter(None, [path, str(ROOT)]))
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], env={**os.environ, "PYTHONPATH": paths}, cwd="/",
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        ((), 0, "usage: beit-fast"),
        (("--help",), 0, "usage: beit-fast"),
        (("classify", "--help"), 0, "usage: beit-fast classify"),
        (("--version",), 0, f"beit_fast {__version__}"),
        (("fly",), 2, ""),
        (("segment", "a.png"), 2, ""),
    ],
)
def test_script_answers_without_torch(arguments, code, text):
    """Regression: --help took 1.4 s, because the package imports torch."""
    done = run_script(*arguments)
    assert done.returncode == code
    assert done.stdout.startswith(text)
    assert done.stderr.endswith("False\n")


def test_script_runs_a_command_with_the_whole_package():
    done = run_script("info", "--json")
    assert (done.returncode, done.stderr) == (0, "True\n")
    module = subprocess.run([sys.executable, "-m", "beit_fast", "info", "--json"], capture_output=True, check=True)
    assert json.loads(done.stdout) == json.loads(module.stdout)


def test_script_interrupted_during_the_first_imports_exits_with_130(tmp_path):
    """Regression: a traceback from inside torch. The fake torch is interrupted while it is imported."""
    (tmp_path / "torch.py").write_text(FAKE_TORCH)
    done = run_script("info", path=str(tmp_path))
    assert done.returncode == 130
    assert done.stderr.splitlines()[0] == "beit-fast info: interrupted"
    assert "Traceback" not in done.stderr


def test_script_interrupted_before_the_package_exits_with_130(tmp_path):
    (tmp_path / "argparse.py").write_text(FAKE_TORCH)
    done = run_script("info", path=str(tmp_path))
    assert done.returncode == 130
    assert done.stderr.splitlines()[0] == "beit-fast: interrupted"
    assert "Traceback" not in done.stderr


def test_script_of_the_distribution_is_the_entry_point():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["scripts"] == {"beit-fast": "beit_fast_command:main"}
    assert project["tool"]["setuptools"]["py-modules"] == ["beit_fast_command"]
