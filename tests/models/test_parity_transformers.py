"""Every class against Transformers with the same weights: outputs, loss and gradients for three backends."""

import pytest
import torch
import transformers

import beit_fast
from beit_fast.layers import BeitRelativePositionBias

from ..support.oracle import assert_within_budget, relative_error
from ..support.transformers_reference import (
    CLASSES,
    POSITIONS,
    build_pair,
    hub_gradients,
    hub_state,
    main_output,
    random_inputs,
    scalar_of,
)

BACKENDS = ("eager", "sdpa", "triton")
SIZES = {"native": (32, 32), "rectangular": (24, 48), "larger": (48, 40), "cropped": (35, 45)}
FP32_PARITY = 1e-5
FP64_PARITY = 1e-9  # two orders of summation in fp64
FP32_SOFTMAX = 1e-6  # the reference's eager attention always computes softmax in fp32


def assert_same(ours, theirs, tolerance):
    for mine, reference in zip(ours, theirs, strict=True):
        assert mine.shape == reference.shape
        assert relative_error(mine, reference) <= tolerance


def assert_same_gradients(ours, theirs):
    gradients = hub_gradients(theirs)
    for name, parameter in ours.named_parameters():
        if gradients[name].isnan().all():
            assert parameter.grad is None, name
        else:
            assert relative_error(parameter.grad, gradients[name]) <= FP64_PARITY, name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("name", CLASSES)
