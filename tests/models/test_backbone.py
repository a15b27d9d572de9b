"""`BeitBackbone` as the backbone of Transformers' dense-prediction models."""

import pytest
import torch

from beit_fast import BeitBackbone, BeitConfig

from ..support.dense_models import DENSE_MODELS, OPTIONS, main_output, model_class
from ..support.oracle import relative_error
from ..support.transformers_reference import hub_state, randomize


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "triton"])
@pytest.mark.parametrize("build", DENSE_MODELS)
def test_backbone_in_dense_model_equals_transformers(build, implementation):
    config, size = build()
    model = model_class(build)(config).double().eval()
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


def test_backbone_attributes_follow_out_features():
    backbone = BeitBackbone(BeitConfig(**(OPTIONS | {"out_features": None})))
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


def test_backbone_filtered_kwargs_are_ignored():
    backbone = BeitBackbone(BeitConfig(**OPTIONS)).eval()
    pixels = torch.randn(1, 3, 32, 32)
    output = backbone.forward_with_filtered_kwargs(pixels, output_hidden_states=True, interpolate_pos_encoding=True)
    assert len(output.hidden_states) == 5
    assert output.attentions is None
    assert isinstance(output.feature_maps, tuple)
    assert output.feature_maps[0].shape == (1, 32, 4, 4)
    with pytest.raises(TypeError, match="unknown"):
        backbone(pixels, unknown=1)
