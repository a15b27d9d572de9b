"""uint8 pixels: normalized as by an image processor, in every class. The configuration stores mean and std."""

import copy
import pickle

import numpy as np
import pytest
import torch
import transformers

import beit_fast
from beit_fast import BeitConfig, BeitForImageClassification, BeitImageProcessor

from ..support.models import MEAN, STD, build, byte_images, images, normalized
from ..support.oracle import assert_within_budget, relative_error
from ..support.transformers_reference import CLASSES, TINY, main_output

FP64_PARITY = 1e-9  # two orders of summation in fp64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("implementation", ["conv", "fused"])
def test_uint8_pixels_equal_image_processor(implementation, dtype):
    processor = BeitImageProcessor(image_mean=MEAN, image_std=STD, do_resize=False, do_center_crop=False)
    arrays = [np.random.default_rng(seed).integers(0, 256, (40, 32, 3), dtype=np.uint8) for seed in range(2)]
    floats = processor(arrays, return_tensors="pt")["pixel_values"].to(dtype)
    pixels = torch.stack([torch.from_numpy(array).permute(2, 0, 1) for array in arrays])
    model = build("BeitModel", patch_embed_implementation=implementation).to(dtype)
    eager = copy.deepcopy(model)
    eager.set_patch_embed_implementation("conv")
    exact = copy.deepcopy(eager).double()(normalized(pixels)).last_hidden_state
    budget = eager(floats).last_hidden_state
    model.set_pixel_normalization(processor.image_mean, processor.image_std)
    for layout in (pixels, pixels.to(memory_format=torch.channels_last)):
        actual = model(layout).last_hidden_state
        assert actual.dtype == dtype
        assert_within_budget("bytes", actual, exact, budget, 2)
    model.set_patch_embed_implementation("conv")
    assert torch.equal(model(floats).last_hidden_state, budget), "float pixels are used without normalization"


@pytest.mark.parametrize("implementation", ["conv", "fused"])
@pytest.mark.parametrize("name", CLASSES)
def test_uint8_pixels_in_every_class_equal_normalized(name, implementation):
    model = build(name, patch_embed_implementation=implementation).double()
    model.set_pixel_normalization(MEAN, STD)
    pixels = byte_images(2, 3, 35, 45)
    for actual, expected in zip(main_output(model(pixels)), main_output(model(normalized(pixels))), strict=True):
        assert relative_error(actual, expected) <= FP64_PARITY


@pytest.mark.parametrize("implementation", ["conv", "fused"])
def test_pixels_wrong_dtype_or_shape_raise(implementation):
    model = build(patch_embed_implementation=implementation)
    with pytest.raises(ValueError, match=r"uint8 pixel_values need .* call model.set_pixel_normalization\(mean, std\)"):
        model(byte_images())
    model.set_pixel_normalization(MEAN, STD)
    model(byte_images())
    with pytest.raises(ValueError, match="normalized floating point, or uint8, not int64"):
        model(byte_images().long())
    for wrong in (byte_images(2, 1, 32, 32), images(2, 4, 32, 32), images(3, 32, 32)):
        with pytest.raises(ValueError, match=r"must be \[batch, 3, height, width\], not"):
            model(wrong)
    with pytest.raises(ValueError, match="7x40 pixels are smaller than one patch of 8x8"):
        model(byte_images(2, 3, 7, 40))
    model.set_pixel_normalization(None, None)
    with pytest.raises(ValueError, match="uint8 pixel_values need"):
        model(byte_images())


@pytest.mark.parametrize(
    ("mean", "std", "error", "reason"),
    [
        (MEAN, None, ValueError, "expected num_channels=3 numbers each, or None for both"),
        (None, STD, ValueError, "expected num_channels=3 numbers each, or None for both"),
        (MEAN[:2], STD, ValueError, "expected num_channels=3 numbers each"),
        (MEAN, [0.5, 0.0, 0.5], ValueError, "pixel_std.*a positive, finite number for each channel"),
        (MEAN, [0.5, -0.5, 0.5], ValueError, "pixel_std.*a positive"),
        ([0.5, float("nan"), 0.5], STD, ValueError, "pixel_mean.*a finite number"),
        (["0.5"] * 3, STD, TypeError, "pixel_mean.*a finite number"),
        (MEAN, "imagenet", TypeError, "pixel_std.*a positive"),
    ],
)
def test_set_pixel_normalization_invalid_raises_and_keeps_config(mean, std, error, reason):
    model = build()
    model.set_pixel_normalization(0.5, 0.25)
    before = model.config.to_dict()
    with pytest.raises(error, match=reason):
        model.set_pixel_normalization(mean, std)
    assert model.config.to_dict() == before
    assert (model.config.pixel_mean, model.config.pixel_std) == ((0.5,) * 3, (0.25,) * 3)


