"""`register()`: models that Transformers' Auto classes build, and `unregister()`."""

import copy
import pickle

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers.models.beit import modeling_beit

import beit_fast
from beit_fast.integrations.transformers import register, unregister, with_transformers_outputs

from ..support.attention_spy import AttentionSpy
from ..support.oracle import relative_error
from ..support.transformers_reference import (
    POSITIONS,
    TINY,
    main_output,
    options_for,
    random_inputs,
    randomize,
)

AUTO = {
    "AutoModel": "BeitModel",
    "AutoModelForMaskedImageModeling": "BeitForMaskedImageModeling",
    "AutoModelForImageClassification": "BeitForImageClassification",
    "AutoModelForSemanticSegmentation": "BeitForSemanticSegmentation",
    "AutoBackbone": "BeitBackbone",
}
NEEDS_5 = pytest.mark.skipif(
    transformers.__version__.startswith("4."),
    reason="BEiT of 4.x does not support a mask, or another attention once built",
)
BIASED = [name for name in POSITIONS if name in ("per layer", "shared", "both")]


@pytest.fixture
def registered():
    register()
    yield
    unregister()


def config_for(name, position="per layer", **options):
    return transformers.BeitConfig(**(TINY | options_for(name) | POSITIONS[position] | options))


def reference(name, position="per layer", implementation="sdpa", **options):
    """Build a random fp64 model of Transformers.

    Its eager attention computes the softmax in fp32.
    """
    config = config_for(name, position, **options)
    model = getattr(transformers, name)._from_config(config, attn_implementation=implementation)
    model = model.double().eval()
    randomize(model)
    return model


def triton_copy(theirs, name):
    """Build the same model of Transformers with `"triton"`."""
    config = transformers.BeitConfig.from_dict(theirs.config.to_dict())
    model = getattr(transformers, name)._from_config(config, attn_implementation="triton").double()
    model.load_state_dict(theirs.state_dict())
    return model.train(theirs.training)


def rectangle_for(name):
    """Return a non-native image size.

    Segmentation in 4.57 supports only the native size.
    """
    native_only = name == "BeitForSemanticSegmentation" and transformers.__version__.startswith("4.")
    return (32, 32) if native_only else (32, 40)


def count_tokens(inputs, patch=8):
    height, width = inputs["pixel_values"].shape[-2:]
    return (height // patch) * (width // patch) + 1


def assert_same_gradients(ours, theirs):
    theirs = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        expected = theirs[name].grad
        assert (parameter.grad is None) == (expected is None), name
        if expected is not None:
            assert relative_error(parameter.grad, expected) < 1e-9, name


@pytest.mark.parametrize("auto", AUTO)
def test_auto_class_from_config_builds_beit_fast(auto, registered):
    name = AUTO[auto]
    model = getattr(transformers, auto).from_config(config_for(name), attn_implementation="triton", dtype=torch.float64)
    assert isinstance(model, getattr(beit_fast, name))
    assert type(model).__name__ == name
    assert model.attn_implementation == "triton"
    assert model.dtype == torch.float64
    assert model.config == beit_fast.BeitConfig.from_dict(config_for(name).to_dict())


@pytest.mark.parametrize("position", BIASED)
@pytest.mark.parametrize("auto", [auto for auto in AUTO if auto != "AutoBackbone"])
def test_auto_class_from_pretrained_equals_transformers(auto, position, registered, tmp_path):
    """Compare with Transformers' own class, in its output class, through the fused operator."""
    name = AUTO[auto]
    theirs = reference(name, position)
    theirs.save_pretrained(tmp_path)
    ours, info = getattr(transformers, auto).from_pretrained(
        tmp_path, attn_implementation="triton", output_loading_info=True, trust_remote_code=False, use_safetensors=True
    )
    assert not any(info.values())
    assert isinstance(ours, getattr(beit_fast, name))
    assert ours.dtype == torch.float64
    assert not ours.training
    inputs = random_inputs(name, ours, rectangle_for(name))
    inputs.pop("labels", None)
    expected = theirs(**inputs, output_hidden_states=True)
    with AttentionSpy(count_tokens(inputs)) as spy:
        actual = ours(**inputs, output_hidden_states=True)
    assert (spy.calls, spy.tables) == (ours.config.num_hidden_layers,) * 2
    assert not spy.square
    assert type(actual) is type(expected)
    for mine, wanted in zip(main_output(actual), main_output(expected), strict=True):
        assert relative_error(mine, wanted) < 1e-9
    assert relative_error(actual.hidden_states[-1], expected.hidden_states[-1]) < 1e-9
    assert type(ours(**inputs, return_dict=False)) is tuple


def test_auto_class_from_pretrained_passes_options(registered, tmp_path):
    reference("BeitForImageClassification").float().save_pretrained(tmp_path)
    load = transformers.AutoModelForImageClassification.from_pretrained
    model = load(tmp_path, dtype=torch.bfloat16, num_labels=7, ignore_mismatched_sizes=True)
    assert (model.dtype, model.config.num_labels, model.attn_implementation) == (torch.bfloat16, 7, None)
    assert load(tmp_path, attn_implementation="eager").attn_implementation == "eager"
    with pytest.raises(TypeError, match=r"got unexpected arguments tp_plan .*use_safetensors, variant"):
        load(tmp_path, tp_plan="auto")
    with pytest.raises(FileNotFoundError, match=r"expected model\.fp16\.safetensors"):
        load(tmp_path, variant="fp16")
    with pytest.raises(ValueError, match="attn_implementation='flash_attention_2'"):
        load(tmp_path, attn_implementation="flash_attention_2")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"holds a PEFT adapter.*PeftModel.from_pretrained"):
        type(model).from_pretrained(tmp_path, adapter_kwargs={"_adapter_model_path": tmp_path})


