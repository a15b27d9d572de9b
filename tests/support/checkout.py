"""What the tests of packaging share: the checkout, its build script, and a program that uses the package."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import beit_fast

ROOT = Path(beit_fast.__file__).parents[1]
"""The checkout that the package runs from; where it is none, no test of packaging runs."""

FORWARD = """
import torch, beit_fast
config = beit_fast.BeitConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=32,
                              image_size=32, patch_size=8, use_relative_position_bias=True)
model = beit_fast.BeitForImageClassification(config, attn_implementation="triton").eval()
assert model(torch.randn(1, 3, 32, 32)).logits.shape == (1, 2)
print(model.attention_report().kernel)
"""
"""Prints the kernel that served attention."""


def load_native_build(root: Path = ROOT) -> ModuleType:
    """A fresh `csrc/build.py` of a checkout, as setup.py has it."""
    spec = importlib.util.spec_from_file_location("native_build", root / "csrc" / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["native_build"] = module  # its dataclasses look for it there
    spec.loader.exec_module(module)
    return module
