"""`optimize_for_inference` of models with quantized or replaced layers: one error with every path and both types."""

import pytest
import torch
from torch import nn

from beit_fast import optimize_for_inference

from ..support.models import build, images
from ..support.quantized import dynamically_quantized, with_int8_weights

LINEARS = [
    f"encoder.layer.{index}.{path}"
    for index in range(3)
    for path in (
        "attention.attention.query",
        "attention.attention.key",
        "attention.attention.value",
        "attention.output.dense",
        "intermediate.dense",
        "output.dense",
    )
]


def error_of(model, *args):
    with pytest.raises(ValueError, match="cannot be optimized") as raised:
        optimize_for_inference(model, *args)
    return str(raised.value)


@pytest.mark.parametrize(("name", "prefix"), [("BeitForImageClassification", "beit."), ("BeitModel", "")])
def test_optimize_quantized_layers_names_paths_and_both_types(name, prefix):
    message = error_of(dynamically_quantized(build(name)))
    assert all(prefix + path in message for path in LINEARS)
    assert "torch.ao.nn.quantized.dynamic.modules.linear.Linear, not a torch.nn.modules.linear.Linear" in message
    assert "before it is quantized" in message
    assert message.count(", not a ") == 1, "paths with the same types share one message"
    assert ("classifier is a torch.ao.nn.quantized" in message) == bool(prefix)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize(
    ("name", "path"),
    [("BeitForImageClassification", "classifier"), ("BeitForMaskedImageModeling", "lm_head")],
)
def test_optimize_quantized_head_names_its_path_and_type(name, path, dtype):
    """Regression: the head ran in its own dtype, and the first call failed."""
    model = build(name)
    model.set_submodule(path, dynamically_quantized(nn.Sequential(model.get_submodule(path)))[0])
    message = error_of(model, dtype)
    assert f"{path} is a torch.ao.nn.quantized.dynamic.modules.linear.Linear, whose weights are packed" in message
    assert "encoder" not in message


def test_optimize_quantized_convolution_names_its_path():
    model = build("BeitModel")
    layer = torch.ao.nn.quantized.Conv2d(3, 32, 8, 8)
    model.embeddings.patch_embeddings.projection = layer
    assert "embeddings.patch_embeddings.projection is a torch.ao.nn.quantized.modules.conv.Conv2d" in error_of(model)


class Counted(nn.Linear):
    """A layer whose `state_dict` also has plain data."""

    def get_extra_state(self):
        return {"steps": 3}

    def set_extra_state(self, state):
        assert state == {"steps": 3}


def test_optimize_head_with_extra_state_equals_model():
    model, pixels = build(), images()
    model.classifier.__class__ = Counted
    torch.testing.assert_close(optimize_for_inference(model)(pixels).logits, model(pixels).logits)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_optimize_weights_of_a_tensor_subclass_names_paths_and_both_types(dtype):
    model, pixels = with_int8_weights(build()), images()
    before = model(pixels).logits
    message = error_of(model, dtype)
    assert all(f"beit.{path}.weight" in message for path in LINEARS)
    assert "classifier.weight" in message
    assert "tests.support.quantized.Int8Weight, not a torch.nn.parameter.Parameter" in message
    assert torch.equal(model(pixels).logits, before)


def test_optimize_adapter_of_peft_names_its_module():
    peft = pytest.importorskip("peft", reason="needs PEFT")
    adapted = peft.get_peft_model(build(), peft.LoraConfig(target_modules=["query"]))
    message = error_of(adapted.base_model.model)
    assert "query are each a peft.tuners.lora.layer.Linear, not a torch.nn.modules.linear.Linear" in message
    assert optimize_for_inference(adapted.merge_and_unload())(images()).logits.shape == (2, 5)


def test_optimize_dtype_of_weights_without_arithmetic_raises():
    message = error_of(build().to(torch.float8_e4m3fn))
    assert "torch.float8_e4m3fn is not supported (expected torch.float16" in message
    assert "classifier.weight" in message or "more" in message


class Halved(nn.Module):
    def forward(self, x, *unused):
        return x / 2


@pytest.mark.parametrize(
    "path",
    [
        "encoder.relative_position_bias",
        "encoder.layer.1.drop_path",
        "encoder.layer.1.output.dropout",
        "encoder.layer.1.attention.output.dropout",
        "encoder.layer.1.attention.attention.relative_position_bias",
    ],
)
def test_optimize_replaced_module_that_folding_skips_raises(path):
    model = build("BeitModel", "both")
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, Halved())
    assert f"{path} is a tests.inference.test_foreign_layers.Halved, not a " in error_of(model)


def test_optimize_removed_dropout_equals_model():
    model, pixels = build(drop_path_rate=0.5), images()
    for layer in model.beit.encoder.layer:
        layer.output.dropout = layer.attention.output.dropout = layer.drop_path = nn.Identity()
    torch.testing.assert_close(optimize_for_inference(model)(pixels).logits, model(pixels).logits)
