"""`BeitConfig`: fields, labels, stages and validation, compared with Transformers."""

import copy
import inspect
import pickle

import numpy
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from beit_fast.configuration import BeitConfig
from beit_fast.configuration.fields import ACTIVATION_NAMES, RULES
from beit_fast.layers.activations import ACTIVATIONS

NOT_PARAMETER_FREE = {"prelu", "xielu"}


def test_fields_and_defaults_match_transformers():
    ours, theirs = BeitConfig().to_dict(), transformers.BeitConfig().to_dict()
    assert theirs.pop("transformers_version") == transformers.__version__
    assert ours.pop("transformers_version") is None
    assert ours == theirs


def test_every_annotated_field_has_a_rule():
    annotated = {name for name in inspect.get_annotations(BeitConfig) if name != "model_type"}
    assert annotated == set(RULES)


def test_construction_takes_keywords_only():
    with pytest.raises(TypeError, match="positional"):
        BeitConfig(8192)


@pytest.mark.parametrize(
    ("given_values", "stored"),
    [
        ({"layer_scale_init_value": 0}, 0.0),
        ({"drop_path_rate": 0}, 0.0),
        ({"layer_norm_eps": numpy.float64(1e-6)}, 1e-6),
        ({"hidden_size": numpy.int64(96)}, 96),
        ({"image_size": [32, 48]}, (32, 48)),
        ({"patch_size": [8, 8]}, 8),
        ({"pool_scales": [1, 2]}, (1, 2)),
        ({"dtype": "float16"}, torch.float16),
        ({"dtype": "torch.bfloat16"}, torch.bfloat16),
        ({"architectures": ("BeitModel",)}, ["BeitModel"]),
    ],
    ids=str,
)
def test_construction_converts_values_to_one_type(given_values, stored):
    name = next(iter(given_values))
    value = getattr(BeitConfig(**given_values), name)
    assert value == stored
    assert type(value) is type(stored)
    config = BeitConfig()
    setattr(config, name, given_values[name])
    assert type(getattr(config, name)) is type(stored)


INVALID = [
    ("hidden_size", 0, ValueError, "a positive int"),
    ("hidden_size", 768.0, TypeError, r"of type float \(expected a positive int\)"),
    ("num_hidden_layers", "12", TypeError, "a positive int"),
    ("num_hidden_layers", True, TypeError, "a positive int"),
    (
        "num_attention_heads",
        7,
        ValueError,
        r"hidden_size=768 is not supported \(expected a multiple of num_attention_heads=7",
    ),
    ("num_attention_heads", None, TypeError, "of type NoneType"),
    ("head_dim", 0, ValueError, "None or a positive int"),
    ("auxiliary_num_convs", -1, ValueError, "at least 0"),
    ("hidden_dropout_prob", 1.0, ValueError, r"a number in \[0, 1\)"),
    ("attention_probs_dropout_prob", -0.1, ValueError, r"a number in \[0, 1\)"),
    ("drop_path_rate", 1, ValueError, r"a number in \[0, 1\)"),
    ("drop_path_rate", float("nan"), ValueError, r"a number in \[0, 1\)"),
    ("layer_norm_eps", float("inf"), ValueError, "finite"),
    ("initializer_range", "0.02", TypeError, "of type str"),
    ("layer_scale_init_value", None, TypeError, "of type NoneType"),
    ("hidden_act", "gelo", ValueError, "expected one of gelu, "),
    ("hidden_act", torch.nn.GELU, TypeError, "expected one of gelu, "),
    ("image_size", (224, 8), ValueError, "sides of at least patch_size=16"),
    ("image_size", (224, 224, 3), ValueError, r"\(height, width\)"),
    ("image_size", "224", TypeError, r"\(height, width\)"),
    ("patch_size", (16, 8), ValueError, "a pair of equal positive ints"),
    ("pool_scales", [], ValueError, "one or more positive ints"),
    ("pool_scales", 6, TypeError, "one or more positive ints"),
    ("use_mean_pooling", 1, TypeError, "True or False"),
    ("output_attentions", "yes", TypeError, "True, False or None"),
    ("problem_type", "ranking", ValueError, "expected 'regression', .* or None"),
    ("dtype", "float17", ValueError, "floating-point torch.dtype"),
    ("dtype", torch.int8, ValueError, "floating-point torch.dtype"),
    ("architectures", "BeitModel", TypeError, "list of strings"),
    ("attn_implementation", "flash_attention_2", ValueError, "expected 'eager', 'sdpa', 'triton' or None"),
    ("patch_embed_implementation", "unfold", ValueError, "expected 'conv', 'fused' or None"),
    ("pixel_std", [0.5, 0.5, 0.0], ValueError, "None or a positive, finite number for each channel"),
    ("pixel_std", [0.5, 0.5, 0.5], ValueError, r"pixel_mean=None with .* \(expected num_channels=3 numbers each"),
    ("pixel_resize", "center", TypeError, "None or a dict of entries of timm's pretrained_cfg"),
    ("visual_tokenizer", " ", ValueError, "None, or the path or the hub repository"),
    ("visual_tokenizer", 3, TypeError, "None, or the path or the hub repository"),
    ("pixel_mean", "imagenet", TypeError, "None or a finite number for each channel"),
    ("num_labels", -1, ValueError, "at least 0"),
    ("num_labels", "2", TypeError, "at least 0"),
    ("id2label", ["cat", "dog"], TypeError, "a dict of int to string"),
    ("id2label", {"a": "cat"}, TypeError, "a dict of int to string"),
    ("label2id", {"cat": 0, "dog": 0}, ValueError, "maps several labels to one index"),
    ("out_indices", [3, 1], ValueError, "in the order of the stages"),
    ("out_indices", [13], ValueError, "indices from -13 to 12"),
    ("out_indices", [-14], ValueError, "indices from -13 to 12"),
    ("out_indices", [12, -1], ValueError, "each once"),
    ("out_indices", 3, TypeError, "not a list of ints"),
    ("out_features", ["stage13"], ValueError, "some of stem, stage1"),
    ("out_features", "stage1", TypeError, "not a list of strings"),
    ("add_fpn", True, ValueError, r"out_indices=\[12\] \(expected four stages"),
    ("model_type", "vit", ValueError, "expected 'beit'"),
    ("validate", 1, ValueError, "taken"),
    ("_out_indices", [1], ValueError, "taken"),
]


