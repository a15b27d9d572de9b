"""Feature extractors of torchvision and timm, which trace with torch.fx, on accelerated timm models.

They need torchvision. `make test-torch-2.14.1` installs it, and fails if it cannot be imported.
"""

import copy
import importlib
import importlib.util

import pytest
import torch

from ..support import timm_reference
from ..support.oracle import relative_error
from ..support.timm_reference import timm
from .test_timm import NETWORKS, accelerate, pair, pixels_for, restore
from .test_timm_hooks import assert_same_values, fused_calls

pytestmark = pytest.mark.skipif(importlib.util.find_spec("torchvision") is None, reason="torchvision is not installed")

NODES = {"blocks.0": "first", "blocks.2": "last", "head": "logits"}
LIBRARIES = {"torchvision": "torchvision.models.feature_extraction", "timm": "timm.models"}


def assert_same_features(mine, wanted):
    assert mine.keys() == wanted.keys() == set(NODES.values())
    for name, value in wanted.items():
        assert relative_error(mine[name], value) < 1e-5, name


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("position", ["per layer", "shared", "both", "absolute"])
@pytest.mark.parametrize("library", LIBRARIES)
def test_create_feature_extractor_accelerated_equals_timm(library, position, mode):
    create_feature_extractor = importlib.import_module(LIBRARIES[library]).create_feature_extractor
    reference, fast = (model.train(mode == "train") for model in pair(position))
    expected, features = (create_feature_extractor(model, dict(NODES)) for model in (reference, fast))
    assert fused_calls(features, pixels_for(fast)) == 3
    for batch in (1, 3):
        pixels = pixels_for(fast, batch)
        mine, wanted = features(pixels), expected(pixels)
        assert_same_features(mine, wanted)
        gradients = [
            torch.autograd.grad(result["logits"].square().sum(), model.get_parameter("patch_embed.proj.weight"))[0]
            for result, model in ((mine, features), (wanted, expected))
        ]
        assert relative_error(*gradients) < 1e-5
    restored = create_feature_extractor(restore_in_place(fast), dict(NODES))
    assert_same_features(restored(pixels), wanted)


def restore_in_place(model):
    restore(model)
    return model


def test_attention_extract_by_fx_accelerated_equals_timm():
    """timm's way to attention maps: unfused attention and the inputs of `attn_drop`."""
    reference = timm_reference.build(**NETWORKS["both"])
    for block in reference.blocks:
        block.attn.fused_attn = False
    fast = copy.deepcopy(reference)
    accelerate(fast)
    pixels = pixels_for(fast)
    maps, expected = (timm.utils.AttentionExtract(model, method="fx")(pixels) for model in (fast, reference))
    assert list(maps) == list(expected)
    assert_same_values(list(maps.values()), list(expected.values()))
