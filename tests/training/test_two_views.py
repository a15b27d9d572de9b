"""Two views of one crop: filters, pixel map, seeds and inputs."""

from __future__ import annotations

import math
import pickle

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance

from beit_fast.training import TwoViewTransform
from beit_fast.training.transforms.crops import draw_crop
from beit_fast.training.transforms.pixels import jitter

from ..support.pixels import assert_near_pillow

PIXELS = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)
IMAGE = Image.fromarray(PIXELS)
WHOLE = {"scale": (1.0, 1.0), "ratio": (4 / 3, 4 / 3), "flip_probability": 0.0}


def resized(image: Image.Image, size: int, resample: Image.Resampling) -> torch.Tensor:
    """Resize with Pillow to `[3, size, size]` from 0 to 1."""
    return torch.from_numpy(np.array(image.resize((size, size), resample))).permute(2, 0, 1).float() / 255


def test_views_of_the_whole_image_are_those_of_pillow():
    views = TwoViewTransform(**WHOLE)(IMAGE)
    bicubic, lanczos = resized(IMAGE, 224, Image.Resampling.BICUBIC), resized(IMAGE, 112, Image.Resampling.LANCZOS)
    assert_near_pillow(views["pixel_values"], (bicubic - 0.5) / 0.5, std=0.5)
    assert_near_pillow(views["tokenizer_pixels"], lanczos)


def test_map_pixels_is_the_map_of_dall_e_on_the_tokenizer_view_alone():
    plain, mapped = (TwoViewTransform(**WHOLE, map_pixels=flag)(IMAGE) for flag in (False, True))
    torch.testing.assert_close(mapped["tokenizer_pixels"], (1 - 0.2) * plain["tokenizer_pixels"] + 0.1)
    assert torch.equal(mapped["pixel_values"], plain["pixel_values"])


