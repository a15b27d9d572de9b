"""The hub cache and the working directories of the code blocks."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ..support.checkout import ROOT
from .hub_cache import build_hub, build_workspace


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `home` (HF_HOME) and `workspace` (the files that code blocks read)."""
    folder = tmp_path_factory.mktemp("docs")
    build_hub(folder / "home")
    build_workspace(folder / "workspace")
    return folder


@pytest.fixture
def workspace(prepared: Path, tmp_path: Path) -> Path:
    """A copy of the prepared files for one page."""
    return Path(shutil.copytree(prepared / "workspace", tmp_path / "workspace", symlinks=True))


@pytest.fixture
def environment(prepared: Path) -> Callable[[], dict[str, str]]:
    """The environment of a block: offline, one thread, one process for torch.distributed."""

    def make() -> dict[str, str]:
        own = {"HF_HOME": str(prepared / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
        paths = {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        }
        return {**os.environ, **own, **alone, **paths}

    return make