@pytest.mark.parametrize(("name", "value", "error", "expected"), INVALID, ids=lambda value: repr(value)[:24])
def test_construction_with_an_invalid_value_raises_name_and_expectation(name, value, error, expected):
    with pytest.raises(error, match=expected) as raised:
        BeitConfig(**{name: value})
    assert f"{name}=" in str(raised.value)
    assert str(raised.value).count("\n- ") == 1


def test_construction_lists_all_errors_in_one():
    with pytest.raises(ValueError, match="5 errors") as raised:
        BeitConfig(hidden_size=770, patch_size=(16, 8), drop_path_rate=2, out_indices=[5, 4], hidden_act=3)
    for name in (
        "hidden_size=770",
        "patch_size=(16, 8)",
        "drop_path_rate=2",
        "out_indices=[5, 4]",
        "hidden_act=3",
    ):
        assert name in str(raised.value)


def test_construction_with_wrong_types_only_raises_a_type_error():
    with pytest.raises(TypeError, match="2 errors"):
        BeitConfig(hidden_size="768", use_mask_token=None)


def test_validate_after_edits_lists_every_error():
    config = BeitConfig(out_indices=[3, 5, 7, 11], add_fpn=True)
    config.num_hidden_layers = 6
    config.hidden_size = 100
    config.id2label[5] = "five"
    with pytest.raises(ValueError, match="3 errors") as raised:
        config.validate()
    for text in ("out_indices=[3, 5, 7, 11] is not supported", "hidden_size=100", "label2id="):
        assert text in str(raised.value)
    repaired = BeitConfig()
    repaired.num_hidden_layers = 6
    repaired.validate()
    assert repaired.out_features == ["stage6"]


def test_head_dim_allows_any_number_of_heads():
    config = BeitConfig(hidden_size=100, num_attention_heads=3, head_dim=16)
    assert config.attention_head_dim == 16
    assert BeitConfig(hidden_size=96, num_attention_heads=3).attention_head_dim == 32


def test_single_label_classification_with_one_label_raises_as_in_transformers():
    values = {"num_labels": 1, "problem_type": "single_label_classification"}
    with pytest.raises(ValueError, match="num_labels=1"):
        BeitConfig(**values)
    with pytest.raises(ValueError, match="num_labels"):
        transformers.BeitConfig(**values)


