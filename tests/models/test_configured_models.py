"""Models and their configurations: implementations, gradient checkpointing, and methods of Transformers."""

import copy

import pytest
import torch
import torch.utils.checkpoint
import transformers

import beit_fast
from beit_fast.integrations.transformers import register, unregister
from beit_fast.layers.block import BeitEncoder

from ..support.transformers_reference import CLASSES, TINY, main_output, options_for, random_inputs, randomize


def make_model(name="BeitModel", **options):
    model = getattr(beit_fast, name)(beit_fast.BeitConfig(**(TINY | options_for(name) | options)))
    randomize(model)
    return model


def configs_of(model):
    return [vars(module)["config"] for module in model.modules() if "config" in vars(module)]


@pytest.mark.parametrize("name", CLASSES)
def test_config_follows_the_implementations_of_the_model(name, tmp_path):
    model = make_model(name)
    model.set_attn_implementation("eager")
    model.set_patch_embed_implementation("conv")
    assert (model.config._attn_implementation, model.config.patch_embed_implementation) == ("eager", "conv")
    assert len({id(config) for config in configs_of(model)}) == 1
    again = type(model)(model.config)
    assert (again.attn_implementation, again.patch_embed_implementation) == ("eager", "conv")
    model.set_attn_implementation(None)
    assert model.config.attn_implementation is None
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, attn_implementation="eager", patch_embed_implementation="conv")
    assert (loaded.config._attn_implementation, loaded.config.patch_embed_implementation) == ("eager", "conv")
    assert type(model)(loaded.config).attn_implementation == "eager"


def test_config_of_another_model_does_not_follow():
    config = beit_fast.BeitConfig(**TINY)
    first, second = beit_fast.BeitModel(config, attn_implementation="eager"), beit_fast.BeitModel(config)
    assert (first.config.attn_implementation, second.config.attn_implementation) == ("eager", None)
    assert second.config is config
    second.set_attn_implementation("sdpa")
    assert (config.attn_implementation, beit_fast.BeitModel(config).attn_implementation) == (None, None)


def test_set_pixel_normalization_after_set_attn_implementation_reaches_the_embeddings():
    model = make_model("BeitForImageClassification").eval()
    model.set_attn_implementation("eager")
    model.set_pixel_normalization(0.5, 0.25)
    pixels = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        assert torch.allclose(model(pixels).logits, model((pixels / 255 - 0.5) / 0.25).logits, atol=1e-5)