def test_mean_and_std_normalize_the_model_view_by_channel():
    mean, std = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]
    views = TwoViewTransform(**WHOLE, image_mean=mean, image_std=std)(IMAGE)
    pixels = resized(IMAGE, 224, Image.Resampling.BICUBIC)
    expected = (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    assert_near_pillow(views["pixel_values"], expected, std=torch.tensor(std).view(3, 1, 1))


def test_both_views_have_the_same_crop_and_flip():
    rows, columns = np.mgrid[0:90, 0:120]
    places = Image.fromarray(np.stack([rows * 2, columns * 2, rows * 0], -1).astype(np.uint8))
    transform = TwoViewTransform(96, 48, "box", "box", image_mean=0.0, image_std=1.0, seed=0)
    flips = set()
    for _ in range(20):
        views = transform(places)
        model, tokenizer = views["pixel_values"], views["tokenizer_pixels"]
        halved = torch.nn.functional.avg_pool2d(model[None], 2)[0]
        assert (halved - tokenizer).abs().max() <= 4 / 255
        flips.add(bool(model[1, :, 0].mean() > model[1, :, -1].mean()))
    assert flips == {True, False}


def test_crops_have_areas_and_ratios_in_range_and_cover_the_image():
    draw = np.random.default_rng(0).uniform
    crops = [draw_crop(90, 120, (0.08, 1.0), (3 / 4, 4 / 3), 0.5, draw) for _ in range(2000)]
    areas = np.array([crop.height * crop.width for crop in crops]) / (90 * 120)
    assert 0.07 < areas.min() < 0.1
    assert 0.95 < areas.max() <= 1
    assert all(0.7 < crop.width / crop.height < 1.43 for crop in crops)
    assert all(crop.top + crop.height <= 90 and crop.left + crop.width <= 120 for crop in crops)
    assert max(crop.left + crop.width for crop in crops) == 120
    flipped = sum(crop.is_flipped for crop in crops)
    assert abs(flipped - 1000) < 5 * math.sqrt(2000 / 4)  # five standard deviations


def test_crop_that_never_fits_is_the_largest_center_of_the_ratio():
    crop = draw_crop(10, 100, (1.0, 1.0), (3 / 4, 4 / 3), 0.5, np.random.default_rng(0).uniform)
    assert (crop.top, crop.left, crop.height, crop.width) == (0, 43, 10, 13)


@pytest.mark.parametrize(
    "image",
    [
        torch.from_numpy(PIXELS).permute(2, 0, 1),
        torch.from_numpy(PIXELS).permute(2, 0, 1).float() / 255,
        torch.from_numpy(PIXELS).permute(2, 0, 1).double() / 255,
        PIXELS,
    ],
    ids=["uint8 tensor", "float tensor", "double tensor", "array"],
)
def test_views_of_tensors_are_those_of_the_pillow_image(image):
    views, expected = (TwoViewTransform(seed=1, color_jitter=0.4)(x) for x in (image, IMAGE))
    assert all(torch.equal(views[name], expected[name]) for name in expected)
    assert all(view.dtype == torch.float32 for view in views.values())


def test_gray_and_transparent_images_become_rgb():
    for image in (IMAGE.convert("L"), IMAGE.convert("RGBA"), torch.zeros(1, 20, 20, dtype=torch.uint8)):
        assert TwoViewTransform((32, 48), 16)(image)["pixel_values"].shape == (3, 32, 48)


def test_seed_decides_the_views_and_global_state_does_not():
    first = TwoViewTransform(seed=2, color_jitter=0.4)
    views = first(IMAGE)
    torch.manual_seed(1)
    assert torch.equal(TwoViewTransform(seed=2, color_jitter=0.4)(IMAGE)["pixel_values"], views["pixel_values"])
    copy = pickle.loads(pickle.dumps(first))
    assert torch.equal(copy(IMAGE)["pixel_values"], first(IMAGE)["pixel_values"])
    assert not torch.equal(first(IMAGE)["pixel_values"], views["pixel_values"])


def test_generator_of_a_call_and_torch_decide_the_views():
    views = [TwoViewTransform(seed=s)(IMAGE, torch.Generator().manual_seed(3))["pixel_values"] for s in (0, None)]
    assert torch.equal(*views)
    views = []
    for _ in range(2):
        torch.manual_seed(5)
        views.append(TwoViewTransform()(IMAGE)["pixel_values"])
    assert torch.equal(*views)


def test_color_jitter_is_three_enhancements_in_the_drawn_order():
    numbers = iter([2, 1.2, 0, 0.7, 0, 1.1])  # color, brightness, contrast
    changed = jitter(PIXELS, 0.4, lambda low, high: next(numbers))
    expected = ImageEnhance.Color(IMAGE).enhance(1.2)
    expected = ImageEnhance.Contrast(ImageEnhance.Brightness(expected).enhance(0.7)).enhance(1.1)
    assert np.array_equal(changed, np.asarray(expected))


@pytest.mark.parametrize(
    ("arguments", "kind", "expected"),
    [
        ({"input_size": 0}, ValueError, ["input_size=0", "positive int"]),
        ({"second_input_size": "112"}, TypeError, ["second_input_size='112'"]),
        ({"train_interpolation": "cubic"}, ValueError, ["train_interpolation='cubic'", "'bicubic'"]),
        ({"image_mean": [0.5, 0.5]}, ValueError, ["image_mean=[0.5, 0.5]", "3 numbers"]),
        ({"image_std": 0.0}, ValueError, ["image_std=0.0", "positive"]),
        ({"scale": (0.5, 2.0)}, ValueError, ["scale=(0.5, 2.0)", "at most 1"]),
        ({"ratio": (2.0, 1.0), "flip_probability": 2}, ValueError, ["2 errors", "ratio=", "flip_probability=2"]),
        ({"color_jitter": -0.1}, ValueError, ["color_jitter=-0.1"]),
        ({"seed": 1.5}, TypeError, ["seed=1.5"]),
    ],
)
def test_arguments_that_do_not_fit_are_one_error(arguments, kind, expected):
    with pytest.raises(kind) as error:
        TwoViewTransform(**arguments)
    assert all(text in str(error.value) for text in expected), str(error.value)


@pytest.mark.parametrize(
    ("image", "kind", "expected"),
    [
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), ValueError, "expected one image, got 2"),
        (torch.full((3, 8, 8), -1.0), ValueError, "expected values from 0 to 1"),
        (torch.zeros(3, 8, 8, device="meta"), ValueError, "meta"),
        (7, TypeError, "int"),
        ([], ValueError, "expected one image, got 0"),
    ],
)
def test_input_that_is_not_one_image_is_one_error(image, kind, expected):
    with pytest.raises(kind, match=expected):
        TwoViewTransform()(image)