LABELS = [
    ({}, {0: "LABEL_0", 1: "LABEL_1"}),
    ({"num_labels": 3}, {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}),
    ({"num_labels": 0}, {}),
    ({"id2label": {"1": "dog", "0": "cat"}}, {0: "cat", 1: "dog"}),
    ({"label2id": {"dog": "1", "cat": 0, "eel": 2}}, {0: "cat", 1: "dog", 2: "eel"}),
    ({"num_labels": 1, "id2label": {0: "cat"}, "label2id": {"cat": 0}}, {0: "cat"}),
]


@pytest.mark.parametrize(("fields", "names"), LABELS, ids=lambda value: repr(value)[:40])
def test_any_label_field_determines_the_others(fields, names):
    config = BeitConfig(**fields)
    assert config.id2label == names
    assert config.label2id == {name: index for index, name in names.items()}
    assert config.num_labels == len(names)


def test_id2label_accepts_repeated_names():
    names = {0: "crane", 1: "maillot", 2: "crane"}
    assert BeitConfig(id2label=names).label2id == {"crane": 2, "maillot": 1}
    config = BeitConfig(id2label=names, label2id={"crane": 0, "maillot": 1})
    assert config.label2id["crane"] == 0
    config.label2id = {"crane": 2, "maillot": 1}
    assert config.num_labels == 3


def test_setting_a_label_field_updates_the_others():
    config = BeitConfig()
    config.id2label = {0: "cat", 1: "dog", 2: "eel"}
    assert (config.num_labels, config.label2id) == (3, {"cat": 0, "dog": 1, "eel": 2})
    config.label2id = {"ant": 0}
    assert config.id2label == {0: "ant"}
    config.num_labels = 1
    assert config.id2label == {0: "ant"}
    config.num_labels = 2
    assert config.label2id == {"LABEL_0": 0, "LABEL_1": 1}
    with pytest.raises(TypeError, match="num_labels='x'"):
        config.num_labels = "x"


@pytest.mark.parametrize(
    "fields",
    [
        {"num_labels": 3, "id2label": {0: "cat"}},
        {"num_labels": 3, "label2id": {"cat": 0}},
        {"id2label": {0: "cat"}, "label2id": {"dog": 0}},
        {"dtype": "float16", "torch_dtype": "bfloat16"},
        {"out_indices": [1], "segmentation_indices": [2]},
        {"out_indices": [1], "out_features": ["stage2"]},
    ],
    ids=str,
)
def test_construction_with_contradicting_fields_raises(fields):
    with pytest.raises(ValueError, match=r"contradicts|different stages"):
        BeitConfig(**fields)


def test_construction_accepts_older_names():
    config = BeitConfig(torch_dtype="float16", segmentation_indices=(1, 3), _attn_implementation="eager")
    assert (config.dtype, config.torch_dtype) == (torch.float16, torch.float16)
    assert config.out_features == ["stage1", "stage3"]
    assert (config.attn_implementation, config._attn_implementation) == ("eager", "eager")
    config._attn_implementation, config.torch_dtype = "triton", "float32"
    assert (config.attn_implementation, config.dtype) == ("triton", torch.float32)
    assert BeitConfig(return_dict=False).use_return_dict is False
    assert BeitConfig(dtype="float16", torch_dtype=torch.float16).dtype is torch.float16


def choose_stages(config_class, **fields):
    try:
        config = config_class(num_hidden_layers=3, **fields)
    except (ValueError, TypeError, IndexError):
        return "invalid"
    return config.out_features, config.out_indices


indices = st.lists(st.integers(-4, 3), min_size=1, max_size=4)
features = st.lists(st.sampled_from(["stem", "stage1", "stage2", "stage3", "stage4"]), min_size=1, max_size=4)


@settings(max_examples=200, deadline=None)
@given(out_indices=st.none() | indices, out_features=st.none() | features)
def test_stage_selection_matches_transformers(out_indices, out_features):
    fields = {"out_indices": out_indices, "out_features": out_features}
    assert choose_stages(BeitConfig, **fields) == choose_stages(transformers.BeitConfig, **fields)


def test_setting_stages_updates_names_and_indices():
    config = BeitConfig(num_hidden_layers=4)
    config.out_features = ["stem", "stage2"]
    assert config.out_indices == [0, 2]
    config.out_indices = (1, -1)
    assert config.out_features == ["stage1", "stage4"]
    with pytest.raises(ValueError, match="in this order"):
        config.out_features = ["stage2", "stage1"]
    assert config.out_features == ["stage1", "stage4"]
    config.out_indices = None
    assert config.out_features == ["stage4"]
    with pytest.raises(AttributeError):
        config.stage_names = ["stem"]