@pytest.mark.parametrize("name", CLASSES)
def test_models_have_the_embedding_methods_of_transformers(name):
    model = make_model(name)
    assert model.get_output_embeddings() is None
    with pytest.raises(NotImplementedError, match="has no output embeddings"):
        model.set_output_embeddings(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("reentrant", [True, False])
def test_enable_input_require_grads_lets_frozen_layers_checkpoint(reentrant):
    model = make_model("BeitForImageClassification").train()
    model.requires_grad_(False)
    lora = model.beit.encoder.layer[0].output.dense
    lora.requires_grad_(True)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    model.enable_input_require_grads()
    pixels = torch.randn(2, 3, 32, 32)
    assert model.beit.embeddings.patch_embeddings(pixels).requires_grad
    model(pixels).logits.sum().backward()
    assert lora.weight.grad.abs().sum() > 0
    model.disable_input_require_grads()
    model.disable_input_require_grads()
    assert not model.beit.embeddings.patch_embeddings(pixels).requires_grad


def test_config_with_gradient_checkpointing_enables_it(tmp_path):
    model = make_model("BeitForImageClassification", gradient_checkpointing=True)
    assert model.is_gradient_checkpointing
    assert model.is_activation_checkpointing
    model.save_pretrained(tmp_path)
    assert beit_fast.BeitForImageClassification.from_pretrained(tmp_path).is_gradient_checkpointing
    assert transformers.BeitForImageClassification.from_pretrained(tmp_path).is_activation_checkpointing
    plain = make_model("BeitForImageClassification")
    assert not plain.is_gradient_checkpointing
    assert not plain.is_activation_checkpointing
    assert "gradient_checkpointing" not in plain.config.to_dict()
    with pytest.raises(TypeError, match="gradient_checkpointing='yes'"):
        beit_fast.BeitConfig(gradient_checkpointing="yes")


def gradients(model, inputs):
    model.zero_grad()
    main_output(model(**inputs))[0].sum().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def count_forwards(model):
    """Count the calls of each block; a recomputed one runs twice."""
    counts = [0] * len(model.base_model.encoder.layer)

    def counting(index):
        return lambda *_: counts.__setitem__(index, counts[index] + 1)

    for index, layer in enumerate(model.base_model.encoder.layer):
        layer.register_forward_pre_hook(counting(index))
    return counts


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize(("every", "calls"), [(1, [2, 2, 2]), (2, [2, 1, 2]), (3, [2, 1, 1])])
def test_activation_checkpointing_enable_recomputes_every_nth_layer(every, calls, offload):
    model = make_model("BeitForImageClassification").train()
    inputs = random_inputs("BeitForImageClassification", model)
    inputs = {key: x.float() if x.is_floating_point() else x for key, x in inputs.items()}
    wanted = gradients(model, inputs)
    model.activation_checkpointing_enable(every_n_layers=every, offload=offload)
    counts = count_forwards(model)
    found = gradients(model, inputs)
    assert counts == calls
    assert all(torch.equal(one, other) for one, other in zip(wanted, found, strict=True))


@pytest.mark.parametrize("every", [0, 1.5, "all"])
def test_activation_checkpointing_enable_with_a_wrong_number_raises(every):
    with pytest.raises(ValueError, match=r"every_n_layers=.* is not supported \(expected a positive int\)"):
        make_model().activation_checkpointing_enable(every_n_layers=every)


def test_offload_keeps_inputs_of_layers_in_host_memory(monkeypatch):
    entered = []
    original = torch.autograd.graph.save_on_cpu

    def spy(*args, **kwargs):
        entered.append(kwargs)
        return original(*args, **kwargs)

    monkeypatch.setattr(torch.autograd.graph, "save_on_cpu", spy)
    model = make_model().train()
    model.activation_checkpointing_enable(offload=True)
    model(torch.randn(1, 3, 32, 32))
    assert entered == [{"pin_memory": False}] * 3


@pytest.fixture
def depth_model():
    register()
    values = TINY | {"num_hidden_layers": 4, "out_indices": [1, 2, 3, 4], "use_relative_position_bias": True}
    values["reshape_hidden_states"] = False
    config = transformers.DPTConfig(
        backbone_config=transformers.BeitConfig(**values),
        hidden_size=32,
        neck_hidden_sizes=[8, 8, 8, 8],
        fusion_hidden_size=8,
        readout_type="project",
        reassemble_factors=[4, 2, 1, 0.5],
        use_auxiliary_head=False,
    )
    yield transformers.DPTForDepthEstimation(config).train()
    unregister()


@pytest.mark.parametrize("reentrant", [True, False])
def test_options_of_checkpointing_reach_a_backbone_inside_dpt(reentrant, depth_model, monkeypatch):
    assert isinstance(depth_model.backbone, beit_fast.BeitBackbone)
    asked = []
    original = torch.utils.checkpoint.checkpoint

    def spy(*args, **options):
        asked.append(options)
        return original(*args, **options)

    monkeypatch.setattr(transformers.modeling_utils, "checkpoint", spy)
    depth_model.activation_checkpointing_enable({"use_reentrant": reentrant})
    pixels = torch.randn(1, 3, 32, 32, requires_grad=True)
    depth_model(pixels).predicted_depth.sum().backward()
    assert asked == [{"use_reentrant": reentrant}] * 4
    assert depth_model.backbone.is_gradient_checkpointing
    depth_model.backbone.gradient_checkpointing_enable()
    asked.clear()
    depth_model(pixels).predicted_depth.sum().backward()
    assert asked == []
    depth_model.activation_checkpointing_disable()
    assert not depth_model.backbone.is_gradient_checkpointing


def test_copies_keep_options_of_checkpointing():
    model = make_model()
    model.activation_checkpointing_enable({"use_reentrant": True}, every_n_layers=2, offload=True)
    encoder = next(module for module in copy.deepcopy(model).modules() if isinstance(module, BeitEncoder))
    assert (encoder.checkpoint_every, encoder.checkpoint_offload) == (2, True)
