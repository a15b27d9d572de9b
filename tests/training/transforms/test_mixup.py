"""Mixup and CutMix: distributions, exact mixing, targets and errors."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from beit_fast.training.transforms import Mixup, soft_targets

LABELS = torch.tensor([0, 1, 2, 3])


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def constant_images(batch: int = 4, size: int = 40) -> torch.Tensor:
    """Images of one value each: the index."""
    return torch.arange(batch).float()[:, None, None, None].expand(batch, 3, size, size).contiguous()


@pytest.mark.parametrize("mode", ["batch", "elem", "pair"])
@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_targets_have_the_share_of_pixels_of_each_image(mode, mixup, cutmix):
    mix = Mixup(4, mixup, cutmix, mode=mode, smoothing=0.0)
    pixels = constant_images()
    for seed in range(30):
        mixed, targets = mix(pixels, LABELS, generator(seed))
        means = mixed.mean((1, 2, 3))
        assert torch.allclose(means, (targets * torch.arange(4.0)).sum(1), atol=1e-5)
        assert torch.allclose(targets.sum(1), torch.ones(4))
        partners = targets.clone()
        partners[torch.arange(4), LABELS] = 0
        assert all(partners[i].nonzero().flatten().tolist() in ([3 - i], []) for i in range(4))


def test_cutmix_replaces_one_rectangle_and_leaves_other_pixels():
    pixels = torch.randn(2, 3, 30, 50)
    cut = 0
    for seed in range(20):
        mixed, _ = Mixup(2, 0.0, 1.0)(pixels, LABELS[:2], generator(seed))
        own, partner = (mixed[0] == pixels[0]).all(0), (mixed[0] == pixels[1]).all(0)
        assert (own ^ partner).all()
        if partner.any():
            rows, columns = partner.any(1).nonzero(), partner.any(0).nonzero()
            assert (rows.max() - rows.min() + 1) * (columns.max() - columns.min() + 1) == partner.sum()
            cut += 1
    assert cut > 10


def shares(mode: str, mixup: float, cutmix: float, draws: int, **options: float) -> np.ndarray:
    """Return the share of the own class of each image, `[draws, 4]`."""
    mix = Mixup(4, mixup, cutmix, mode=mode, smoothing=0.0, **options)
    pixels, stream = constant_images(size=16), generator(0)
    return np.stack([mix(pixels, LABELS, stream)[1][range(4), LABELS].numpy() for _ in range(draws)])


def test_batch_has_one_share_elements_have_their_own_and_pairs_have_theirs():
    one, own, paired = (shares(mode, 0.8, 0.0, 20) for mode in ("batch", "elem", "pair"))
    assert np.allclose(one, one[:, :1])
    assert (np.abs(own[:, 0] - own[:, 3]) > 1e-4).mean() > 0.9
    assert np.allclose(paired[:, :2], paired[:, :1:-1])
    assert (np.abs(paired[:, 0] - paired[:, 1]) > 1e-4).mean() > 0.9


def test_shares_of_mixup_follow_the_beta_distribution():
    drawn = shares("elem", 0.8, 0.0, 1500).ravel()
    expected = np.random.default_rng(1).beta(0.8, 0.8, 100_000)
    levels = np.linspace(0.05, 0.95, 10)
    assert np.abs(np.quantile(drawn, levels) - np.quantile(expected, levels)).max() < 0.025


def test_probability_and_switch_decide_how_often_images_are_mixed():
    unmixed = (shares("elem", 0.8, 0.0, 800, probability=0.3) == 1).mean()
    assert abs(unmixed - 0.7) < 5 * math.sqrt(0.21 / 3200)
    mix = Mixup(4, 0.8, 1.0, switch_probability=0.2)
    pixels, stream = torch.randn(4, 1, 16, 16), generator(0)
    blended = sum(bool((mix(pixels, LABELS, stream)[0] != pixels).all()) for _ in range(400))
    assert abs(blended - 320) < 5 * math.sqrt(400 * 0.16)


def test_smoothing_is_that_of_cross_entropy():
    logits = torch.randn(4, 6)
    loss = F.cross_entropy(logits, soft_targets(LABELS, 6, 0.1))
    torch.testing.assert_close(loss, F.cross_entropy(logits, LABELS, label_smoothing=0.1))
    _, targets = Mixup(6, 0.0, 0.0, smoothing=0.1)(constant_images(), LABELS, generator(0))
    assert torch.equal(targets, soft_targets(LABELS, 6, 0.1))


def test_generator_decides_the_result_and_the_input_is_not_modified():
    pixels = torch.randn(5, 3, 8, 8)  # an odd batch: the middle image is its own partner
    before, labels = pixels.clone(), torch.tensor([0, 1, 2, 1, 0], dtype=torch.uint8)
    for mode in ("batch", "elem", "pair"):
        first, second = (Mixup(3, mode=mode)(pixels, labels, generator(7)) for _ in range(2))
        assert all(map(torch.equal, first, second))
    assert torch.equal(pixels, before)


def test_labels_that_do_not_fit_are_an_error():
    mix, pixels = Mixup(4), constant_images()
    with pytest.raises(ValueError, match=r"contain 4, 9 .expected class ids .B. of an integer dtype, from 0 to 3"):
        mix(pixels, torch.tensor([4, 1, 9, 0]), generator(0))
    with pytest.raises(ValueError, match=r"float32 \[4\]"):
        mix(pixels, torch.zeros(4), generator(0))
    with pytest.raises(ValueError, match=r"3 labels for 4 images"):
        mix(pixels, LABELS[:3], generator(0))


def test_arguments_that_do_not_fit_are_one_error():
    with pytest.raises(ValueError, match=r"\d errors") as error:
        Mixup(1, -0.5, math.nan, probability=2, mode="image", smoothing=1.5)
    expected = ["6 errors", "num_classes=1", "mixup=-0.5", "cutmix=nan", "probability=2", "mode='image'", "smoothing"]
    assert all(text in str(error.value) for text in expected), str(error.value)
