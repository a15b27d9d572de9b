"""`BeitBackbone` in the place of Transformers' own, inside the models that are built on it."""

import pytest
import torch
import transformers

from beit_fast import BeitBackbone, BeitConfig

from .support.oracle import relative_error
from .support.transformers_reference import TINY, hub_state, randomize

LAYERS = {"num_hidden_layers": 4, "out_features": ["stage1", "stage2", "stage3", "stage4"]}
OPTIONS = TINY | LAYERS | {"use_relative_position_bias": True, "use_mask_token": False}
OPTIONS = {key: value for key, value in OPTIONS.items() if key not in ("num_labels", "vocab_size")}


def upernet():
    config = transformers.UperNetConfig(
        backbone_config=transformers.BeitConfig(**OPTIONS, add_fpn=True), hidden_size=16, auxiliary_channels=8,
        auxiliary_in_channels=32, pool_scales=[1, 2], num_labels=3,
    )  # fmt: skip
    return transformers.UperNetForSemanticSegmentation(config), (32, 48)


def dpt():
    config = transformers.DPTConfig(
        backbone_config=transformers.BeitConfig(**OPTIONS, reshape_hidden_states=False), hidden_size=32,
        neck_hidden_sizes=[8, 8, 16, 16], fusion_hidden_size=8, readout_type="project", is_hybrid=False,
        reassemble_factors=[4, 2, 1, 0.5],
    )  # fmt: skip
    return transformers.DPTForDepthEstimation(config), (32, 32)


def zoedepth():
    config = transformers.ZoeDepthConfig(
        backbone_config=transformers.BeitConfig(**OPTIONS, reshape_hidden_states=False),
        neck_hidden_sizes=[8, 8, 16, 16], fusion_hidden_size=8, bottleneck_features=8, num_relative_features=8,
        bin_embedding_dim=8, reassemble_factors=[4, 2, 1, 0.5],
    )  # fmt: skip
    return transformers.ZoeDepthForDepthEstimation(config), (32, 48)


def main_output(outputs):
    return outputs.logits if "logits" in outputs else outputs.predicted_depth


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "triton"])
@pytest.mark.parametrize("build", [upernet, dpt, zoedepth])
def test_takes_the_place_of_transformers_backbone(build, implementation):
    model, size = build()
    model = model.double().eval()
    randomize(model)
    pixels = torch.randn(2, 3, *size, dtype=torch.float64)
    expected = model(pixels, output_hidden_states=True)
    original = model.backbone
    ours = BeitBackbone(original.config, attn_implementation=implementation).double().eval()
    ours.load_state_dict(hub_state(original), strict=True)
    model.backbone = ours
    actual = model(pixels, output_hidden_states=True)
    assert relative_error(main_output(actual), main_output(expected)) < 1e-6
    for mine, theirs in zip(actual.hidden_states, expected.hidden_states, strict=True):
        assert relative_error(mine, theirs) < 1e-6
    as_tuple = model(pixels, return_dict=False)[0]
    assert relative_error(as_tuple, main_output(expected)) < 1e-6


def test_attributes_of_the_contract():
    backbone = BeitBackbone(BeitConfig(**(OPTIONS | {"out_features": None})))
    assert backbone.backbone_type == "transformers"
    assert backbone.stage_names == ["stem", "stage1", "stage2", "stage3", "stage4"]
    assert backbone.num_features == [32] * 5
    assert backbone.out_features == ["stage4"]
    assert backbone.channels == [32]
    backbone.out_features = ["stem", "stage2"]
    assert backbone.out_indices == [0, 2]
    backbone.out_indices = [1, 3, 4]
    assert backbone.out_features == ["stage1", "stage3", "stage4"]
    assert backbone.channels == [32] * 3
    assert set(backbone.out_feature_channels) == set(backbone.stage_names)
    assert len(backbone(torch.randn(1, 3, 32, 32)).feature_maps) == 3


def test_filtered_keywords():
    backbone = BeitBackbone(BeitConfig(**OPTIONS)).eval()
    pixels = torch.randn(1, 3, 32, 32)
    output = backbone.forward_with_filtered_kwargs(pixels, output_hidden_states=True, interpolate_pos_encoding=True)
    assert len(output.hidden_states) == 5
    assert output.attentions is None
    assert isinstance(output.feature_maps, tuple)
    assert output.feature_maps[0].shape == (1, 32, 4, 4)
    with pytest.raises(TypeError, match="unknown"):
        backbone(pixels, unknown=1)
