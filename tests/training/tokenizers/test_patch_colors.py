"""The tokenizer that is trained on the spot: clustering, decoding, errors."""

from __future__ import annotations

import pytest
import torch

from beit_fast.training.tokenizers import PatchColorTokenizer, kmeans

from .build import patch_colors, random_pixels


def test_fit_finds_the_pictures_that_images_are_made_of():
    pictures = random_pixels(6, 3, 2, 2)
    ids = torch.randint(0, 6, (10, 4, 5), generator=torch.Generator().manual_seed(0))
    maker = PatchColorTokenizer(6, patch_size=8, cells=2)
    maker.codebook.copy_(pictures.flatten(1))
    images = maker.decode(ids)
    assert images.shape == (10, 3, 32, 40)
    assert torch.equal(images[3, :, 8:12, 16:20], pictures[ids[3, 1, 2], :, :1, :1].expand(3, 4, 4))
    fitted = PatchColorTokenizer.fit(images, 6, patch_size=8, cells=2)
    torch.testing.assert_close(fitted.decode(fitted(images)), images)
    assert torch.equal(maker(images), ids)


def test_fit_of_the_same_images_and_seed_gives_the_same_bits():
    images = random_pixels(6, 3, 32, 32)
    options = {"vocab_size": 12, "patch_size": 8, "cells": 2}
    once = PatchColorTokenizer.fit(images, seed=1, **options)
    torch.rand(7)  # the global generator has no effect
    assert torch.equal(once.codebook, PatchColorTokenizer.fit(images, seed=1, **options).codebook)
    assert torch.equal(once.codebook, PatchColorTokenizer.fit(iter(images.split(2)), seed=1, **options).codebook)
    assert not torch.equal(once.codebook, PatchColorTokenizer.fit(images, seed=2, **options).codebook)


def test_fit_leaves_the_global_generator_alone():
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    PatchColorTokenizer.fit(random_pixels(2, 3, 32, 32), 4, patch_size=8)
    assert torch.equal(torch.rand(4), expected)


def test_fit_draws_patches_evenly_if_there_are_more_than_max_patches(monkeypatch):
    seen = []
    monkeypatch.setattr(
        "beit_fast.training.tokenizers.patch_colors.cluster", lambda kept, *rest: seen.append(kept) or kept[:2]
    )
    batches = [torch.full((1, 1, 16, 16), number / 100) for number in range(100)]
    for seed in range(20):
        PatchColorTokenizer.fit(iter(batches), 2, patch_size=8, cells=1, max_patches=50, seed=seed)
    assert {len(kept) for kept in seen} == {50}
    # 1000 draws of numbers uniform in 0..0.99: the mean is within five standard errors of 0.289 / sqrt(1000).
    assert abs(torch.cat(seen).mean().item() - 0.495) < 5 * 0.289 / 1000**0.5


def test_fit_reads_uint8_and_one_channel():
    images = torch.randint(0, 256, (3, 1, 32, 32), dtype=torch.uint8)
    tokenizer = PatchColorTokenizer.fit(images, 4, patch_size=16)
    assert tokenizer.num_channels == 1
    assert tokenizer.decode(tokenizer(images)).shape == (3, 1, 32, 32)


def test_decode_brings_images_nearer_than_one_color():
    images = random_pixels(8, 3, 64, 64).cumsum(3) / 64
    tokenizer = PatchColorTokenizer.fit(images, 64, patch_size=8, cells=2)
    mean = images.mean((0, 2, 3), keepdim=True)
    assert (tokenizer.decode(tokenizer(images)) - images).square().mean() < 0.5 * (mean - images).square().mean()


@pytest.mark.parametrize(
    ("images", "options", "kind", "message"),
    [
        ([], {}, ValueError, "there are no images"),
        ([3], {}, TypeError, "pixels are of type int"),
        (torch.zeros(2, 3, 32, 32), {}, ValueError, r"only 1 distinct patches \(expected at least 4"),
        (torch.rand(2, 3, 32, 30), {}, ValueError, "32x30 pixels do not divide"),
        (torch.rand(2, 3, 32, 32), {"max_patches": 3}, ValueError, "max_patches=3 .*at least vocab_size=4"),
        (torch.rand(2, 3, 32, 32), {"iterations": 0}, ValueError, "iterations=0"),
        ([torch.rand(2, 3, 32, 32), torch.rand(2, 1, 32, 32)], {}, ValueError, r"\[batch, 3, height, width\]"),
    ],
    ids=["none", "number", "equal", "grid", "max", "iterations", "channels"],
)
def test_fit_of_images_that_do_not_fit_raises_one_error(images, options, kind, message):
    with pytest.raises(kind, match=message):
        PatchColorTokenizer.fit(images, 4, patch_size=8, **options)


@pytest.mark.parametrize(
    ("ids", "kind", "message"),
    [
        ([1], TypeError, "ids are of type list"),
        (torch.zeros(1, 2, 2), ValueError, "expected .* of integers"),
        (torch.zeros(2, 2, dtype=torch.int64), ValueError, r"\[2, 2\] torch.int64 \(expected \[batch, rows, columns\]"),
        (torch.full((1, 2, 2), 48), ValueError, r"from 48 to 48 \(expected 0 to 47\)"),
        (torch.full((1, 2, 2), -1), ValueError, "from -1 to -1"),
    ],
    ids=["list", "float", "flat", "large", "negative"],
)
def test_decode_of_ids_that_do_not_fit_raises_one_error(ids, kind, message):
    with pytest.raises(kind, match=message):
        patch_colors().decode(ids)


def test_nearest_center_in_chunks_equals_the_distances_written_out(monkeypatch):
    points, centers = random_pixels(50, 4).double(), random_pixels(7, 4).double()
    monkeypatch.setattr(kmeans, "_ROWS_AT_ONCE", 21)  # chunks of 3 points
    index, distance = kmeans.nearest_center(points, centers)
    written_out = (points[:, None] - centers).square().sum(-1)
    assert torch.equal(index, written_out.argmin(1))
    torch.testing.assert_close(distance, written_out.amin(1))


def test_cluster_stops_at_means_of_the_nearest_points():
    points = random_pixels(200, 3)
    centers = kmeans.cluster(points, 8, iterations=200, seed=0)
    index, _ = kmeans.nearest_center(points.double(), centers)
    means = torch.stack([points.double()[index == number].mean(0) for number in range(8)])
    torch.testing.assert_close(centers, means)


def test_cluster_moves_a_center_that_lost_its_points():
    """Plain Lloyd's algorithm from the same start leaves one of the five centers without points."""
    flat = [5, 0, 3, 4, 2, 4, 1, 0, 2, 3, 2, 3, 5, 2, 1, 1, 5, 5, 5, 3, 0, 0, 2, 3, 5, 2, 1, 3]
    points = torch.tensor(flat, dtype=torch.float64).view(14, 2)
    centers = kmeans.cluster(points, 5, iterations=20, seed=0)
    index, _ = kmeans.nearest_center(points, centers)
    assert torch.bincount(index, minlength=5).min() > 0