@pytest.mark.parametrize("numbers", [tuple, np.array, torch.tensor])
def test_set_pixel_normalization_accepts_any_sequence(numbers):
    model = build(attn_implementation="eager")
    model.set_pixel_normalization(numbers(MEAN), numbers(STD))
    assert model.config.pixel_mean == pytest.approx(MEAN)
    assert all(type(number) is float for number in model.config.pixel_std)
    assert model.config.attn_implementation == "eager"


@pytest.mark.parametrize("name", CLASSES)
def test_pixel_normalization_round_trips_and_transformers_ignores_it(name, tmp_path):
    model = build(name)
    plain = model.config.to_json_string()
    assert "pixel" not in plain
    assert "patch_embed" not in plain
    model.set_pixel_normalization(MEAN, STD)
    model.save_pretrained(tmp_path)
    assert not list(model.named_buffers()) or name == "BeitForSemanticSegmentation"  # batch norms
    again = getattr(beit_fast, name).from_pretrained(tmp_path, patch_embed_implementation="fused")
    assert (again.config.pixel_mean, again.config.pixel_std) == (tuple(MEAN), tuple(STD))
    assert again.patch_embed_implementation == "fused"
    assert getattr(beit_fast, name).from_pretrained(tmp_path).patch_embed_implementation is None
    pixels = byte_images()
    for mine, expected in zip(main_output(again(pixels)), main_output(model(pixels)), strict=True):
        torch.testing.assert_close(mine, expected)
    theirs = getattr(transformers, name).from_pretrained(tmp_path).eval()
    floats = normalized(pixels, torch.float32)
    for mine, expected in zip(main_output(theirs(floats)), main_output(model(floats)), strict=True):
        assert relative_error(mine, expected) < 1e-5
    theirs.save_pretrained(tmp_path / "theirs")
    assert BeitConfig.from_pretrained(tmp_path / "theirs").pixel_mean == tuple(MEAN)
    assert "fused" not in (tmp_path / "config.json").read_text()


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_pixel_normalization_of_copy_is_independent(clone):
    model, pixels = build(patch_embed_implementation="fused"), byte_images()
    model.set_pixel_normalization(MEAN, STD)
    again = clone(model)
    assert torch.equal(again(pixels).logits, model(pixels).logits)
    again.set_pixel_normalization(0.5, 0.5)
    assert not torch.equal(again(pixels).logits, model(pixels).logits)
    assert again.patch_embed_implementation == "fused"


def test_compile_changed_normalization_is_applied():
    torch.compiler.reset()
    model, pixels = build(patch_embed_implementation="fused"), byte_images()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for numbers in ((MEAN, STD), (0.5, 0.5)):
        model.set_pixel_normalization(*numbers)
        torch.testing.assert_close(compiled(pixels).logits, model(pixels).logits)


@pytest.mark.parametrize("implementation", ["conv", "fused"])
def test_autocast_uint8_pixels_keep_fp32_residual(implementation):
    model, pixels = build(patch_embed_implementation=implementation), byte_images()
    model.set_pixel_normalization(MEAN, STD)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = model(pixels, output_hidden_states=True)
    assert low.hidden_states[0].dtype == torch.float32
    plain = model(pixels).logits
    assert relative_error(low.logits, plain) < 16 * torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("implementation", ["conv", "fused"])
def test_meta_model_uint8_pixels_gives_shapes(implementation):
    with torch.device("meta"):
        model = BeitForImageClassification(BeitConfig(**TINY), "triton", implementation).eval()
        model.set_pixel_normalization(MEAN, STD)
        assert model(torch.empty(2, 3, 32, 48, dtype=torch.uint8)).logits.shape == (2, 5)


def test_vmap_uint8_pixels_equals_batch():
    model = build("BeitModel", attn_implementation="triton")
    model.set_pixel_normalization(MEAN, STD)
    pixels = byte_images(3, 3, 32, 32)
    mapped = torch.vmap(lambda image: model(image[None]).last_hidden_state[0])(pixels)
    torch.testing.assert_close(mapped, model(pixels).last_hidden_state)
