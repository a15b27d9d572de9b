"""Shared by packaging tests: the checkout, its build script, and a program that runs a model."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import beit_fast

ROOT = Path(beit_fast.__file__).parents[1]
"""The checkout of the imported package; packaging tests are skipped if it is installed without one."""

FORWARD = """
import torch, beit_fast
config = beit_fast.BeitConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=32,
                              image_size=32, patch_size=8, use_relative_position_bias=True)
model = beit_fast.BeitForImageClassification(config, attn_implementation="triton").eval()
assert model(torch.randn(1, 3, 32, 32)).logits.shape == (1, 2)
print(model.attention_report().kernel)
"""
"""A program that prints the attention kernel."""


def load_native_build(root: Path = ROOT) -> ModuleType:
    """Import `csrc/build.py` of a checkout under the name that setup.py uses."""
    spec = importlib.util.spec_from_file_location("native_build", root / "csrc" / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["native_build"] = module  # dataclasses look up their module there
    spec.loader.exec_module(module)
    return module
