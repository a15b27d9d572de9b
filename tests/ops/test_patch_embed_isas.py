"""`patch_embed` on every instruction set that this machine runs: the other tests take the best of them only."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from beit_fast import native

TESTS = Path(__file__).parent / "test_patch_embed.py"
CHOSEN = "patches_of_a_beit or any_layout or output_channels or long_sums or drawn_inputs and not fallback"


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512", "avx512_bf16", "amx"])
def test_instruction_set(isa):
    used, usable = native.instruction_sets()
    if isa not in usable:
        pytest.skip(f"{isa} is not among what runs here: {', '.join(usable) or native.refusal('_C')}")
    if isa == used:
        pytest.skip(f"{isa} is what all other tests run")
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