def test_model_outputs_loss_and_gradients_equal_transformers(name, position, backend):
    """Output, loss and all gradients are compared in fp64, where rounding cannot hide a wrong formula."""
    theirs, ours = build_pair(name, backend, **POSITIONS[position])
    for size in SIZES.values():
        inputs = random_inputs(name, ours, size)
        theirs.zero_grad()
        ours.zero_grad()
        expected, actual = theirs(**inputs), ours(**inputs)
        assert_same(main_output(actual), main_output(expected), FP64_PARITY)
        assert_same([scalar_of(actual)], [scalar_of(expected)], FP64_PARITY)
        scalar_of(expected).backward()
        scalar_of(actual).backward()
        assert_same_gradients(ours, theirs)


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("name", CLASSES)
def test_forward_fp32_equals_transformers(name, position, size):
    """eager and sdpa are within 1e-5 of Transformers, triton within twice the error of eager against fp64."""
    theirs, ours = build_pair(name, **POSITIONS[position])
    inputs = random_inputs(name, ours, size)
    inputs.pop("labels", None)
    with torch.no_grad():
        reference = main_output(theirs(**inputs))
        theirs, ours = theirs.float(), ours.float()
        inputs["pixel_values"] = inputs["pixel_values"].float()
        expected, outputs = main_output(theirs(**inputs)), {}
        for backend in BACKENDS:
            ours.set_attn_implementation(backend)
            outputs[backend] = main_output(ours(**inputs))
    for backend in ("eager", "sdpa"):
        assert_same(outputs[backend], expected, FP32_PARITY)
    for fused, eager, exact in zip(outputs["triton"], outputs["eager"], reference, strict=True):
        assert_within_budget("triton", fused, exact, eager, 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_forward_low_precision_error_is_within_budget(dtype):
    _, ours = build_pair("BeitForImageClassification", **POSITIONS["per layer"])
    inputs = random_inputs("BeitForImageClassification", ours)
    inputs.pop("labels")
    with torch.no_grad():
        ours.to(dtype).double()
        exact = ours(**{key: x.to(dtype).double() for key, x in inputs.items()}).logits
        ours.to(dtype)
        outputs = {}
        for backend in BACKENDS:
            ours.set_attn_implementation(backend)
            outputs[backend] = ours(inputs["pixel_values"].to(dtype)).logits
    for backend in ("sdpa", "triton"):
        assert outputs[backend].dtype == dtype
        assert_within_budget(backend, outputs[backend], exact, outputs["eager"], 2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("name", CLASSES)
def test_model_rectangular_window_equals_paper(name, position, backend):
    """Transformers 5.24 reads a rectangular table as (width, height), so the reference uses the paper's gather."""
    theirs, ours = build_pair(name, backend, image_size=[24, 40], **POSITIONS[position])
    inputs = random_inputs(name, ours, (24, 40))
    expected, actual = theirs(**inputs), ours(**inputs)
    assert_same(main_output(actual), main_output(expected), FP64_PARITY)
    assert_same([scalar_of(actual)], [scalar_of(expected)], FP64_PARITY)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mutation", ["dropped", "transposed"])
@pytest.mark.parametrize("name", ["BeitForImageClassification", "BeitForSemanticSegmentation"])
def test_assert_same_with_wrong_bias_fails(name, mutation, backend, monkeypatch):
    theirs, ours = build_pair(name, backend, **POSITIONS["per layer"])
    inputs = random_inputs(name, ours)
    genuine = BeitRelativePositionBias.forward

    def mutant(self, window):
        table = genuine(self, window)
        if mutation == "dropped":
            return torch.zeros_like(table)
        side = 2 * window[0] - 1
        return torch.cat([table[:-3].view(side, side, -1).transpose(0, 1).flatten(0, 1), table[-3:]])

    expected = main_output(theirs(**inputs))
    assert_same(main_output(ours(**inputs)), expected, FP64_PARITY)
    monkeypatch.setattr(BeitRelativePositionBias, "forward", mutant)
    with pytest.raises(AssertionError):
        assert_same(main_output(ours(**inputs)), expected, FP32_PARITY)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("position", ["per layer", "shared", "none"])
@pytest.mark.parametrize("name", ["BeitModel", "BeitForMaskedImageModeling"])
def test_attention_mask_equals_transformers_eager(name, position, backend):
    """The reference is eager, because Transformers 5.24 with sdpa adds the mask to the bias."""
    theirs, ours = build_pair(name, backend, "eager", **POSITIONS[position])
    inputs = random_inputs(name, ours)
    inputs["attention_mask"] = (torch.rand(2, 17, generator=torch.Generator().manual_seed(2)) > 0.4).long()
    inputs["attention_mask"][:, 0] = 1
    expected, actual = main_output(theirs(**inputs)), main_output(ours(**inputs))
    assert_same(actual, expected, FP32_SOFTMAX)
    del inputs["attention_mask"]
    with pytest.raises(AssertionError):
        assert_same(main_output(ours(**inputs)), expected, FP32_PARITY)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CLASSES)
def test_hidden_states_and_attentions_equal_transformers(name, backend):
    theirs, ours = build_pair(name, backend, "eager", **POSITIONS["both"])
    inputs = random_inputs(name, ours)
    expected = theirs(**inputs, output_hidden_states=True, output_attentions=True)
    actual = ours(**inputs, output_hidden_states=True, output_attentions=True)
    assert len(actual.hidden_states) == ours.config.num_hidden_layers + 1
    assert_same(actual.hidden_states, expected.hidden_states, FP32_SOFTMAX)
    assert_same(actual.attentions, expected.attentions, FP32_SOFTMAX)
    assert actual.attentions[0].shape == (2, 4, 17, 17)
    torch.testing.assert_close(actual.attentions[0].sum(-1), torch.ones(2, 4, 17, dtype=torch.float64))
    plain = ours(**inputs)
    assert plain.hidden_states is None
    assert plain.attentions is None


@pytest.mark.parametrize("name", CLASSES)
def test_return_tuple_equals_transformers(name):
    theirs, ours = build_pair(name, **POSITIONS["per layer"])
    inputs = random_inputs(name, ours)
    expected = theirs(**inputs, return_dict=False, output_hidden_states=True)
    actual = ours(**inputs, return_dict=False, output_hidden_states=True)
    assert isinstance(actual, tuple)
    assert len(actual) == len(expected)
    for mine, reference in zip(actual, expected, strict=True):
        pair = (mine, reference) if isinstance(mine, tuple) else ([mine], [reference])
        assert_same(*pair, FP64_PARITY)


@pytest.mark.parametrize(
    "options",
    [
        {"use_mean_pooling": False},
        {"layer_scale_init_value": 0.0},
        {"num_hidden_layers": 1},
        {"hidden_act": "relu"},
        {"use_mask_token": False},
        {"num_channels": 1},
    ],
)
@pytest.mark.parametrize("name", ["BeitModel", "BeitForImageClassification"])
def test_config_options_equal_transformers(name, options):
    theirs, ours = build_pair(name, "triton", **POSITIONS["per layer"], **options)
    inputs = random_inputs(name, ours)
    inputs["pixel_values"] = inputs["pixel_values"][:, : ours.config.num_channels]
    assert_same(main_output(ours(**inputs)), main_output(theirs(**inputs)), FP64_PARITY)


@pytest.mark.parametrize(
    "options", [{"use_auxiliary_head": False}, {"auxiliary_num_convs": 2}, {"auxiliary_concat_input": True}]
)
def test_segmentation_heads_equal_transformers(options):
    name = "BeitForSemanticSegmentation"
    theirs, ours = build_pair(name, **POSITIONS["per layer"], **options)
    inputs = random_inputs(name, ours)
    theirs.train()
    ours.train()
    expected, actual = theirs(**inputs), ours(**inputs)
    assert_same([actual.logits, actual.loss], [expected.logits, expected.loss], FP64_PARITY)


@pytest.mark.parametrize("reshape", [True, False])
@pytest.mark.parametrize("add_fpn", [True, False])
def test_backbone_feature_maps_equal_transformers(reshape, add_fpn):
    if add_fpn and not reshape:
        return
    theirs, ours = build_pair(
        "BeitBackbone", **POSITIONS["per layer"], reshape_hidden_states=reshape, add_fpn=add_fpn, num_hidden_layers=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    inputs = random_inputs("BeitBackbone", ours, (24, 48))
    expected, actual = theirs(**inputs), ours(**inputs)
    assert_same(actual.feature_maps, expected.feature_maps, FP64_PARITY)
    assert ours.channels == theirs.channels == [32] * 4
    assert ours.out_feature_channels == theirs.out_feature_channels
    assert ours.stage_names == theirs.stage_names
    assert ours.num_features == theirs.num_features


@pytest.mark.parametrize(
    ("num_labels", "problem_type", "labels"),
    [
        (1, None, torch.tensor([0.3, -1.2], dtype=torch.float64)),
        (3, "regression", torch.randn(2, 3, dtype=torch.float64)),
        (5, None, torch.tensor([4, 0])),
        (5, "single_label_classification", torch.tensor([4, 0])),
        (5, None, torch.tensor([[1.0, 0, 0, 1, 1], [0, 0, 1, 0, 0]], dtype=torch.float64)),
        (
            5,
            "multi_label_classification",
            torch.tensor([[1.0, 0, 0, 1, 1], [0, 0, 1, 0, 0]], dtype=torch.float64),
        ),
    ],
)
def test_classification_losses_equal_transformers(num_labels, problem_type, labels):
    theirs, ours = build_pair("BeitForImageClassification", num_labels=num_labels, problem_type=problem_type)
    inputs = random_inputs("BeitForImageClassification", ours) | {"labels": labels}
    assert_same([ours(**inputs).loss], [theirs(**inputs).loss], FP64_PARITY)


def test_gradient_checkpointing_keeps_gradients():
    theirs, ours = build_pair("BeitForImageClassification", "triton", **POSITIONS["both"])
    inputs = random_inputs("BeitForImageClassification", ours)
    ours.train()
    ours.gradient_checkpointing_enable()
    assert ours.is_gradient_checkpointing
    theirs(**inputs).loss.backward()
    ours(**inputs).loss.backward()
    assert_same_gradients(ours, theirs)
    ours.gradient_checkpointing_disable()
    assert not ours.is_gradient_checkpointing


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("position", POSITIONS)
def test_parameter_names_and_count_equal_hub(name, position):
    """`build_pair` loads strictly and so compares the names; the test compares the counts."""
    theirs, ours = build_pair(name, **POSITIONS[position])
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())


def test_parameter_counts_equal_published_models():
    def count(name, **options):
        with torch.device("meta"):
            model = getattr(beit_fast, name)(beit_fast.BeitConfig(**options))
        return len(model.state_dict()), model.num_parameters()

    assert count("BeitModel", use_relative_position_bias=True) == (221, 85_761_984)
    assert count("BeitForImageClassification", use_relative_position_bias=True) == (223, 85_763_522)
    pretraining = {"use_shared_relative_position_bias": True, "use_mask_token": True}
    assert count("BeitForMaskedImageModeling", **pretraining) == (213, 91_965_776)
    assert count("BeitBackbone", use_relative_position_bias=True)[0] == 219
    segmentation = {
        "image_size": 640,
        "use_relative_position_bias": True,
        "out_indices": [3, 5, 7, 11],
        "num_labels": 150,
    }
    assert count("BeitForSemanticSegmentation", **segmentation) == (312, 163_407_980)


def test_init_weights_has_transformers_statistics():
    """Each parameter has the mean and standard deviation of Transformers' initialization."""
    options = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 256, "image_size": 64, "patch_size": 8,
               "num_hidden_layers": 4, "use_mask_token": True, "use_absolute_position_embeddings": True,
               "use_relative_position_bias": True, "use_shared_relative_position_bias": True,
               "out_indices": [1, 2, 3, 4], "initializer_range": 0.05, "layer_scale_init_value": 0.3}  # fmt: skip
    for name in ("BeitForSemanticSegmentation", "BeitForMaskedImageModeling"):
        theirs = getattr(transformers, name)(transformers.BeitConfig(**options))
        ours = getattr(beit_fast, name)(beit_fast.BeitConfig(**options)).state_dict()
        state = {key: value for key, value in hub_state(theirs).items() if value.is_floating_point()}
        assert state.keys() == {key for key, value in ours.items() if value.is_floating_point()}
        for key, wanted in state.items():
            mine = ours[key]
            spread = wanted.std(correction=0).item()
            noise = 5 * spread / mine.numel() ** 0.5
            assert abs(mine.mean().item() - wanted.mean().item()) <= 2 * noise + 1e-7, key
            assert abs(mine.std(correction=0).item() - spread) <= noise + 1e-7, key
