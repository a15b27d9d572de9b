"""Patch embedding in the models: convolution against operator, and the choice between them."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.utils._python_dispatch import TorchDispatchMode

from beit_fast import BeitConfig, BeitForImageClassification, BeitModel

from ..support.models import MEAN, STD, build, byte_images, images
from ..support.oracle import assert_within_budget, relative_error
from ..support.transformers_reference import CLASSES, POSITIONS, TINY, main_output, random_inputs, scalar_of

FP64_PARITY = 1e-9  # two orders of summation in fp64
OPERATOR, CONVOLUTION = "beit_fast.patch_embed.default", "aten.convolution.default"


def operators_in(function):
    """List the patch embedding operators that ran."""
    seen = []

    class Spy(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Spy(), torch.no_grad():
        function()
    return [name for name in seen if name in (OPERATOR, CONVOLUTION)]


@pytest.mark.parametrize("size", [(32, 32), (35, 45)], ids=["native", "cropped"])
@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("name", CLASSES)
def test_patch_embed_fused_equals_conv_with_gradients(name, position, size):
    model = build(name, position).double()
    inputs = random_inputs(name, model, size)
    inputs["pixel_values"].requires_grad_()
    results = []
    for implementation in ("conv", "fused"):
        model.set_patch_embed_implementation(implementation)
        model.zero_grad()
        inputs["pixel_values"].grad = None
        outputs = model(**inputs)
        scalar_of(outputs).backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        results.append((main_output(outputs), gradients | {"pixels": inputs["pixel_values"].grad}))
    (expected, expected_gradients), (actual, gradients) = results
    for fused, reference in zip(actual, expected, strict=True):
        assert relative_error(fused, reference) <= FP64_PARITY
    assert gradients.keys() == expected_gradients.keys()
    for key, gradient in gradients.items():
        assert relative_error(gradient, expected_gradients[key]) <= FP64_PARITY, key


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("position", ["absolute", "none"])
def test_embeddings_fused_error_is_within_budget(position, dtype):
    embeddings = build("BeitModel", position).embeddings.to(dtype)
    pixels, mask = images(2, 3, 40, 24).to(dtype), torch.rand(2, 15) > 0.5
    precise = copy.deepcopy(embeddings).double()
    precise.patch_embed_implementation = "conv"
    exact = precise(pixels.double(), (5, 3), mask)
    tokens = {}
    for implementation in ("conv", "fused"):
        embeddings.patch_embed_implementation = implementation
        tokens[implementation] = embeddings(pixels, (5, 3), mask)
    assert tokens["fused"].dtype == dtype
    assert_within_budget("tokens", tokens["fused"], exact, tokens["conv"], 2)


@pytest.mark.parametrize(
    ("attention", "requested", "expected"),
    [
        ("triton", None, OPERATOR),
        ("sdpa", None, CONVOLUTION),
        ("eager", None, CONVOLUTION),
        ("triton", "conv", CONVOLUTION),
        ("sdpa", "fused", OPERATOR),
    ],
)
@pytest.mark.parametrize("name", CLASSES)
def test_patch_embed_implementation_selects_operator(name, attention, requested, expected):
    model = build(name, attn_implementation=attention, patch_embed_implementation=requested)
    assert operators_in(lambda: model.base_model(images())) == [expected]
    report = model.patch_embed_report()
    assert report.requested == requested
    assert (report.kernel != "conv") is (expected == OPERATOR)


def test_patch_embed_implementation_argument_overrides_config():
    config = BeitConfig(**TINY, patch_embed_implementation="fused")
    assert BeitModel(config).patch_embed_implementation == "fused"
    model = BeitForImageClassification(config, patch_embed_implementation="conv")
    assert model.patch_embed_implementation == model.beit.patch_embed_implementation == "conv"
    assert config.patch_embed_implementation == "fused"
    model = BeitModel._from_config(config, patch_embed_implementation="conv")
    assert model.patch_embed_report().would_run == "conv"


def test_reports_of_base_model_equal_head_model():
    model = build(attn_implementation="eager")
    model.set_attn_implementation("triton")
    model.set_patch_embed_implementation("fused")
    model(images())
    assert model.beit.patch_embed_report() == model.patch_embed_report()
    assert model.beit.attention_report() == model.attention_report()
    assert model.beit.attention_report().requested == "triton"


@pytest.mark.parametrize("how", ["argument", "config", "setter"])
def test_patch_embed_implementation_unknown_raises(how):
    model = BeitModel(BeitConfig(**TINY))
    choose = {
        "argument": lambda name: BeitModel(BeitConfig(**TINY), patch_embed_implementation=name),
        "config": lambda name: BeitConfig(**TINY, patch_embed_implementation=name),
        "setter": model.set_patch_embed_implementation,
    }[how]
    with pytest.raises(ValueError, match=r"'unfold'.*expected.*conv.*fused"):
        choose("unfold")
    assert model.patch_embed_implementation is None


def test_patch_embed_report_names_kernel_that_ran():
    model = build()
    assert "has not run yet, would run" in str(model.patch_embed_report())
    model.set_attn_implementation("triton")
    would_run = model.patch_embed_report().would_run
    model(images())
    report = model.patch_embed_report()
    assert report.ran == would_run == report.kernel
    assert report.unsupported_reasons[would_run] == ()
    assert f"patch embedding: {would_run} (ran; patch_embed_implementation=None)" in str(report)
    assert f"{would_run}: available" in str(report)
    model.set_patch_embed_implementation("conv")
    assert model.patch_embed_report().ran is None
    model(images())
    assert model.patch_embed_report().ran == "conv"


class Doubled(nn.Module):
    """A wrapper around the projection, as adapters add."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, pixels):
        return 2 * self.inner(pixels)


