"""The scripts in examples/, run as users run them."""

import os
import subprocess
import sys

from .checkout import ROOT


def run(script, *arguments):
    """What the script prints, on one thread."""
    command = [sys.executable, str(ROOT / "examples" / script), *map(str, arguments)]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
