"""Joint transform of segmentation: image and annotation stay together, and no class id is new."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from beit_fast.training.data.source import Example
from beit_fast.training.transforms import SegmentationTransform
from beit_fast.training.transforms.pixels import distort

STILL = {"color_jitter": False, "image_mean": 0.0, "image_std": 1.0, "train_interpolation": "nearest"}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def annotated(height: int = 60, width: int = 90, classes: int = 7) -> Example:
    """An image whose red level is ten times the class of the pixel, in blocks of 5 pixels."""
    blocks = np.random.default_rng(1).integers(0, classes, (height // 5, width // 5))
    labels = np.kron(blocks, np.ones((5, 5), dtype=np.int64)).astype(np.uint8)
    pixels = np.stack([labels * 10, labels, labels], -1).astype(np.uint8)
    return Example(Image.fromarray(pixels), Image.fromarray(labels))


def test_image_and_annotation_have_the_same_scale_crop_and_flip():
    example = annotated()
    transform = SegmentationTransform((40, 48), **STILL)
    sizes = set()
    for seed in range(25):
        features = transform(example, generator(seed))
        red, labels = (features["pixel_values"][0] * 255).round().long(), features["labels"]
        is_padded = labels == 255
        assert labels.shape == (40, 48)
        assert labels.dtype == torch.int64
        assert torch.equal(red[~is_padded], labels[~is_padded] * 10)
        assert (features["pixel_values"][:, is_padded] == 0).all()
        sizes.add(int(is_padded.sum()))
    assert len(sizes) > 5  # scales from 0.5 on are padded


def test_annotation_is_never_interpolated():
    ids = {0, 3, 200}
    labels = np.random.default_rng(0).choice(list(ids), (50, 50)).astype(np.uint8)
    example = Example(Image.new("RGB", (50, 50)), Image.fromarray(labels))
    found = set()
    for seed in range(10):
        found |= set(SegmentationTransform(32)(example, generator(seed))["labels"].unique().tolist())
    assert found == ids | {255}


@pytest.mark.parametrize("kind", ["palette", "16 bits"])
def test_annotation_of_other_modes_keeps_its_ids(kind):
    levels = np.array([[0, 1], [300, 2]])
    if kind == "palette":
        levels = np.array([[0, 1], [7, 2]])
        label = Image.fromarray(levels.astype(np.uint8), mode="P")
        label.putpalette([255, 0, 0] * 256)
    else:
        label = Image.fromarray(levels.astype(np.uint16))
    example = Example(Image.new("RGB", (2, 2)), label)
    assert SegmentationTransform(2).labels_of(example).tolist() == levels.tolist()


def test_flip_mirrors_both():
    example = annotated(40, 40)
    options = {"scale": (1.0, 1.0), "cat_max_ratio": 1.0, **STILL}
    plain, flipped = (
        SegmentationTransform(40, flip_probability=p, **options)(example, generator()) for p in (0.0, 1.0)
    )
    assert torch.equal(plain["labels"].flip(1), flipped["labels"])
    assert torch.equal(plain["pixel_values"].flip(2), flipped["pixel_values"])
    assert torch.equal(plain["labels"], torch.from_numpy(np.array(example.label)).long())


def test_scale_is_uniform_between_its_limits():
    transform = SegmentationTransform(100, scale=(0.5, 2.0))
    stream = torch.Generator().manual_seed(0)

    def draw(low: float, high: float) -> float:
        return low + (high - low) * torch.rand((), generator=stream).item()

    heights = np.array([transform._scaled_size(60, 90, draw) for _ in range(1500)])
    assert abs(heights[:, 0].min() - 50) <= 1
    assert abs(heights[:, 0].max() - 200) <= 1
    assert abs(heights[:, 0].mean() - 125) < 6
    assert np.abs(heights[:, 1] / heights[:, 0] - 1.5).max() < 0.03
    assert transform._scaled_size(10, 1000, lambda low, high: 1.0) == (4, 400)  # the longer side is four times 100


def test_crop_avoids_a_class_with_too_many_pixels():
    labels = np.zeros((40, 160), dtype=np.uint8)
    labels[:, 140:150], labels[:, 150:] = 1, 2
    example = Example(Image.new("RGB", (160, 40)), Image.fromarray(labels))
    options = {"scale": (1.0, 1.0), "flip_probability": 0.0, "color_jitter": False}
    mixed = {}
    for ratio in (0.75, 1.0):
        transform = SegmentationTransform(40, cat_max_ratio=ratio, **options)
        crops = [transform(example, generator(seed))["labels"] for seed in range(200)]
        mixed[ratio] = sum(crop.unique().numel() > 1 for crop in crops)
    alone = SegmentationTransform(40, cat_max_ratio=0.0, **options)
    single = sum(alone(example, generator(s))["labels"].unique().numel() > 1 for s in range(200))
    assert mixed[0.75] > 2 * single  # up to ten draws instead of one
    assert mixed[1.0] >= mixed[0.75]


def test_ignored_pixels_do_not_count_in_the_choice_of_a_crop():
    labels = torch.full((10, 10), 255)
    labels[0, :4], labels[1, :4] = 1, 2
    transform = SegmentationTransform(10)
    assert transform._is_mixed(labels)  # half and half of the labeled pixels
    assert not transform._is_mixed(torch.where(labels == 2, 255, labels))


def test_reduced_labels_start_at_the_second_class_and_ignore_the_first():
    labels = np.array([[0, 1], [2, 255]], dtype=np.uint8)
    example = Example(Image.new("RGB", (2, 2)), Image.fromarray(labels))
    assert SegmentationTransform(2, do_reduce_labels=True).labels_of(example).tolist() == [[255, 0], [1, 255]]
    other = SegmentationTransform(2, do_reduce_labels=True, ignore_index=-100)
    assert other.labels_of(example).tolist() == [[-100, 0], [1, -100]]


def test_ids_outside_the_classes_are_an_error_and_ignored_ones_are_not():
    labels = np.array([[0, 1], [9, 255]], dtype=np.uint8)
    example = Example(Image.new("RGB", (2, 2)), Image.fromarray(labels))
    with pytest.raises(ValueError, match=r"class ids 9 .expected 0 to 4, or 255"):
        SegmentationTransform(2, num_labels=5)(example, generator())
    with pytest.raises(ValueError, match=r"class ids 255 .expected 0 to 9, or -1"):
        SegmentationTransform(2, num_labels=10, ignore_index=-1)(example, generator())
    assert SegmentationTransform(2, num_labels=10).labels_of(example).tolist() == labels.tolist()


def test_annotation_of_another_size_or_none_is_an_error():
    with pytest.raises(ValueError, match=r"\[3, 2\] .expected \[2, 2\]"):
        SegmentationTransform(2)(Example(Image.new("RGB", (2, 2)), Image.new("L", (2, 3))), generator())
    with pytest.raises(ValueError, match=r"no annotation"):
        SegmentationTransform(2)(Example(Image.new("RGB", (2, 2)), None), generator())


def test_generator_decides_everything():
    example, transform = annotated(), SegmentationTransform(32)
    first = [transform(example, generator(seed)) for seed in range(4)]
    torch.manual_seed(3)
    again = [transform(example, generator(seed)) for seed in range(4)]
    assert all(torch.equal(a[name], b[name]) for a, b in zip(first, again, strict=True) for name in a)
    assert not torch.equal(first[0]["pixel_values"], first[1]["pixel_values"])


def scripted(*fractions: float):
    """Return a draw of fixed fractions of its range."""
    numbers = iter(fractions)
    return lambda low, high: low + (high - low) * next(numbers)


def test_distort_changes_brightness_and_contrast_in_the_drawn_order():
    pixels = np.full((2, 2, 3), 100, dtype=np.uint8)
    # brightness +16; contrast first, 1.25; no saturation, no hue
    assert (distort(pixels, scripted(0.0, 0.75, 0.0, 0.0, 0.75, 0.9, 0.9)) == 145).all()
    # the same after the colors
    assert (distort(pixels, scripted(0.0, 0.75, 0.9, 0.0, 0.75, 0.9, 0.9)) == 145).all()
    assert np.array_equal(distort(pixels, scripted(0.9, 0.9, 0.9, 0.9, 0.9)), pixels)


def test_distort_changes_saturation_and_hue():
    red = np.zeros((1, 1, 3), dtype=np.uint8) + np.array([200, 100, 100], dtype=np.uint8)
    pale = distort(red, scripted(0.9, 0.9, 0.9, 0.0, 0.0, 0.9))[0, 0].astype(int)  # half the saturation
    assert abs(pale[0] - 200) <= 1
    assert abs(pale[1] - 150) <= 2
    assert abs(pale[2] - 150) <= 2
    turned = distort(red, scripted(0.9, 0.9, 0.9, 0.9, 0.0, 1.0))[0, 0].astype(int)  # 36 of 360 degrees
    assert turned[0] == 200
    assert abs(turned[1] - 160) <= 4
    assert abs(turned[2] - 100) <= 2


def test_arguments_that_do_not_fit_are_one_error():
    with pytest.raises(ValueError, match=r"\d errors") as error:
        SegmentationTransform(0, num_labels=1, scale=(2.0, 0.5), cat_max_ratio=3, train_interpolation="cubic")
    expected = ["5 errors", "input_size=0", "num_labels=1", "scale=(2.0, 0.5)", "cat_max_ratio=3", "'cubic'"]
    assert all(text in str(error.value) for text in expected), str(error.value)
