"""Run the scripts in examples/."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

from beit_fast import BeitImageProcessor

from .checkout import ROOT


def run(script, *arguments):
    """Run a script on one thread and return its stdout."""
    command = [sys.executable, str(ROOT / "examples" / script), *map(str, arguments)]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def import_script(path: Path) -> ModuleType:
    """Import a script by its path."""
    spec = importlib.util.spec_from_file_location(f"beit_fast_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def assert_has_the_digits_processor(folder):
    """Check that a checkpoint preprocesses images as the digits model does."""
    wanted = BeitImageProcessor.from_pretrained(ROOT / "examples" / "digits")
    assert BeitImageProcessor.from_pretrained(folder).to_dict() == wanted.to_dict()
