"""One choice of kernels for each forward of Transformers' own classes, accelerated or with `"triton"`."""

import copy
import functools

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

from beit_fast.integrations.transformers import accelerate, fused_layers, restore

from ..support.attention_spy import record_choices
from ..support.transformers_models import ALL, build, inputs_for, layer_count, sizes_for
from ..support.transformers_reference import POSITIONS
from . import test_registration

FP32, FP64 = ("cpu", torch.float32), ("cpu", torch.float64)
TRUNKS = ["BeitModel", "Data2VecVisionModel"]

registered = test_registration.registered


@pytest.fixture
def choices(monkeypatch):
    return record_choices(monkeypatch)


def accelerated(name, position="per layer", implementation=None, **options):
    model = build(name, position, **options)
    accelerate(model, implementation)
    return model


def train(model):
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()  # maps of one pixel have no variance
    return model


def layers_of(model):
    return model.layers if hasattr(model, "layers") else model.encoder.layer


def choices_of(model, choices, **inputs):
    choices.clear()
    model(**inputs)
    return list(choices)


CASES = dict.fromkeys([*((name, "both") for name in ALL), *((name, p) for name in TRUNKS for p in POSITIONS)])


@pytest.mark.parametrize(("name", "position"), CASES)
def test_forward_accelerated_model_chooses_once(choices, name, position):
    model = accelerated(name, position, "triton")
    for size in sizes_for(name):
        inputs = inputs_for(name, model, size)
        with torch.no_grad():
            assert choices_of(model.eval(), choices, **inputs) == [FP32]
        assert choices_of(train(model), choices, **inputs) == [FP32]
    inputs["pixel_values"] = inputs["pixel_values"].double()
    assert choices_of(model.double(), choices, **inputs) == [FP64]


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("name", TRUNKS)
def test_forward_registered_model_chooses_once(choices, name, position, registered):
    model = build(name, position, "triton")
    for size in sizes_for(name):
        inputs = inputs_for(name, model, size)
        with torch.no_grad():
            assert choices_of(model.eval(), choices, **inputs) == [FP32]
        assert choices_of(model.train(), choices, **inputs) == [FP32]


def test_unregister_restores_forward_of_trunks():
    forwards = [trunk.forward for trunk in fused_layers.TRUNKS]
    test_registration.register()
    assert all(trunk.forward is not forward for trunk, forward in zip(fused_layers.TRUNKS, forwards, strict=True))
    test_registration.unregister()
    assert [trunk.forward for trunk in fused_layers.TRUNKS] == forwards


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", TRUNKS)
def test_forward_checkpointed_chooses_once_and_backward_for_each_layer(choices, name, reentrant):
    """A recomputed layer runs in the backward pass, which has left the forward of the model."""
    model = accelerated(name, implementation="triton").train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    pixels = inputs_for(name, model)["pixel_values"].requires_grad_()
    choices.clear()
    loss = model(pixels).last_hidden_state.sum()
    assert choices == [FP32]
    loss.backward()
    assert len(choices) == 1 + layer_count(model)


def move(layer, device, dtype):
    """Run a layer on another device in another dtype, as device hooks do. A meta device returns zeros."""
    layer.to(device, dtype)

    def place(value):
        return value.to(device, dtype) if hasattr(value, "to") else value

    def bring_back(output):
        if not isinstance(output, torch.Tensor):
            return output
        return torch.zeros(output.shape) if device == "meta" else output.float()

    layer.register_forward_pre_hook(lambda _, args, kwargs: pytree.tree_map(place, (args, kwargs)), with_kwargs=True)
    layer.register_forward_hook(lambda module, args, output: pytree.tree_map(bring_back, output))


@pytest.mark.parametrize("name", TRUNKS)
def test_forward_layers_of_two_devices_and_dtypes_choose_for_each(choices, name):
    model = accelerated(name, num_hidden_layers=7)
    layers = layers_of(model)
    for index, (device, dtype) in {1: ("cpu", torch.float64), 2: ("meta", torch.float32)}.items():
        move(layers[index], device, dtype)
        move(layers[index + 3], device, dtype)
    assert choices_of(model, choices, **inputs_for(name, model)) == [FP32, FP64, ("meta", torch.float32)]


def without_gradient(forward, *args, **kwargs):
    with torch.no_grad():
        return forward(*args, **kwargs)


def in_bfloat16(forward, *args, **kwargs):
    with torch.autocast("cpu", torch.bfloat16):
        return forward(*args, **kwargs)


def in_transform(forward, *args, **kwargs):
    outputs = []

    def run(number):
        outputs.append(forward(*args, **kwargs))
        return number

    torch.func.vmap(run)(torch.zeros(1))
    return outputs[0]


@pytest.mark.parametrize(
    ("around", "training", "dtype"),
    [
        (in_transform, False, torch.float32),
        (in_bfloat16, True, torch.bfloat16),
    ],
)
def test_forward_layer_in_another_mode_chooses_again(choices, around, training, dtype):
    model = accelerated("BeitModel")
    for index in (0, 2):
        layer = layers_of(model)[index]
        layer.forward = functools.partial(around, layer.forward)
    with torch.set_grad_enabled(training):
        assert choices_of(model, choices, **inputs_for("BeitModel", model)) == [("cpu", dtype), FP32]


def test_forward_layer_without_gradients_shares_the_choice(choices):
    """The GEMM of linear layers is the same with and without gradients."""
    model = accelerated("BeitModel")
    layer = layers_of(model)[1]
    layer.forward = functools.partial(without_gradient, layer.forward)
    assert choices_of(model, choices, **inputs_for("BeitModel", model)) == [FP32]


def test_forward_layer_of_another_implementation_chooses_again(choices):
    model = accelerated("BeitModel", implementation="triton")
    accelerate(layers_of(model)[1], None)
    assert choices_of(model, choices, **inputs_for("BeitModel", model)) == [FP32, FP32]


def test_forward_two_models_choose_for_each(choices):
    pair = nn.Sequential(accelerated("BeitModel"), accelerated("BeitModel"))
    pixels = inputs_for("BeitModel", pair[0])["pixel_values"]
    choices.clear()
    for model in pair:
        model(pixels)
    assert choices == [FP32, FP32]


def test_forward_that_fails_leaves_no_scope(choices):
    model = accelerated("BeitModel", "absolute")

    def fail(*_):
        raise RuntimeError("stop")

    layers_of(model)[2].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="stop"):
        model(**inputs_for("BeitModel", model))
    choices.clear()
    for _ in range(2):
        layers_of(model)[0](torch.randn(2, 17, 32))
    assert choices == [FP32, FP32]


@pytest.mark.parametrize("name", TRUNKS)
def test_forward_copied_model_chooses_once_until_restored(choices, name):
    model = copy.deepcopy(accelerated(name))
    trunk = next(module for module in model.modules() if isinstance(module, tuple(fused_layers.TRUNKS)))
    inputs = inputs_for(name, model)
    assert choices_of(model, choices, **inputs) == [FP32]
    assert type(trunk) not in fused_layers.TRUNKS
    assert restore(layers_of(model)[0]).restored
    assert choices_of(model, choices, **inputs) == [FP32]
    restore(model)
    assert type(trunk) in fused_layers.TRUNKS
    assert choices_of(model, choices, **inputs) == []