def test_auto_class_from_pretrained_takes_ordinary_arguments(registered, tmp_path):
    theirs = reference("BeitForImageClassification").float()
    theirs.save_pretrained(tmp_path / "small")
    load = transformers.AutoModelForImageClassification.from_pretrained
    model = load(
        tmp_path,
        subfolder="small",
        use_safetensors=True,
        low_cpu_mem_usage=True,
        force_download=True,
        weights_only=True,
        from_tf=False,
        from_flax=False,
    )
    assert isinstance(model, beit_fast.BeitForImageClassification)
    assert torch.equal(model.classifier.weight, theirs.classifier.weight)
    with pytest.raises(ValueError, match=r"from_tf=True and from_flax=True is not supported \(expected .*safetensors"):
        load(tmp_path, subfolder="small", from_tf=True, from_flax=True)
    assert load(tmp_path, subfolder="small", attn_implementation="sdpa").config._attn_implementation == "sdpa"


def test_auto_class_save_pretrained_is_bitwise_equal(registered, tmp_path):
    reference("BeitForImageClassification").save_pretrained(tmp_path / "theirs")
    model = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "theirs")
    model.save_pretrained(tmp_path / "ours")
    written, stored = (load_file(tmp_path / folder / "model.safetensors") for folder in ("ours", "theirs"))
    assert written.keys() == stored.keys()
    assert all(torch.equal(written[key], x) for key, x in stored.items())
    again = transformers.BeitForImageClassification.from_pretrained(tmp_path / "ours")
    assert type(again).__module__.startswith("transformers.")
    assert copy.deepcopy(model).state_dict().keys() == pickle.loads(pickle.dumps(model)).state_dict().keys()


def test_optimize_for_inference_auto_class_model_equals_model(registered):
    model = transformers.AutoModelForImageClassification.from_config(config_for("BeitForImageClassification")).eval()
    pixels = torch.randn(1, 3, 32, 32)
    output = beit_fast.optimize_for_inference(model)(pixels)
    assert type(output) is transformers.modeling_outputs.ImageClassifierOutput
    torch.testing.assert_close(output.logits, model(pixels).logits)


def test_auto_config_beit_fast_model_type_builds_models(registered):
    config = transformers.AutoConfig.for_model("beit_fast", **(TINY | POSITIONS["per layer"]))
    assert isinstance(config, transformers.BeitConfig)
    assert isinstance(transformers.AutoModel.from_config(config), beit_fast.BeitModel)
    assert isinstance(transformers.AutoBackbone.from_config(config), beit_fast.BeitBackbone)


def test_with_transformers_outputs_returns_transformers_class():
    model = beit_fast.BeitForSemanticSegmentation(
        beit_fast.BeitConfig(**(TINY | options_for("BeitForSemanticSegmentation")))
    ).eval()
    pixels = torch.randn(1, 3, 32, 32)
    expected = model(pixels).logits
    assert with_transformers_outputs(with_transformers_outputs(model)) is model
    assert isinstance(model, beit_fast.BeitForSemanticSegmentation)
    output = model(pixels)
    assert type(output) is transformers.modeling_outputs.SemanticSegmenterOutput
    assert torch.equal(output.logits, expected)
    with pytest.raises(TypeError, match=r"Linear is not supported \(expected BeitModel, .* of beit_fast\)"):
        with_transformers_outputs(torch.nn.Linear(1, 1))


def test_attn_implementation_triton_without_register_raises():
    with pytest.raises(ValueError, match='="triton"` is not supported'):
        transformers.BeitModel._from_config(config_for("BeitModel"), attn_implementation="triton")


def registered_entries():
    """Return a copy of all state that `register` changes."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    bias, base = modeling_beit.BeitRelativePositionBias, modeling_beit.BeitPreTrainedModel
    return {
        "auto": [dict(getattr(transformers, auto)._model_mapping._extra_content) for auto in AUTO],
        "configurations": dict(CONFIG_MAPPING._extra_content),
        "attention": dict(transformers.AttentionInterface._global_mapping),
        "masks": dict(transformers.AttentionMaskInterface._global_mapping),
        "bias": dict(vars(bias)),
        "base": dict(vars(base)),
        "model": dict(vars(transformers.PreTrainedModel)),
        "trainer": dict(vars(transformers.Trainer)),
    }


def test_unregister_restores_every_entry():
    class Own:
        """A class that was registered before."""

    mapping = transformers.AutoModel._model_mapping._extra_content
    mapping[transformers.BeitConfig] = Own
    try:
        before = registered_entries()
        register(backbones=False, attention=False)
        assert transformers.AutoBackbone._model_mapping[transformers.BeitConfig] is transformers.BeitBackbone
        assert "triton" not in transformers.AttentionInterface._global_mapping
        register()
        after = registered_entries()
        register()
        assert registered_entries() == after != before
        unregister()
        assert registered_entries() == before
        unregister()
        assert registered_entries() == before
    finally:
        del mapping[transformers.BeitConfig]


def test_register_failure_is_undone(monkeypatch):
    before = registered_entries()
    monkeypatch.delattr(transformers.PreTrainedModel, "get_correct_attn_implementation")
    with pytest.raises(AttributeError, match="get_correct_attn_implementation"):
        register(models=False, backbones=False)
    monkeypatch.undo()
    assert registered_entries() == before
