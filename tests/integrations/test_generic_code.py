"""What generic code of Transformers asks of models, configurations and outputs of this package."""

import copy
import sys

import pytest
import torch
import transformers

import beit_fast
from beit_fast.integrations.transformers import register, unregister, with_transformers_outputs

from ..support.attention_spy import AttentionSpy
from ..support.oracle import relative_error
from ..support.transformers_models import IS_4
from ..support.transformers_reference import CLASSES, TINY, main_output, options_for, random_inputs, randomize
from .test_ecosystem import TOKENS, checkpoint, hf_processor, load, random_photo

VALUES = TINY | {"use_relative_position_bias": True}


@pytest.fixture(autouse=True)
def _unregistered():
    yield
    unregister()


def hf_model(name, **options):
    model = getattr(transformers, name)(transformers.BeitConfig(**(VALUES | options_for(name) | options)))
    randomize(model)
    return model.double().eval()


@pytest.mark.parametrize("name", [name for name in CLASSES if name != "BeitBackbone"])
def test_load_state_dict_of_transformers_model_equals_it(name):
    """Transformers since 5.8 has other names in memory than in its files."""
    theirs = hf_model(name)
    ours = getattr(beit_fast, name)(theirs.config).double().eval()
    state = theirs.state_dict()
    before = list(state)
    result = ours.load_state_dict(state)
    assert result.missing_keys == result.unexpected_keys == []
    assert list(state) == before
    inputs = random_inputs(name, theirs)
    for value, expected in zip(main_output(ours(**inputs)), main_output(theirs(**inputs)), strict=True):
        assert relative_error(value, expected) < 1e-5


def test_load_state_dict_inside_another_module_and_with_foreign_names():
    theirs = hf_model("BeitModel")
    ours = torch.nn.ModuleDict({"trunk": beit_fast.BeitModel(theirs.config).double()})
    ours.load_state_dict({f"trunk.{name}": x for name, x in theirs.state_dict().items()})
    table = ours["trunk"].encoder.layer[0].attention.attention.relative_position_bias.relative_position_bias_table
    parameter = next(x for name, x in theirs.state_dict().items() if name.endswith("relative_position_bias_table"))
    assert torch.equal(table, parameter)
    with pytest.raises(RuntimeError, match=r"(?s)Missing key.*encoder\.layer\.0.*Unexpected key.*other\.0\.weight"):
        ours["trunk"].load_state_dict({"other.0.weight": torch.zeros(1)})


def test_config_nested_configurations_and_text_config():
    config = beit_fast.BeitConfig(**VALUES)
    theirs = transformers.BeitConfig(**VALUES)
    assert config.sub_configs == theirs.sub_configs == {}
    assert config.get_text_config() is config
    assert config.get_text_config(decoder=True) is config
    assert config.base_model_tp_plan is theirs.base_model_tp_plan is None
    assert not {"sub_configs", "base_model_tp_plan"} & config.to_dict().keys()
    assert transformers.BeitModel(transformers.BeitConfig(**config.to_dict()))
    assert copy.deepcopy(config) == config


def test_config_iterates_over_its_fields():
    """As Transformers' tests do, to set some of them by name."""
    config = beit_fast.BeitConfig(**VALUES, own_field=3)
    assert list(config) == list(config.to_dict())
    assert {"hidden_size", "id2label", "out_indices", "own_field"} < set(config)
    changed = copy.deepcopy(config)
    for name in changed:
        if "_range" in name:
            setattr(changed, name, 0.5)
    assert changed == beit_fast.BeitConfig(**VALUES, own_field=3, initializer_range=0.5)


def test_backbone_type_is_that_of_transformers_if_it_is_imported(monkeypatch):
    theirs = transformers.BeitBackbone(transformers.BeitConfig(**VALUES))
    ours = beit_fast.BeitBackbone(beit_fast.BeitConfig(**VALUES))
    assert ours.backbone_type is beit_fast.BeitBackbone.backbone_type is theirs.backbone_type
    for name in ("transformers.backbone_utils", "transformers.utils.backbone_utils"):
        monkeypatch.setitem(sys.modules, name, None)
    assert ours.backbone_type == theirs.backbone_type.value == "transformers"


@pytest.mark.parametrize("name", CLASSES)
def test_class_flags_say_what_the_models_do(name):
    cls = getattr(beit_fast, name)
    model = cls(beit_fast.BeitConfig(**(VALUES | options_for(name))))
    for flag, implementation in {"_supports_sdpa": "sdpa", "_supports_flash_attn": "flash_attention_2"}.items():
        if getattr(cls, flag):
            model.set_attn_implementation(implementation)
        else:
            with pytest.raises(ValueError, match=implementation):
                model.set_attn_implementation(implementation)
    for flag in ("_supports_flex_attn", "_supports_attention_backend"):
        assert getattr(cls, flag) is False
    assert not model._keep_in_fp32_modules | model._keep_in_fp32_modules_strict
    assert cls._can_set_attn_implementation() is True
    assert cls._can_set_experts_implementation() is False
    assert cls._keys_to_ignore_on_load_missing is None