def replace_projection(patch_embeddings):
    patch_embeddings.projection = Doubled(patch_embeddings.projection)


def replace_convolution(patch_embeddings):
    patch_embeddings.projection = nn.Conv2d(3, 32, kernel_size=4, stride=8)


def hook_projection(patch_embeddings):
    patch_embeddings.projection.register_forward_hook(lambda module, args, output: 2 * output)


def hook_patch_embeddings(patch_embeddings):
    patch_embeddings.register_forward_pre_hook(lambda module, args: (2 * args[0],))


def override_forward(patch_embeddings):
    forward = patch_embeddings.forward
    patch_embeddings.forward = lambda pixels: 2 * forward(pixels)


def prune_projection(patch_embeddings):
    prune.random_unstructured(patch_embeddings.projection, "weight", 0.5)


def parametrize_projection(patch_embeddings):
    nn.utils.parametrizations.weight_norm(patch_embeddings.projection)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (replace_projection, "Doubled, not a torch.nn.modules.conv.Conv2d"),
        (replace_convolution, "projection is not a plain convolution with stride = kernel size"),
        (hook_projection, "patch_embeddings.projection has hooks"),
        (hook_patch_embeddings, "patch_embeddings has hooks"),
        (override_forward, "patch_embeddings has hooks or its own forward"),
        (prune_projection, "patch_embeddings.projection has hooks"),
        (parametrize_projection, "not a torch.nn.modules.conv.Conv2d"),
    ],
)
def test_patch_embed_modified_projection_uses_conv_or_raises(change, reason):
    model = build("BeitModel", attn_implementation="triton")
    change(model.get_input_embeddings())
    pixels = images()
    expected = model.get_input_embeddings()(pixels)
    states = model(pixels, output_hidden_states=True).hidden_states
    torch.testing.assert_close(states[0][:, 1:], expected)
    report = model.patch_embed_report()
    assert report.kernel == "conv"
    assert all(reason in "; ".join(reasons) for reasons in report.unsupported_reasons.values())
    model.set_patch_embed_implementation("fused")
    with pytest.raises(ValueError, match=f"'fused' cannot serve this model: .*{reason}"):
        model(pixels)
    assert model.patch_embed_report().would_run == "none"


