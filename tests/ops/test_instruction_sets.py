"""Native CPU kernels on every instruction set of this machine.

The other tests run the instruction set in use.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from beit_fast import native

ROOT = Path(__file__).parents[2]
IN_USE, AVAILABLE = native.instruction_sets()
OTHERS = [name for name in AVAILABLE if name != IN_USE]

pytestmark = pytest.mark.skipif("BEIT_FAST_CPU_ISA" in os.environ, reason="this process runs one instruction set")


def run_python(*arguments: str, isa: str) -> subprocess.CompletedProcess[str]:
    command, environment = [sys.executable, *arguments], {**os.environ, "BEIT_FAST_CPU_ISA": isa}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("isa", [pytest.param(x, marks=[] if x == "portable" else pytest.mark.slow) for x in OTHERS])
def test_kernels_on_each_instruction_set_pass_checks(isa: str) -> None:
    done = run_python("-m", "tests.support.instruction_set_checks", isa=isa)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.splitlines()[-1] == f"checked {isa}"
