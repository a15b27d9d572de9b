"""Transforms of classification: steps in their order, seeds, and the processor of evaluation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from beit_fast.training.data.source import Example
from beit_fast.training.transforms import ClassificationTransform, evaluation_processor

from ...support.pixels import assert_near_pillow

PIXELS = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)
EXAMPLE = Example(Image.fromarray(PIXELS), 3)
WHOLE = {"scale": (1.0, 1.0), "ratio": (4 / 3, 4 / 3), "flip_probability": 0.0}
PLAIN = {"aa": None, "color_jitter": None, "reprob": 0.0}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def resized(size: int) -> torch.Tensor:
    image = EXAMPLE.image.resize((size, size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def test_plain_transform_of_the_whole_image_is_that_of_pillow():
    features = ClassificationTransform(32, 0.2, [0.4, 0.5, 0.6], **WHOLE, **PLAIN)(EXAMPLE, generator())
    expected = (resized(32) - 0.2) / torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1)
    assert_near_pillow(features["pixel_values"], expected, std=torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1))
    assert features["labels"].dtype == torch.int64
    assert features["labels"].item() == 3


def test_flip_and_crop_are_drawn():
    flipped = ClassificationTransform(32, **{**WHOLE, "flip_probability": 1.0}, **PLAIN)(EXAMPLE, generator())
    plain = ClassificationTransform(32, **WHOLE, **PLAIN)(EXAMPLE, generator())
    mirrored = Image.fromarray(PIXELS[:, ::-1]).resize((32, 32), Image.Resampling.BICUBIC)
    expected = torch.from_numpy(np.array(mirrored)).permute(2, 0, 1).float() / 127.5 - 1
    assert_near_pillow(flipped["pixel_values"], expected, std=0.5)
    assert not torch.equal(flipped["pixel_values"], plain["pixel_values"])
    crops = {ClassificationTransform(8, **PLAIN)(EXAMPLE, generator(s))["pixel_values"].sum().item() for s in range(9)}
    assert len(crops) == 9


@pytest.mark.parametrize("step", [{"aa": "rand-m9-mstd0.5-inc1"}, {"color_jitter": 0.4}, {"reprob": 1.0}])
def test_each_step_changes_the_result(step):
    plain = ClassificationTransform(32, **WHOLE, **PLAIN)
    changed = ClassificationTransform(32, **WHOLE, **(PLAIN | step))
    results = [[t(EXAMPLE, generator(seed))["pixel_values"] for t in (plain, changed)] for seed in range(8)]
    assert sum(not torch.equal(*pair) for pair in results) >= 4


def test_color_jitter_has_no_effect_beside_a_policy():
    first, second = (ClassificationTransform(32, color_jitter=value) for value in (None, 0.9))
    assert torch.equal(*(t(EXAMPLE, generator())["pixel_values"] for t in (first, second)))


def test_erasing_comes_after_the_normalization():
    transform = ClassificationTransform(32, 0.25, 0.5, **WHOLE, **(PLAIN | {"reprob": 1.0}), remode="const")
    pixels = transform(EXAMPLE, generator())["pixel_values"]
    assert (pixels == 0).all(0).sum() >= 0.02 * 32 * 32 - 4


def test_fill_of_the_policy_is_the_mean():
    assert ClassificationTransform(image_mean=[0.485, 0.456, 0.406]).augment.fill == (124, 116, 104)


def test_generator_decides_everything():
    transform = ClassificationTransform(48, reprob=0.5)
    first = [transform(EXAMPLE, generator(seed))["pixel_values"] for seed in range(5)]
    torch.manual_seed(3)
    again = [transform(EXAMPLE, generator(seed))["pixel_values"] for seed in range(5)]
    assert all(map(torch.equal, first, again))
    assert not torch.equal(first[0], first[1])


def test_example_without_a_label_has_no_labels():
    features = ClassificationTransform(16)(EXAMPLE._replace(label=None), generator())
    assert set(features) == {"pixel_values"}


def test_arguments_that_do_not_fit_are_one_error():
    with pytest.raises(ValueError, match=r"\d errors") as error:
        ClassificationTransform(0, image_std=0.0, train_interpolation="cubic", scale=(0.5, 2.0), color_jitter=-1)
    expected = ["5 errors", "input_size=0", "image_std=0.0", "'cubic'", "scale=", "color_jitter=-1"]
    assert all(text in str(error.value) for text in expected), str(error.value)


@pytest.mark.parametrize(
    ("size", "crop_pct", "resized_edge"), [(224, None, 256), (384, None, 384), (224, 0.9, 248), (16, 1.0, 16)]
)
def test_evaluation_processor_resizes_by_crop_pct_and_crops_the_center(size, crop_pct, resized_edge):
    processor = evaluation_processor(size, crop_pct=crop_pct)
    pixels = processor(EXAMPLE.image, return_tensors="pt").pixel_values[0]
    height, width = resized_edge, int(resized_edge * 120 / 90)
    whole = np.asarray(EXAMPLE.image.resize((width, height), Image.Resampling.BICUBIC))
    top, left = (height - size) // 2, (width - size) // 2
    expected = torch.from_numpy(whole[top : top + size, left : left + size].copy()).permute(2, 0, 1) / 127.5 - 1
    torch.testing.assert_close(pixels, expected, atol=1e-5, rtol=0)


def test_evaluation_processor_squashes_sizes_that_are_not_square():
    pixels = evaluation_processor((32, 48), crop_pct=1.0)(EXAMPLE.image, return_tensors="pt").pixel_values
    assert pixels.shape == (1, 3, 32, 48)


def test_evaluation_processor_with_a_crop_out_of_range_is_an_error():
    with pytest.raises(ValueError, match=r"crop_pct=1.5"):
        evaluation_processor(224, crop_pct=1.5)
