"""The types that a user's script sees, checked by mypy."""

import subprocess
import sys

import pytest

SCRIPT = """
from typing import Any, Literal, assert_type

import torch

import beit_fast
from beit_fast import BeitForImageClassification, BeitModel, optimize_for_inference
from beit_fast.models.outputs import BeitModelOutputWithPooling, ImageClassifierOutput

pixels = torch.zeros(1, 3, 32, 32)
model = BeitForImageClassification.from_pretrained("checkpoint", attn_implementation="sdpa")
assert_type(model, BeitForImageClassification)
assert_type(
    BeitModel.from_pretrained("checkpoint", output_loading_info=True), tuple[BeitModel, dict[str, Any]]
)
assert_type(model.forward(pixels), ImageClassifierOutput)
assert_type(model.forward(pixels, return_dict=True), ImageClassifierOutput)
assert_type(model.forward(pixels, return_dict=False), tuple[Any, ...])
assert_type(model.forward(pixels).logits, torch.Tensor | None)
assert_type(BeitModel(beit_fast.BeitConfig()).forward(pixels), BeitModelOutputWithPooling)
assert_type(optimize_for_inference(model, "bfloat16"), BeitForImageClassification)


def choose(flag: bool) -> None:
    assert_type(model.forward(pixels, return_dict=flag), ImageClassifierOutput | tuple[Any, ...])
"""
WRONG = """
from beit_fast import BeitConfig, BeitModel

BeitModel(BeitConfig(), attn_implementation="flash")
BeitModel(BeitConfig()).set_attn_implementation("flash")
BeitModel.from_pretrained("checkpoint", attn_implementation="flash")
BeitModel(BeitConfig(), patch_embed_implementation="fast")
"""


@pytest.mark.slow
def test_mypy_types_of_models_follow_class_and_arguments(tmp_path):
    """Check the types in one run of mypy; the other script has a wrong implementation in each line."""
    (tmp_path / "right.py").write_text(SCRIPT)
    (tmp_path / "wrong.py").write_text(WRONG)
    command = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(tmp_path / "cache"), "right.py", "wrong.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    errors = [line for line in done.stdout.splitlines() if ": error:" in line]
    assert [line.split(":")[:2] for line in errors] == [["wrong.py", str(line)] for line in (4, 5, 6, 7)], done.stdout