def test_window_and_num_patches_of_a_rectangle():
    config = BeitConfig(image_size=(70, 96), patch_size=16, use_shared_relative_position_bias=True)
    assert config.image_height_width == (70, 96)
    assert (config.window, config.num_patches) == ((4, 6), 24)
    assert config.has_relative_position_bias
    assert BeitConfig().window == (14, 14)
    assert not BeitConfig().has_relative_position_bias


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda config: pickle.loads(pickle.dumps(config))])
def test_copies_are_equal_and_independent(duplicate):
    config = BeitConfig(num_labels=3, out_indices=[1, 2], attn_implementation="eager", note="kept")
    other = duplicate(config)
    assert other == config
    assert (other.attn_implementation, other.note) == ("eager", "kept")
    other.note, other.num_labels, other.out_indices = "changed", 4, [3]
    assert (config.note, config.num_labels, config.out_indices) == ("kept", 3, [1, 2])
    assert other != config


def test_equality_ignores_implementations():
    assert BeitConfig(attn_implementation="eager") == BeitConfig()
    assert BeitConfig(out_indices=[12]) == BeitConfig()
    assert BeitConfig(note=1) != BeitConfig()
    assert BeitConfig() != BeitConfig().to_dict()
    assert type("Other", (BeitConfig,), {})() != BeitConfig()


def test_repr_omits_defaults():
    assert repr(BeitConfig()) == "BeitConfig()"
    config = BeitConfig(hidden_size=96, num_attention_heads=3, note="kept", attn_implementation="sdpa")
    text = "BeitConfig(hidden_size=96, num_attention_heads=3, note='kept', attn_implementation='sdpa')"
    assert repr(config) == text
    assert len(repr(BeitConfig(num_labels=1000, num_hidden_layers=6))) < 200


def test_update_changes_all_or_nothing():
    config = BeitConfig(attn_implementation="eager", note="kept")
    config.update({"num_labels": 3, "num_hidden_layers": 6, "extra": [1]})
    assert (config.num_labels, config.out_features, config.extra) == (3, ["stage6"], [1])
    assert (config.attn_implementation, config.note) == ("eager", "kept")
    before = config.to_dict()
    with pytest.raises(ValueError, match="hidden_size=100"):
        config.update({"num_labels": 5, "hidden_size": 100})
    assert config.to_dict() == before


def test_a_compiled_function_reads_the_configuration():
    config = BeitConfig(note=2.0)

    def scaled(values):
        height, _ = config.window
        return values * config.note * height if config.use_return_dict else values

    compiled = torch.compile(scaled, fullgraph=True, backend="eager")
    assert torch.equal(compiled(torch.ones(2)), torch.full((2,), 28.0))


def test_activations_have_the_names_of_the_configuration():
    assert tuple(ACTIVATIONS) == ACTIVATION_NAMES


def test_activations_include_all_of_transformers():
    assert set(ACTIVATIONS) == set(transformers.activations.ACT2CLS) - NOT_PARAMETER_FREE


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_matches_transformers(name):
    values = torch.linspace(-12, 12, 1001, dtype=torch.float64, requires_grad=True)
    expected = transformers.activations.ACT2FN[name](values)
    activation = ACTIVATIONS[name]()
    assert not list(activation.parameters())
    result = activation(values)
    # gelu_fast has sqrt(2 / pi) to ten digits
    tolerance = 1e-9 if name == "gelu_fast" else 1e-14
    torch.testing.assert_close(result, expected, rtol=tolerance, atol=tolerance)
    (expected_slope,) = torch.autograd.grad(expected.sum(), values)
    (slope,) = torch.autograd.grad(result.sum(), values)
    torch.testing.assert_close(slope, expected_slope, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("first", [-1, 1])
@pytest.mark.parametrize("field", ["id2label", "label2id"])
def test_labels_that_do_not_start_at_zero_raise(field, first):
    pairs = {first: "cat", first + 1: "dog"}
    labels = pairs if field == "id2label" else {name: index for index, name in pairs.items()}
    with pytest.raises(ValueError, match=rf"{field}=.* starts at {first} \(expected class indices from 0\)"):
        BeitConfig(**{field: labels})


def test_gaps_between_labels_are_kept():
    """The hub's BEiT for ImageNet-22k leaves two classes out: 21841 names with indices up to 21842."""
    names = {index: f"class {index}" for index in range(21843) if index not in (9205, 15027)}
    config = BeitConfig.from_dict({"id2label": {str(index): name for index, name in names.items()}})
    assert config.num_labels == 21841
    assert config.id2label == names