def dpt_around_ours():
    trunk = transformers.BeitConfig(
        **VALUES | {"num_hidden_layers": 4},
        out_features=[f"stage{i}" for i in range(1, 5)],
        reshape_hidden_states=False,
    )
    sizes = {"hidden_size": 32, "neck_hidden_sizes": [8, 8, 8, 8], "fusion_hidden_size": 8, "is_hybrid": False}
    register()
    model = transformers.DPTForDepthEstimation(transformers.DPTConfig(backbone_config=trunk, **sizes)).eval()
    assert isinstance(model.backbone, beit_fast.BeitBackbone)
    randomize(model)
    return model


@pytest.mark.skipif(IS_4, reason="4.x cannot change the attention of a built model")
@pytest.mark.parametrize("implementation", ["eager", "sdpa", "triton"])
@pytest.mark.parametrize("as_dict", [False, True])
def test_set_attn_implementation_reaches_our_backbone(implementation, as_dict):
    model = dpt_around_ours()
    pixels = torch.randn(1, 3, 32, 32)
    expected = model(pixels).predicted_depth
    model.set_attn_implementation({"backbone_config": implementation} if as_dict else implementation)
    assert model.backbone.attn_implementation == implementation
    assert model.backbone.config.attn_implementation == implementation
    assert relative_error(model(pixels).predicted_depth, expected) < 1e-5
    kernels = {layer.last_kernel for layer in model.backbone._attention_layers()}
    assert (implementation in ("eager", "sdpa")) == (kernels == {implementation})


@pytest.mark.skipif(IS_4, reason="4.x cannot change the attention of a built model")
def test_set_attn_implementation_unsupported_by_our_backbone_changes_nothing():
    model = dpt_around_ours()
    before = model.config._attn_implementation
    with pytest.raises(ValueError, match="flex_attention"):
        model.set_attn_implementation("flex_attention")
    assert model.backbone.attn_implementation is None
    assert model.config._attn_implementation == before
    model.set_attn_implementation({"": "eager"})
    assert model.backbone.attn_implementation is None


@pytest.mark.parametrize("kind", ["ours", "accelerated", "triton", "auto class"])
def test_image_feature_extraction_pipeline_equals_transformers(kind, tmp_path):
    """A pipeline turns an output of another class than its own into a dict, which has no item 0."""
    theirs = checkpoint("BeitModel", tmp_path)
    if kind == "auto class":
        register()
        model = transformers.AutoModel.from_pretrained(tmp_path, attn_implementation="triton")
    else:
        model = load(kind, "BeitModel", tmp_path)
    if kind == "ours":
        with_transformers_outputs(model)
    expected, actual = (
        transformers.pipeline("image-feature-extraction", model=x, image_processor=hf_processor(), device=-1)
        for x in (theirs, model)
    )
    with AttentionSpy(TOKENS) as spy:
        found = actual(random_photo(), return_tensors=True)
    assert spy.calls == 3
    assert relative_error(found, expected(random_photo(), return_tensors=True)) < 1e-5


@pytest.mark.parametrize(
    ("task", "name", "error"),
    [
        ("image-feature-extraction", "BeitModel", "^0$"),
        ("image-segmentation", "BeitForSemanticSegmentation", "not 'target_size'.*with_transformers_outputs"),
    ],
)
def test_pipelines_that_need_transformers_outputs_are_those_of_the_docs(task, name, error, tmp_path):
    """Transformers turns an output of another class into a plain dict; nothing here can see what it then asks for."""
    checkpoint(name, tmp_path)
    pipeline = transformers.pipeline(
        task, model=load("ours", name, tmp_path), image_processor=hf_processor(), device=-1
    )
    with pytest.raises(KeyError, match=error):
        pipeline(random_photo())


def test_lora_for_text_raises_and_names_the_argument():
    """As the docs say: PEFT's task types are those of text."""
    peft = pytest.importorskip("peft", reason="needs PEFT")
    model = beit_fast.BeitForImageClassification(beit_fast.BeitConfig(**VALUES))
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["query"], task_type="SEQ_CLS"))
    with pytest.raises(TypeError, match="input_ids"):
        adapted(pixel_values=torch.randn(1, 3, 32, 32))
