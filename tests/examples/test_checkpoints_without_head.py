"""Examples refuse a checkpoint whose head is missing, or whose outputs are not what they print."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

from ..support.checkout import ROOT
from ..support.prediction import save_checkpoint, save_image

SEGMENTATION = {"num_hidden_layers": 4, "out_indices": [1, 2, 3, 4], "pool_scales": (1, 2)}


def main_of(script: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))  # scripts import each other
    specification = importlib.util.spec_from_file_location(script, ROOT / "examples" / f"{script}.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    monkeypatch.setitem(sys.modules, script, module)
    specification.loader.exec_module(module)
    return module.main


def arguments_of(script: str, model: Path, folder: Path) -> list[str]:
    image, out = str(save_image(folder / "a.png", 0)), str(folder / "o.png")
    places = {"classification": [image], "demo": ["--image", image, "--out", out]}
    return [*places.get(script, ["--image", image, "--out", out]), "--model", str(model)]


@pytest.mark.filterwarnings("ignore:some parameters of")
@pytest.mark.parametrize(
    ("script", "options", "message"),
    [
        ("demo", {"name": "BeitModel"}, "does not contain classifier.bias, classifier.weight, which would be random"),
        ("demo", {"problem_type": "multi_label_classification"}, "is for multi_label_classification"),
        ("demo", {"num_labels": 1, "id2label": {0: "age"}}, "is for regression"),
        ("classification", {"name": "BeitForMaskedImageModeling"}, "classifier.weight"),
        ("classification", {"problem_type": "regression"}, "has no classes that exclude each other"),
        ("classification", {"num_labels": 1, "id2label": {0: "age"}}, "has no classes that exclude each other"),
        ("segmentation_overlay", SEGMENTATION, "decode_head.classifier.weight"),
    ],
)
def test_example_without_the_head_that_it_shows_exits_with_one_error(
    script: str,
    options: dict[str, Any],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if script == "demo":
        pytest.importorskip("matplotlib")
    save_checkpoint(tmp_path / "model", **options)
    with pytest.raises(SystemExit) as caught:
        main_of(script, monkeypatch)(arguments_of(script, tmp_path / "model", tmp_path))
    assert caught.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "o.png").exists()
