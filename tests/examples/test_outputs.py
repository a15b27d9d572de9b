"""Examples write what git ignores, and no progress bar floods a log."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess

import pytest

from ..support.checkout import ROOT

SCRIPTS = sorted((ROOT / "examples").glob("*.py"))


def bars_without_disable(text: str) -> list[int]:
    """List the lines of progress bars that also run if stderr is not a terminal."""
    calls = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)]
    return [
        call.lineno
        for call in calls
        if isinstance(call.func, ast.Name)
        and call.func.id in ("tqdm", "trange")
        and "disable" not in [keyword.arg for keyword in call.keywords]
    ]


def test_progress_bars_are_for_terminals() -> None:
    """Regression: bars of the examples flooded logs."""
    scripts = [file for folder in ("examples", "beit_fast", "benchmarks") for file in (ROOT / folder).rglob("*.py")]
    found = {str(script.relative_to(ROOT)): bars_without_disable(script.read_text()) for script in scripts}
    assert {name: lines for name, lines in found.items() if lines} == {}


def test_bars_without_disable_finds_them() -> None:
    assert bars_without_disable("for x in tqdm(y): pass\nfor x in tqdm(y, disable=None): pass\n") == [1]


@pytest.mark.skipif(shutil.which("git") is None or not (ROOT / ".git").exists(), reason="needs git and a checkout")
def test_default_outputs_of_examples_are_ignored_by_git() -> None:
    """Regression: overlay.png, depth.png and digits/ showed up in `git status`."""
    defaults = [name for script in SCRIPTS for name in re.findall(r'default=Path\("([^"]+)"\)', script.read_text())]
    names = [name if name.endswith(".png") else f"{name}/model.safetensors" for name in defaults]
    assert {"overlay.png", "depth.png", "attention.png", "demo.png", "digits/model.safetensors"} <= set(names)
    for name in names:
        done = subprocess.run(["git", "check-ignore", "--quiet", "--no-index", name], cwd=ROOT, check=False)
        assert done.returncode == 0, name
