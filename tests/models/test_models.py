"""The models beyond parity: attention implementations, training, errors, copies, dtypes and export."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import beit_fast
from beit_fast import BeitBackbone, BeitConfig, BeitForImageClassification, BeitForSemanticSegmentation, BeitModel
from beit_fast.layers import BeitDropPath, BeitSelfAttention

from ..support.devices import CPU_ATTENTION, DEFAULT_ATTENTION
from ..support.transformers_reference import TINY, randomize

BACKENDS = ("eager", "sdpa", "triton")


def config(**options):
    return BeitConfig(**(TINY | {"use_relative_position_bias": True} | options))


def build(cls=BeitForImageClassification, attn_implementation="triton", **options):
    model = cls(config(**options), attn_implementation=attn_implementation).eval()
    randomize(model)
    return model


def images(*size, dtype=torch.float32):
    return torch.randn(*(size or (2, 3, 32, 32)), dtype=dtype)


def test_attn_implementation_argument_overrides_config():
    carried = config(attn_implementation="eager")
    assert BeitModel(carried).attn_implementation == "eager"
    assert BeitModel(carried, attn_implementation="sdpa").attn_implementation == "sdpa"
    assert carried.attn_implementation == "eager"
    assert BeitModel(config()).attn_implementation is None


def test_from_config_sets_attention_and_dtype():
    model = BeitForImageClassification._from_config(config(), attn_implementation="triton", dtype="bfloat16")
    assert model.dtype == torch.bfloat16
    assert model.attn_implementation == "triton"
    assert BeitModel._from_config(config(dtype="float16")).dtype == torch.float16
    assert BeitModel._from_config(config()).dtype == torch.float32


@pytest.mark.parametrize("how", ["argument", "config", "setter"])
def test_attn_implementation_unknown_raises(how):
    model = BeitModel(config())
    choose = {
        "argument": lambda name: BeitModel(config(), attn_implementation=name),
        "config": lambda name: BeitModel(config(attn_implementation=name)),
        "setter": model.set_attn_implementation,
    }[how]
    with pytest.raises(ValueError, match=r"'flash'.*expected"):
        choose("flash")
    assert model.attn_implementation is None


def test_attention_report_names_kernel_that_ran():
    model = build(attn_implementation=None)
    assert "has not run yet, would run" in str(model.attention_report())
    model(images())
    assert model.attention_report().layers == (DEFAULT_ATTENTION,) * 3
    model.set_attn_implementation("triton")
    assert model.attention_report().layers == (None,) * 3
    model(images())
    assert model.attention_report().kernel == CPU_ATTENTION
    model(images(), output_attentions=True)
    assert model.attention_report().kernel == "eager"


def test_set_attn_implementation_keeps_outputs():
    model, pixels = build(), images()
    outputs = []
    for backend in BACKENDS:
        model.set_attn_implementation(backend)
        outputs.append(model(pixels).logits)
    torch.testing.assert_close(outputs[1], outputs[0])
    torch.testing.assert_close(outputs[2], outputs[0])


def test_triton_attention_builds_no_dense_bias():
    """The dispatcher sees one attention operator a layer and no N x N tensor."""
    from torch.utils._python_dispatch import TorchDispatchMode

    model, seen, largest = build(), [], []
    tokens = 17

    class Spy(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                largest.append(tuple(result.shape[-2:]))
            return result

    with Spy(), torch.no_grad():
        model(images())
    assert seen.count("beit_fast.rel_pos_attention.default") == 3
    assert (tokens, tokens) not in largest


def test_drop_path_drops_whole_samples_and_scales_the_rest():
    torch.manual_seed(3)
    branch = torch.ones(4000, 2, 3)
    layer = BeitDropPath(0.25).train()
    dropped = layer(branch)
    torch.testing.assert_close(dropped.unique(), torch.tensor([0.0, 1 / 0.75]))
    assert torch.equal(dropped.amin((1, 2)), dropped.amax((1, 2)))
    assert abs((dropped[:, 0, 0] == 0).float().mean().item() - 0.25) < 0.03
    assert torch.equal(layer.eval()(branch), branch)


def test_drop_path_rates_grow_linearly():
    layers = build(drop_path_rate=0.3).beit.encoder.layer
    assert isinstance(layers[0].drop_path, nn.Identity)
    assert [layer.drop_path.drop_prob for layer in layers[1:]] == [pytest.approx(0.15), pytest.approx(0.3)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout_training_only(backend):
    model = build(attn_implementation=backend, hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2)
    pixels = images()
    assert torch.equal(model(pixels).logits, model(pixels).logits)
    model.train()
    assert not torch.equal(model(pixels).logits, model(pixels).logits)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_checkpointing_repeats_dropout(backend):
    model = build(
        attn_implementation=backend, drop_path_rate=0.3, hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2
    ).train()
    pixels, labels = images(), torch.tensor([0, 1])

    def gradients():
        model.zero_grad()
        torch.manual_seed(5)
        model(pixels, labels=labels).loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    plain = gradients()
    model.gradient_checkpointing_enable()
    for again, first in zip(gradients(), plain, strict=True):
        torch.testing.assert_close(again, first)


def test_gradient_checkpointing_reentrant_gives_gradients():
    model = build().train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    pixels = images().requires_grad_()
    model(pixels, labels=torch.tensor([0, 1])).loss.backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "mask_token" not in name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_backward_bias_tables_only_gives_gradients(backend):
    model = build(attn_implementation=backend)
    model.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, BeitSelfAttention):
            module.relative_position_bias.relative_position_bias_table.requires_grad_(True)
    model(images(), labels=torch.tensor([0, 1])).loss.backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(grads) == 3
    assert all(grad.abs().sum() > 0 for grad in grads)


def test_invalid_inputs_and_configs_raise():
    model = build()
    with pytest.raises(ValueError, match=r"\[batch, 3, height, width\], not \[2, 1, 32, 32\]"):
        model(images(2, 1, 32, 32))
    with pytest.raises(ValueError, match="7x40 pixels are smaller than one patch of 8x8"):
        model(images(2, 3, 7, 40))
    with pytest.raises(ValueError, match=r"attention_mask must be \[batch, tokens\] = \[2, 17\].*not \[2, 16\]"):
        model(images(), attention_mask=torch.ones(2, 16))
    with pytest.raises(TypeError, match="head_mask"):
        model(images(), head_mask=None)
    with pytest.raises(ValueError, match="use_mask_token=True"):
        build(BeitModel, use_mask_token=False)(images(), bool_masked_pos=torch.zeros(2, 16, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"\[batch, patches\] = \[2, 16\], not \[2, 17\]"):
        build(BeitModel)(images(), bool_masked_pos=torch.zeros(2, 17, dtype=torch.bool))
    with pytest.raises(ValueError, match="require bool_masked_pos"):
        build(beit_fast.BeitForMaskedImageModeling)(images(), labels=torch.zeros(4, dtype=torch.long))
    with pytest.raises(ValueError, match="four out_indices"):
        build(BeitForSemanticSegmentation)
    segmenter = build(BeitForSemanticSegmentation, num_labels=1, out_indices=[0, 1, 2, 3])
    with pytest.raises(ValueError, match=r"requires config\.num_labels > 1"):
        segmenter(images(), labels=torch.zeros(2, 32, 32, dtype=torch.long))
    with pytest.raises(ValueError, match="reshape_hidden_states=True"):
        build(BeitBackbone, add_fpn=True, reshape_hidden_states=False, out_indices=[0, 1, 2, 3])


def test_arguments_that_are_not_tensors_are_all_listed():
    pixels = torch.randn(1, 3, 32, 32)
    model = BeitModel(config(use_mask_token=True)).eval()
    with pytest.raises(TypeError) as caught:
        model(pixels.numpy(), [[True]], attention_mask=[[1]])
    assert str(caught.value) == (
        "pixel_values is of type ndarray, bool_masked_pos is of type list, attention_mask is of type list "
        "(expected a torch.Tensor); convert images with a BeitImageProcessor, as in "
        "model(**processor(images, return_tensors='pt'))"
    )
    backbone = BeitBackbone(config(num_hidden_layers=4, out_indices=[1, 2, 3, 4]))
    classifier = BeitForImageClassification(config()).eval()
    for other in (backbone, classifier, beit_fast.optimize_for_inference(classifier)):
        with pytest.raises(
            TypeError, match=r"^pixel_values is of type ndarray \(expected a torch.Tensor\); convert images"
        ):
            other(pixels.numpy())


def test_bool_masked_pos_as_grid_equals_flat():
    model = build(BeitModel)
    masked = torch.rand(2, 4, 4) > 0.5
    pixels = images()
    expected = model(pixels, bool_masked_pos=masked.flatten(1)).last_hidden_state
    assert torch.equal(model(pixels, bool_masked_pos=masked).last_hidden_state, expected)
    assert torch.equal(model(pixels, bool_masked_pos=masked.flatten(1).long()).last_hidden_state, expected)


def test_config_output_flags_are_defaults():
    model = build(BeitModel, output_hidden_states=True, output_attentions=True)
    output = model(images())
    assert len(output.hidden_states) == 4
    assert len(output.attentions) == 3
    assert model(images(), output_hidden_states=False).hidden_states is None
    assert isinstance(build(return_dict=False)(images()), tuple)


def test_set_input_embeddings_replaces_module():
    model = build()
    assert model.get_input_embeddings() is model.beit.embeddings.patch_embeddings
    replacement = copy.deepcopy(model.get_input_embeddings())
    model.set_input_embeddings(replacement)
    assert model.beit.embeddings.patch_embeddings is replacement
    assert build(BeitBackbone).get_input_embeddings().projection.out_channels == 32


def test_load_state_dict_ignores_index_buffers():
    model = build()
    state = model.state_dict()
    state["beit.encoder.layer.0.attention.attention.relative_position_bias.relative_position_index"] = torch.zeros(
        17, 17, dtype=torch.long
    )
    model.load_state_dict(state, strict=True)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copy_gives_equal_logits(clone):
    model, pixels = build(), images()
    model(pixels)
    again = clone(model)
    assert torch.equal(again(pixels).logits, model(pixels).logits)
    assert again.attn_implementation == "triton"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("backend", BACKENDS)
def test_to_dtype_after_run_equals_fresh_model(backend, dtype):
    """The model may not cache an index or bias of another size or dtype."""
    model = build(attn_implementation=backend)
    fresh = copy.deepcopy(model)
    model(images())
    model(images(1, 3, 40, 24))
    pixels = images(2, 3, 48, 16)
    expected = fresh.to(dtype)(pixels.to(dtype)).logits
    assert torch.equal(model.to(dtype)(pixels.to(dtype)).logits, expected)
    assert expected.dtype == dtype


def test_constructor_registers_no_buffers():
    """Transformers 5 builds on meta, which leaves buffers uninitialized (huggingface/transformers#48892)."""
    for cls in (BeitModel, BeitBackbone, BeitForImageClassification):
        assert not list(build(cls).named_buffers())


def test_meta_model_can_be_initialized_or_loaded():
    real = build()
    with torch.device("meta"):
        model = BeitForImageClassification(config(), attn_implementation="triton").eval()
    assert {p.device.type for p in model.parameters()} == {"meta"}
    model.to_empty(device="cpu").init_weights()
    assert all(torch.isfinite(p).all() for p in model.parameters())
    with torch.device("meta"):
        model = BeitForImageClassification(config(), attn_implementation="triton").eval()
    model.load_state_dict(real.state_dict(), assign=True)
    pixels = images()
    assert torch.equal(model(pixels).logits, real(pixels).logits)


def test_autocast_keeps_fp32_residual():
    model = build()
    pixels = images()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = model(pixels, output_hidden_states=True)
    assert low.hidden_states[-1].dtype == torch.float32
    plain = model(pixels).logits
    assert (low.logits.float() - plain).norm() / plain.norm() < 16 * torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize(
    ("backend", "position"),
    [
        ("eager", "use_relative_position_bias"),
        ("sdpa", "use_absolute_position_embeddings"),
        ("triton", "use_absolute_position_embeddings"),
    ],
)
def test_export_with_dynamic_shapes_equals_model(backend, position):
    model = build(attn_implementation=backend, **({"use_relative_position_bias": False} | {position: True}))
    dynamic = torch.export.Dim.DYNAMIC
    program = torch.export.export(
        model, (images(2, 3, 32, 48),), dynamic_shapes=({0: dynamic, 2: dynamic, 3: dynamic},)
    ).module()
    for size in [(2, 3, 32, 48), (3, 3, 64, 40), (5, 3, 24, 24)]:
        pixels = images(*size)
        torch.testing.assert_close(program(pixels).logits, model(pixels).logits)


def test_export_save_and_load_equals_model():
    model, pixels = build(), images()
    buffer = io.BytesIO()
    torch.export.save(torch.export.export(model, (pixels,)), buffer)
    buffer.seek(0)
    torch.testing.assert_close(torch.export.load(buffer).module()(pixels).logits, model(pixels).logits)


def test_compile_attention_dropout_follows_seed():
    """The seed is a symbolic integer of the graph; a constant seed would drop the same weights in every step."""
    torch.compiler.reset()
    model = build(attention_probs_dropout_prob=0.3).train()
    pixels, labels = images(), torch.tensor([0, 1])
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")

        def step(seed):
            torch.manual_seed(seed)
            model.zero_grad()
            compiled(pixels, labels=labels).loss.backward()
            return model.beit.encoder.layer[0].attention.attention.query.weight.grad.clone()

        first, second, again = step(1), step(2), step(1)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
