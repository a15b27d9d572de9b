"""Resizing of one image by torch's kernel, against Pillow."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from beit_fast.image_processing import resampling
from beit_fast.image_processing.options import RESAMPLING_NAMES
from beit_fast.image_processing.resampling import resize_pixels

from ..support.pixels import assert_near_pillow

SIZES = [(375, 500), (500, 375), (250, 300), (372, 297), (90, 120), (1, 1), (7, 400), (224, 112)]


def photograph(height: int, width: int) -> np.ndarray:
    """Return uint8 `[height, width, 3]` with coarse and fine structure."""
    random = np.random.default_rng(height)
    pixels = np.zeros((height, width, 3), np.float32)
    for cells in (4, 40, 200):
        noise = Image.fromarray(random.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        pixels += np.asarray(noise.resize((width, height), Image.Resampling.BICUBIC), np.float32) - 128
    return np.clip(pixels + 128, 0, 255).astype(np.uint8)


@pytest.mark.parametrize("target", [(224, 224), (112, 112), (24, 60), (1, 1), (1, 5)])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", RESAMPLING_NAMES)
def test_resize_pixels_is_near_pillow(name, size, target):
    pixels = photograph(*size)
    found = resize_pixels(pixels, target, RESAMPLING_NAMES.index(name))
    expected = Image.fromarray(pixels).resize(target[::-1], Image.Resampling(RESAMPLING_NAMES.index(name)))
    assert found.dtype == np.uint8
    assert_near_pillow(torch.from_numpy(found.copy()) / 255, torch.from_numpy(np.array(expected)) / 255)


def test_resize_pixels_of_a_flipped_and_of_a_read_only_view_copies_without_a_warning():
    pixels = photograph(60, 80)
    pixels.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = resize_pixels(pixels[:, ::-1], (24, 24), 3)
        assert np.array_equal(found, resize_pixels(np.ascontiguousarray(pixels[:, ::-1]), (24, 24), 3))
        resize_pixels(pixels, (24, 24), 3)


def test_resize_pixels_without_lanczos_in_torch_is_pillow(monkeypatch):
    monkeypatch.setattr(resampling, "_interpolate_modes", lambda: frozenset({2, 3}))
    pixels = photograph(60, 80)
    found = resize_pixels(pixels, (24, 24), RESAMPLING_NAMES.index("lanczos"))
    assert np.array_equal(found, np.asarray(Image.fromarray(pixels).resize((24, 24), Image.Resampling.LANCZOS)))