def test_set_input_embeddings_other_module_is_called():
    class Zeros(nn.Module):
        def forward(self, pixels):
            return pixels.new_zeros(pixels.shape[0], 16, 32)

    model = build("BeitModel", attn_implementation="triton")
    model.set_input_embeddings(Zeros())
    states = model(images(), output_hidden_states=True).hidden_states
    assert not states[0][:, 1:].any()
    assert "Zeros, not a beit_fast.layers.embeddings.BeitPatchEmbeddings" in str(model.patch_embed_report())


@pytest.mark.parametrize("implementation", ["conv", "fused"])
def test_bool_masked_pos_accepted_forms_are_equal(implementation):
    model = build("BeitForMaskedImageModeling", patch_embed_implementation=implementation)
    pixels, masked = images(2, 3, 32, 48), torch.rand(2, 4, 6) > 0.5
    expected = model(pixels, bool_masked_pos=masked.flatten(1)).logits
    for same in (masked, masked.long(), masked.flatten(1).float(), masked.flatten(1).byte()):
        assert torch.equal(model(pixels, bool_masked_pos=same).logits, expected)
    assert not torch.equal(model(pixels).logits, expected)
    with pytest.raises(ValueError, match=r"\[batch, patches\] = \[2, 24\], not \[1, 24\]"):
        model(pixels, bool_masked_pos=masked.flatten(1)[:1])


@pytest.mark.parametrize("kind", ["float", "bytes"])
@pytest.mark.parametrize("implementation", ["conv", "fused"])
def test_compile_patch_embed_is_one_graph(implementation, kind):
    torch.compiler.reset()
    model = build("BeitForMaskedImageModeling", patch_embed_implementation=implementation).train()
    model.set_pixel_normalization(MEAN, STD)
    pixels, masked = (byte_images() if kind == "bytes" else images()), torch.rand(2, 16) > 0.5
    masked[:, 0] = True
    inputs = {"bool_masked_pos": masked, "labels": torch.arange(int(masked.sum())) % 11}
    gradients = []
    for function in (torch.compile(model, fullgraph=True, backend="aot_eager"), model):
        model.zero_grad()
        function(pixels, **inputs).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert "beit.embeddings.mask_token" in gradients[0]
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name])


@pytest.mark.parametrize("kind", ["float", "bytes"])
@pytest.mark.parametrize("implementation", ["conv", "fused"])
def test_export_patch_embed_with_dynamic_shapes(implementation, kind):
    model = build(use_absolute_position_embeddings=True, patch_embed_implementation=implementation)
    model.set_pixel_normalization(MEAN, STD)
    draw = byte_images if kind == "bytes" else images
    dynamic = torch.export.Dim.DYNAMIC
    program = torch.export.export(
        model, (draw(2, 3, 32, 48),), dynamic_shapes=({0: dynamic, 2: dynamic, 3: dynamic},)
    ).module()
    for size in [(2, 3, 32, 48), (3, 3, 64, 40), (5, 3, 24, 29)]:
        pixels = draw(*size)
        torch.testing.assert_close(program(pixels).logits, model(pixels).logits)


@pytest.mark.parametrize("implementation", ["conv", "fused"])
def test_pixels_of_other_dtype_are_cast(implementation):
    model = build(patch_embed_implementation=implementation).to(torch.bfloat16)
    pixels = images()
    assert torch.equal(model(pixels).logits, model(pixels.to(torch.bfloat16)).logits)


@pytest.mark.parametrize("implementation", ["conv", "fused"])
def test_projection_of_other_dtype_sets_token_dtype(implementation):
    model = build("BeitModel", patch_embed_implementation=implementation).to(torch.bfloat16)
    model.get_input_embeddings().float()
    pixels = images()
    precise = model.get_input_embeddings()(pixels)
    tokens = model.embeddings(pixels, (4, 4))
    assert tokens.dtype == torch.float32
    torch.testing.assert_close(tokens[:, 1:], precise)
