"""examples/classification.py and examples/segmentation_overlay.py, run as scripts."""

import re

import pytest
from PIL import Image

from ..support.devices import CPU_ATTENTION
from ..support.examples import run
from ..support.prediction import save_checkpoint, save_image

pytestmark = pytest.mark.slow


def test_classification_digits_are_correct():
    text = run("classification.py")
    assert "20 of 20 right" in text
    assert f"attention: {CPU_ATTENTION}" in text
    difference = re.search(r"relative difference of its logits: (\S+)", text)
    assert float(difference[1]) < 1e-5


def test_classification_other_checkpoint_prints_classes(tmp_path):
    save_checkpoint(tmp_path / "model")
    (tmp_path / "model" / "preprocessor_config.json").write_text('{"size": {"height": 32, "width": 32}}')
    text = run("classification.py", save_image(tmp_path / "a.png", 0), "--model", tmp_path / "model")
    assert re.search(r"^a\.png +class \d", text)


def test_segmentation_overlay_learns_digits(tmp_path):
    out = tmp_path / "overlay.png"
    text = run("segmentation_overlay.py", "--out", out)
    share = re.search(r"in its own digit's class: (\S+)%", text)
    assert float(share[1]) > 60  # chance level: 10 %
    assert f"attention: {CPU_ATTENTION}" in text
    with Image.open(out) as picture:
        assert picture.size == (1200, 240)
        assert len(picture.getcolors(1 << 20)) > 100


def test_segmentation_overlay_photograph_keeps_size(tmp_path):
    options = {"num_hidden_layers": 4, "out_indices": [1, 2, 3, 4], "pool_scales": (1, 2)}
    save_checkpoint(tmp_path / "model", "BeitForSemanticSegmentation", **options)
    (tmp_path / "model" / "preprocessor_config.json").write_text('{"size": {"height": 32, "width": 32}}')
    photograph = save_image(tmp_path / "a.png", 0, (40, 60))
    run("segmentation_overlay.py", "--out", tmp_path / "o.png", "--model", tmp_path / "model", "--image", photograph)
    with Image.open(tmp_path / "o.png") as picture:
        assert picture.size == (60, 40)
