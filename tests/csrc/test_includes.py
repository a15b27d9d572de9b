"""Include rule of csrc/: operators never include each other.

They may include `errors.h` and `cpu/*.h`.
"""

import re
import shutil
from pathlib import Path

import pytest

from ..support.checkout import ROOT

pytestmark = pytest.mark.skipif(not (ROOT / "csrc").exists(), reason="runs from a checkout")


def forbidden_includes(csrc: Path) -> list[str]:
    """List includes from other operators as `file includes file`."""
    found = []
    for file in sorted(path for path in csrc.rglob("*") if path.suffix in (".cpp", ".h", ".cu", ".cuh")):
        folder = file.parent.relative_to(csrc)
        shared = [Path(), Path("cpu")] if folder.parts[:1] == ("cpu",) else [Path()]
        for name in re.findall(r'^\s*#include "([^"]+)"', file.read_text(), re.MULTILINE):
            if Path(name).parent not in (folder, *shared) or not (csrc / name).is_file():
                found.append(f"{file.relative_to(csrc)} includes {name}")
    return found


def test_forbidden_includes_of_checkout_are_empty():
    assert forbidden_includes(ROOT / "csrc") == []


@pytest.mark.parametrize(
    ("file", "included"),
    [
        ("cpu/attention/softmax.h", "cpu/linear/params.h"),
        ("cpu/half.h", "cpu/attention/params.h"),
        ("cuda/patch_embed/plan.cuh", "cpu/half.h"),
        ("cuda/patch_embed/plan.cuh", "cpu/patch_embed/params.h"),
        ("errors.cpp", "cpu/isa.h"),
        ("cpu/linear/operator.cpp", "params.h"),
    ],
)
def test_forbidden_includes_lists_bad_include(tmp_path, file, included):
    csrc = Path(shutil.copytree(ROOT / "csrc", tmp_path / "csrc"))
    source = csrc / file
    source.write_text(f'#include "{included}"\n{source.read_text()}')
    assert forbidden_includes(csrc) == [f"{file} includes {included}"]
