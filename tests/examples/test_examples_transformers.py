"""The examples that need Transformers, run as scripts."""

import re

import pytest
from PIL import Image

from ..support.devices import CPU_ATTENTION
from ..support.examples import assert_has_the_digits_processor, run

pytestmark = pytest.mark.slow


def test_accelerate_transformers_keeps_logits():
    text = run("accelerate_transformers.py", "--image-size", 160)
    assert "replaced: 4 BeitAttention" in text
    assert float(re.search(r"relative difference of its logits: (\S+)", text)[1]) < 1e-5
    assert "restored: logits the same to the bit" in text


def test_finetune_trainer_improves_accuracy(tmp_path):
    text = run("finetune_trainer.py", "--out", tmp_path / "model", "--steps", 20)
    before, after = re.search(r"held-out accuracy (\S+)% before, (\S+)% after", text).groups()
    assert float(after) > 90 > float(before)
    assert f"attention: {CPU_ATTENTION}" in text
    assert (tmp_path / "model" / "model.safetensors").exists()
    assert_has_the_digits_processor(tmp_path / "model")


def test_depth_dpt_beats_best_constant(tmp_path):
    text = run("depth_dpt.py", "--out", tmp_path / "depth.png")
    error, constant = map(float, re.search(r"held-out scenes: (\S+) \(of the best constant (\S+)\)", text).groups())
    assert error < constant / 2
    assert f"attention: {CPU_ATTENTION}" in text
    with Image.open(tmp_path / "depth.png") as picture:
        assert picture.size == (1536, 576)
