"""`patch_embed` on every instruction set that this machine runs: the other tests take the best of them only."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from beit_fast import native

TESTS = Path(__file__).parent / "test_patch_embed.py"
CHOSEN = "patches_of_a_beit or any_layout or output_channels or long_sums or drawn_inputs and not fallback"


IN_USE, AVAILABLE = native.instruction_sets()  # all other tests run the one in use


@pytest.mark.parametrize("isa", [isa for isa in AVAILABLE if isa != IN_USE])
def test_instruction_set(isa):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(TESTS), "-k", CHOSEN]
    done = subprocess.run(
        command,
        cwd=TESTS.parents[2],
        env={**os.environ, "BEIT_FAST_CPU_ISA": isa},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
