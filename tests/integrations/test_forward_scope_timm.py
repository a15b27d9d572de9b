"""One choice of kernels for each forward of timm's BEiT and of `MmsegBeit`."""

import copy
import pickle

import pytest
import torch
from torch import nn

from beit_fast.integrations.mmseg import MmsegBeit

from ..support import timm_reference
from ..support.attention_spy import record_choices
from ..support.timm_reference import POSITIONS, timm
from .test_timm import accelerate, restore

FP32, FP64 = ("cpu", torch.float32), ("cpu", torch.float64)
PIXELS = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def choices(monkeypatch):
    return record_choices(monkeypatch)


def accelerated(position="per layer", **options):
    model = timm_reference.build(**POSITIONS[position], **options)
    accelerate(model, "triton")
    return model


def choices_of(function, choices, *args, **kwargs):
    choices.clear()
    function(*args, **kwargs)
    return list(choices)


@pytest.mark.parametrize("position", POSITIONS)
def test_forward_accelerated_model_chooses_once(choices, position):
    model = accelerated(position)
    with torch.no_grad():
        assert choices_of(model, choices, PIXELS) == [FP32]
    model.train()
    for function in (model, model.forward_features, model.forward_intermediates):
        assert choices_of(function, choices, PIXELS) == [FP32]
    assert choices_of(model.forward_intermediates, choices, PIXELS, indices=[1], stop_early=True) == [FP32]
    model.set_input_size((48, 40))
    assert choices_of(model, choices, torch.zeros(1, 3, 48, 40)) == [FP32]
    assert choices_of(model.double(), choices, torch.zeros(1, 3, 48, 40).double()) == [FP64]


def test_forward_checkpointed_chooses_once_and_backward_for_each_block(choices):
    """A recomputed block runs in the backward pass, which has left the forward of the model."""
    model = accelerated().train()
    model.set_grad_checkpointing()
    choices.clear()
    loss = model(PIXELS.clone().requires_grad_()).sum()
    assert choices == [FP32]
    loss.backward()
    assert len(choices) == 1 + len(model.blocks)


def test_forward_of_features_chooses_once(choices):
    options = {key: value for key, value in timm_reference.TINY.items() if key != "num_classes"}
    name = "beit_base_patch16_224"
    model = timm.create_model(name, features_only=True, out_indices=(0, 2), **(options | {"depth": 4}))
    accelerate(model)
    assert choices_of(model, choices, PIXELS) == [FP32]


def test_forward_of_blocks_in_a_sequential_chooses_for_each(choices):
    """No module that `accelerate` knows runs these blocks."""
    blocks = nn.Sequential(*accelerated().blocks[:2])
    assert choices_of(blocks, choices, torch.zeros(1, 17, 32)) == [FP32, FP32]


def test_forward_block_of_another_dtype_chooses_again(choices):
    model = accelerated(depth=5)
    for index in (1, 3):
        block = model.blocks[index].double()
        block.register_forward_pre_hook(lambda module, args: (args[0].double(), *args[1:]))
        block.register_forward_hook(lambda module, args, output: output.float())
    assert choices_of(model, choices, PIXELS) == [FP32, FP64]


def test_forward_copied_model_chooses_once_until_restored(choices):
    model = accelerated()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other) is type(model)
        assert choices_of(other, choices, PIXELS) == [FP32]
        assert restore(other.blocks[0]).restored
        assert choices_of(other, choices, PIXELS) == [FP32]
        restore(other)
        assert type(other) is timm.models.beit.Beit
        assert choices_of(other, choices, PIXELS) == []


def test_accelerate_again_replaces_a_new_shared_bias(choices):
    model = accelerated("shared")
    model.rel_pos_bias = timm_reference.build(**POSITIONS["shared"]).rel_pos_bias
    assert accelerate(model, "triton").replaced == ["rel_pos_bias"]
    assert choices_of(model, choices, PIXELS) == [FP32]


def test_forward_subclass_chooses_once_and_keeps_its_class(choices):
    class OwnBeit(timm.models.beit.Beit):
        def forward_features(self, x):
            return 2 * super().forward_features(x)

    model = timm_reference.build(**POSITIONS["per layer"])
    model.__class__ = OwnBeit
    expected = model(PIXELS)
    accelerate(model)
    assert isinstance(model, OwnBeit)
    assert choices_of(model, choices, PIXELS) == [FP32]
    torch.testing.assert_close(model(PIXELS), expected)
    restore(model)
    assert type(model) is OwnBeit


@pytest.mark.parametrize("training", [False, True])
def test_forward_mmseg_backbone_chooses_once(choices, training):
    sizes = {"img_size": 32, "patch_size": 8, "embed_dims": 32, "num_layers": 3, "num_heads": 4, "mlp_ratio": 2}
    model = MmsegBeit(**sizes, out_indices=(0, 2), attn_implementation="triton").train(training)
    for size in ((32, 32), (48, 40)):
        assert choices_of(model, choices, torch.zeros(1, 3, *size)) == [FP32]
    assert choices_of(model.double(), choices, torch.zeros(1, 3, 32, 32).double()) == [FP64]
