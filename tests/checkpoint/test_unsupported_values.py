"""`save_pretrained` of values that safetensors cannot store: one error that names the modules, and no file."""

import pytest
import torch

import beit_fast

from ..support.models import build
from ..support.quantized import dynamically_quantized, with_int8_weights


def with_extra_state(model):
    class Classifier(torch.nn.Linear):
        def get_extra_state(self):
            return {"steps": 3}

    model.classifier.__class__ = Classifier
    return model


def with_sparse_buffer(model):
    model.classifier.register_buffer("mask", torch.eye(3).to_sparse())
    return model


CASES = {
    "dynamically quantized": (
        dynamically_quantized,
        "query._packed_params (torch.ao.nn.quantized.modules.linear.LinearPackedParams) has values of type torch.dtype",
    ),
    "tensor subclass": (
        with_int8_weights,
        "beit.encoder.layer.0.attention.attention.query (torch.nn.modules.linear.Linear) has values of type "
        "tests.support.quantized.Int8Weight",
    ),
    "sparse": (
        with_sparse_buffer,
        "classifier (torch.nn.modules.linear.Linear) has values of type torch.Tensor (torch.sparse_coo, torch.float32)",
    ),
    "extra state": (with_extra_state, "Classifier) has values of type dict"),
}


@pytest.mark.parametrize("name", CASES)
def test_save_pretrained_of_an_unsupported_value_names_modules_and_writes_nothing(name, tmp_path):
    change, expected = CASES[name]
    with pytest.raises(ValueError, match="these cannot be written") as raised:
        change(build()).save_pretrained(tmp_path / "new")
    assert expected in str(raised.value)
    assert "torch.save" in str(raised.value)
    assert not list(tmp_path.iterdir())


def test_save_pretrained_of_a_quantized_model_keeps_the_old_checkpoint(tmp_path):
    model = build()
    model.save_pretrained(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="LinearPackedParams"):
        dynamically_quantized(model).save_pretrained(tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_save_pretrained_of_a_passed_state_dict_checks_its_values(tmp_path):
    model = build()
    with pytest.raises(ValueError, match=r"classifier \(torch.nn.modules.linear.Linear\) has values of type list"):
        model.save_pretrained(tmp_path / "new", state_dict=model.state_dict() | {"classifier.bias": [1.0]})
    assert not list(tmp_path.iterdir())


def test_save_pretrained_of_tied_weights_keeps_every_value(tmp_path):
    model = build("BeitModel")
    layers = model.encoder.layer
    layers[1] = layers[0]
    layers[2].output.dense.weight = layers[0].output.dense.weight
    model.save_pretrained(tmp_path)
    loaded = beit_fast.BeitModel.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in model.state_dict().items())
