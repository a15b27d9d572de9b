"""Notebooks in examples/notebooks: their committed outputs, and a run of each."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from PIL import Image

from ..docs.sentences import sentences_of, words_in
from ..support.checkout import ROOT
from ..support.examples import import_script
from .test_public_names import private_imports

FOLDER = ROOT / "examples" / "notebooks"
PICTURES = {"accelerate_a_model": 2, "fine_tune_and_bias_tables": 4, "masked_image_modeling": 5}
"""Pictures of each notebook."""

MOST_BYTES, MOST_WORDS, MOST_CORE_SECONDS = 1_000_000, 25, 120
MACHINE = re.compile(r"(?<![\w.])(/(home|root|tmp|Users|usr|opt|work|mnt)/|[A-Z]:\\)|https?://\d|site-packages")
"""Paths and hosts of a machine."""

WARNING = re.compile(r"\w*Warning\b|WARNING|Traceback")
STALE = "run `make notebooks`"


def read(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / f"{name}.ipynb").read_text(encoding="utf-8"))


def code_of(notebook: Any) -> list[Any]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def outputs_of(notebook: Any) -> list[Any]:
    return [output for cell in code_of(notebook) for output in cell["outputs"]]


def pictures_of(notebook: Any) -> list[Image.Image]:
    """Decode the pictures among the outputs."""
    encoded = [output["data"]["image/png"] for output in outputs_of(notebook) if "image/png" in output.get("data", {})]
    return [Image.open(io.BytesIO(base64.b64decode("".join(picture)))).convert("RGB") for picture in encoded]


def text_of(output: Any) -> str:
    """Return the text of an output, without its picture."""
    data = {kind: value for kind, value in output.get("data", {}).items() if kind != "image/png"}
    return "".join(output.get("text", "")) + json.dumps(data)


def faults_of(notebook: Any) -> list[str]:
    """List outputs that are errors, warnings, progress bars, or name a path of a machine."""
    faults = []
    for output in outputs_of(notebook):
        text = text_of(output)
        faults += [f"error: {output['ename']}"] if output["output_type"] == "error" else []
        faults += [f"stderr: {text[:200]}"] if output.get("name") == "stderr" else []
        faults += [f"{match[0]} in {text[:200]}" for pattern in (MACHINE, WARNING) if (match := pattern.search(text))]
    return faults


def check_pictures(notebook: Any, name: str) -> None:
    pictures = pictures_of(notebook)
    assert len(pictures) == PICTURES[name]
    assert all(min(picture.size) > 100 and len(picture.getcolors(1 << 24)) > 20 for picture in pictures)


@pytest.fixture(scope="module")
def runner() -> ModuleType:
    return import_script(FOLDER / "run.py")


@pytest.fixture
def kernels() -> None:
    """Skip tests that run a kernel if there is none."""
    for package in ("nbclient", "ipykernel"):
        pytest.importorskip(package)


def test_pictures_lists_every_notebook() -> None:
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == set(PICTURES)


@pytest.mark.parametrize("name", PICTURES)
def test_committed_outputs_come_from_the_committed_sources(name: str, runner: ModuleType) -> None:
    notebook = read(name)
    assert notebook["metadata"][runner.HASH] == runner.source_hash(notebook), STALE
    assert [cell["execution_count"] for cell in code_of(notebook)] == list(range(1, len(code_of(notebook)) + 1)), STALE


@pytest.mark.parametrize("name", PICTURES)
def test_committed_outputs_are_pictures_and_text_without_faults(name: str) -> None:
    notebook = read(name)
    check_pictures(notebook, name)
    assert faults_of(notebook) == []
    assert (FOLDER / f"{name}.ipynb").stat().st_size < MOST_BYTES


@pytest.mark.parametrize("name", PICTURES)
def test_sources_import_public_names_in_short_sentences(name: str) -> None:
    notebook = read(name)
    assert private_imports("\n".join("".join(cell["source"]) for cell in code_of(notebook))) == []
    texts = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "markdown"]
    long = [sentence for text in texts for sentence in sentences_of(text) if words_in(sentence) > MOST_WORDS]
    assert long == []


@pytest.mark.parametrize("name", PICTURES)
def test_links_lead_to_files_of_the_checkout(name: str) -> None:
    texts = "\n".join("".join(cell["source"]) for cell in read(name)["cells"] if cell["cell_type"] == "markdown")
    targets = re.findall(r"\]\(((?:\.\./)[^)#\s]+)\)", texts)
    assert [target for target in targets if not (FOLDER / target).resolve().is_file()] == []


def test_source_hash_changes_with_kind_and_text_of_a_cell(runner: ModuleType) -> None:
    def hash_of(*cells: tuple[str, str]) -> str:
        return runner.source_hash({"cells": [{"cell_type": kind, "source": source} for kind, source in cells]})

    hashes = [
        hash_of(("code", "a"), ("code", "b")),
        hash_of(("code", "a"), ("code", "c")),
        hash_of(("code", "a"), ("markdown", "b")),
        hash_of(("code", "ab")),
    ]
    assert len(set(hashes)) == 4
    assert hash_of(("code", "a"), ("code", "b")) == hashes[0]


@pytest.mark.parametrize(
    ("output", "count"),
    [
        ({"output_type": "stream", "name": "stdout", "text": "epoch 1: loss 2.1 (0.9 / 0.1)"}, 0),
        ({"output_type": "stream", "name": "stdout", "text": "saved in /home/name/model"}, 1),
        ({"output_type": "stream", "name": "stderr", "text": "100%"}, 1),
        ({"output_type": "stream", "name": "stdout", "text": "UserWarning: a"}, 1),
        ({"output_type": "execute_result", "data": {"text/plain": ["'/tmp/abc'"]}}, 1),
        ({"output_type": "error", "ename": "ValueError"}, 1),
    ],
)
def test_faults_of_an_output_are_errors_warnings_and_paths(output: dict[str, Any], count: int) -> None:
    assert len(faults_of({"cells": [{"cell_type": "code", "outputs": [output]}]})) == count


@pytest.mark.usefixtures("kernels")
def test_main_notebook_that_fails_is_unchanged(tmp_path: Path, runner: ModuleType, capsys: Any) -> None:
    path = tmp_path / "broken.ipynb"
    cell = {"cell_type": "code", "id": "a", "source": "1 / 0", "metadata": {}, "outputs": [], "execution_count": None}
    path.write_text(json.dumps({"cells": [cell], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}))
    text = path.read_text()
    assert runner.main([str(path)]) == 1
    assert path.read_text() == text
    assert "ZeroDivisionError" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["broken.ipynb"]


@pytest.mark.slow
@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("name", PICTURES)
def test_notebook_runs_offline_in_two_core_minutes(
    name: str, runner: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # waiting threads would count as time of a core
    before = (FOLDER / f"{name}.ipynb").read_bytes()
    spent = runner.processor_seconds()
    notebook = runner.execute(FOLDER / f"{name}.ipynb")
    assert runner.processor_seconds() - spent < MOST_CORE_SECONDS
    assert faults_of(notebook) == []
    check_pictures(notebook, name)
    assert (FOLDER / f"{name}.ipynb").read_bytes() == before
