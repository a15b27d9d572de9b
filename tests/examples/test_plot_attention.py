"""examples/plot_attention.py draws the picture of the documentation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ..support.checkout import ROOT
from ..support.examples import run

PICTURE = ROOT / "docs" / "pictures" / "attention.png"


def test_command_of_the_docs_draws_the_committed_picture(tmp_path: Path) -> None:
    out = tmp_path / "folder" / "attention.png"
    assert "8_28.png: eight (0.8" in run("plot_attention.py", "--out", out)
    drawn, committed = (np.asarray(Image.open(path).convert("L"), dtype=float) for path in (out, PICTURE))
    assert drawn.shape == committed.shape
    assert np.abs(drawn - committed).mean() < 4  # releases of matplotlib place texts differently
    assert PICTURE.stat().st_size < 150_000
    assert f"--out {PICTURE.relative_to(ROOT).as_posix()}" in (ROOT / "docs" / "inference.md").read_text()


def test_checkpoint_that_is_not_there_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="no checkpoint 'there-is/no-such-model'"):
        run("plot_attention.py", "--model", "there-is/no-such-model", "--out", tmp_path / "attention.png")
    assert list(tmp_path.iterdir()) == []
