"""Random erasing: areas, shapes, fills and errors."""

from __future__ import annotations

import math

import pytest
import torch

from beit_fast.training.transforms import RandomErasing

ONES = torch.full((3, 60, 80), 7.0)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def erased_boxes(erase: RandomErasing, draws: int) -> list[torch.Tensor]:
    """Return the mask of erased pixels, `[60, 80]`, of the images that changed."""
    stream = generator(0)
    masks = [(erase(ONES, stream) != 7).any(0) for _ in range(draws)]
    return [mask for mask in masks if mask.any()]


def test_erasing_changes_the_share_of_images_that_is_asked():
    changed = len(erased_boxes(RandomErasing(0.25, "const"), 2000))
    assert abs(changed - 500) < 5 * math.sqrt(2000 * 0.25 * 0.75)
    assert erased_boxes(RandomErasing(0.0), 20) == []


def test_erased_rectangles_have_areas_and_aspect_ratios_in_range():
    areas, aspects = [], []
    for mask in erased_boxes(RandomErasing(1.0, "const"), 600):
        rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
        height, width = (int(places.max() - places.min() + 1) for places in (rows, columns))
        assert height * width == mask.sum()  # one rectangle
        assert height < 60
        assert width < 80
        areas.append(height * width / 4800)
        aspects.append(height / width)
    assert 0.015 < min(areas) < 0.04
    assert 0.29 < max(areas) < 0.35
    assert min(aspects) > 0.25
    assert max(aspects) < 4
    assert abs(torch.tensor(aspects).log().mean()) < 0.15


def test_modes_fill_with_zeros_one_color_or_noise():
    fills = {}
    for mode in ("const", "rand", "pixel"):
        erased = RandomErasing(1.0, mode, area=(0.3, 0.33))(ONES, generator(3))
        fills[mode] = erased[:, (erased != 7).all(0)]  # [3, pixels]
    assert (fills["const"] == 0).all()
    assert (fills["rand"] == fills["rand"][:, :1]).all()
    assert fills["rand"][:, 0].unique().numel() == 3
    assert abs(fills["pixel"].mean()) < 0.1
    assert abs(fills["pixel"].std() - 1) < 0.1


def test_count_draws_several_rectangles_that_share_the_area():
    masks = erased_boxes(RandomErasing(1.0, "const", 3, area=(0.3, 0.3)), 300)
    shares = torch.tensor([mask.float().mean().item() for mask in masks])
    assert shares.max() < 0.31
    boxes = [mask.any(1).sum() * mask.any(0).sum() for mask in masks]
    several = sum(int(box > mask.sum()) for box, mask in zip(boxes, masks, strict=True))
    assert 100 < several < 250  # two thirds, unless rectangles overlap


def test_generator_decides_the_result_and_the_input_is_not_modified():
    erase = RandomErasing(1.0)
    assert torch.equal(erase(ONES, generator(4)), erase(ONES, generator(4)))
    assert not torch.equal(erase(ONES, generator(4)), erase(ONES, generator(5)))
    assert (ONES == 7).all()


def test_arguments_that_do_not_fit_are_one_error():
    with pytest.raises(ValueError, match=r"\d errors") as error:
        RandomErasing(1.5, "noise", 0, area=(0.5, 2.0))
    expected = ["4 errors", "probability=1.5", "mode='noise'", "'pixel'", "count=0", "area=(0.5, 2.0)"]
    assert all(text in str(error.value) for text in expected), str(error.value)
