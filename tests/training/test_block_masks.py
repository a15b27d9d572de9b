"""Blockwise masks against a plain transcription of algorithm 1, with derived bounds."""

from __future__ import annotations

import math
import pickle
import random

import numpy as np
import pytest
import torch
from scipy import stats
from torch.utils.data import DataLoader, Dataset

from beit_fast.training import BlockMaskGenerator

SAMPLES = 1500
FALSE_ALARM = 1e-6
"""Probability that a comparison of two samples of one distribution fails; the seeds are fixed besides."""


def plain_mask(draw: random.Random, attempts: float, side: int = 14, masked: int = 75, least: int = 16) -> np.ndarray:
    """Algorithm 1 with unilm's rules, cell by cell; `attempts` to place a block, then the mask is complete."""
    mask = np.zeros((side, side), dtype=bool)
    failed = 0
    while mask.sum() < masked and failed < attempts:
        limit = masked - int(mask.sum())
        area = draw.uniform(least, limit)
        aspect = math.exp(draw.uniform(math.log(0.3), math.log(1 / 0.3)))
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        failed += 1
        if height >= side or width >= side:
            continue
        top, left = draw.randint(0, side - height), draw.randint(0, side - width)
        cells = [(i, j) for i in range(top, top + height) for j in range(left, left + width) if not mask[i, j]]
        if 0 < len(cells) <= limit:
            failed = 0
            for cell in cells:
                mask[cell] = True
    return mask


@pytest.fixture(scope="module", params=[True, False], ids=["exact", "ten attempts"])
def samples(request: pytest.FixtureRequest) -> tuple[np.ndarray, np.ndarray]:
    draw = random.Random(3)
    plain = np.stack([plain_mask(draw, math.inf if request.param else 10) for _ in range(SAMPLES)])
    return BlockMaskGenerator(exact=request.param, seed=5)(SAMPLES).numpy(), plain


def uniform_masks() -> np.ndarray:
    """Masks of 75 patches without blocks, which every comparison but the counts has to reject."""
    order = np.random.default_rng(0).random((SAMPLES, 196)).argsort(1)
    return (order < 75).reshape(SAMPLES, 14, 14)


def largest_frequency_z(a: np.ndarray, b: np.ndarray) -> float:
    """Largest two-sample z of the frequencies of the patches."""
    pooled = (a.mean(0) + b.mean(0)) / 2
    return float((np.abs(a.mean(0) - b.mean(0)) / np.sqrt(2 * pooled * (1 - pooled) / SAMPLES)).max())


def chi_square_p(a: np.ndarray, b: np.ndarray) -> float:
    """p of a two-sample chi-square test of integers; the rare values at each end are one cell."""
    both = np.concatenate([a, b])
    low, high = np.sort(both)[[20, -21]]
    table = [np.bincount(np.clip(x, low, high) - low, minlength=high - low + 1) for x in (a, b)]
    cells = np.array(table)[:, np.sum(table, 0) > 0]
    return 1.0 if cells.shape[1] == 1 else float(stats.chi2_contingency(cells).pvalue)


def borders(masks: np.ndarray) -> np.ndarray:
    """Neighbors of which one is masked, in each mask: few for large blocks."""
    return (masks[:, 1:] != masks[:, :-1]).sum((1, 2)) + (masks[:, :, 1:] != masks[:, :, :-1]).sum((1, 2))


def overlap_of_halves(masks: np.ndarray) -> np.ndarray:
    """Masked patches of the upper left quarter, in each mask."""
    return masks[:, :7, :7].sum((1, 2))


def test_masks_frequency_of_each_patch_is_that_of_the_algorithm(samples):
    bound = stats.norm.isf(FALSE_ALARM / 2 / 196)  # for the largest of 196 frequencies
    assert largest_frequency_z(*samples) < bound


def test_masks_counts_are_those_of_the_algorithm(samples):
    ours, plain = (masks.sum((1, 2)) for masks in samples)
    assert chi_square_p(ours, plain) > FALSE_ALARM


@pytest.mark.parametrize("statistic", [borders, overlap_of_halves])
def test_masks_shapes_are_those_of_the_algorithm(samples, statistic):
    ours, plain = map(statistic, samples)
    assert stats.ks_2samp(ours, plain).pvalue > FALSE_ALARM


def test_comparisons_reject_masks_without_blocks(samples):
    _, plain = samples
    assert stats.ks_2samp(borders(uniform_masks()), borders(plain)).pvalue < FALSE_ALARM
    assert stats.ks_2samp(overlap_of_halves(uniform_masks()), overlap_of_halves(plain)).pvalue < FALSE_ALARM
    assert largest_frequency_z(uniform_masks(), plain) > stats.norm.isf(FALSE_ALARM / 2 / 196)


def test_blocks_sizes_are_those_of_the_algorithm():
    count = 20_000
    blocks = BlockMaskGenerator(seed=1)._blocks(np.full(count, 75), torch.Generator().manual_seed(0))
    sizes = blocks.any(2).sum(1) * 14 + blocks.any(1).sum(1)
    draw, plain = random.Random(0), []
    for _ in range(count):
        area, aspect = draw.uniform(16, 75), math.exp(draw.uniform(math.log(0.3), -math.log(0.3)))
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        plain.append(height * 14 + width if height < 14 and width < 14 else 0)
    cells = np.array([np.bincount(x, minlength=196) for x in (sizes, np.array(plain))])
    cells = cells[:, cells.sum(0) >= 20]  # expected counts of at least 10
    assert stats.chi2_contingency(cells).pvalue > FALSE_ALARM
    assert stats.chi2_contingency(np.stack([cells[0], cells[0][::-1]]) + 1).pvalue < FALSE_ALARM


def test_block_is_a_rectangle_of_new_and_old_patches():
    blocks = BlockMaskGenerator(seed=0)._blocks(np.full(100, 75), torch.Generator().manual_seed(1))
    rows, columns = blocks.any(2), blocks.any(1)
    assert np.array_equal(blocks, rows[:, :, None] & columns[:, None, :])
    assert all(np.flatnonzero(np.diff(line.astype(int), prepend=0, append=0)).size in (0, 2) for line in rows)


@pytest.mark.parametrize(("size", "count"), [(14, 1), (14, 75), (14, 196), ((9, 20), 70), ([20, 9], 70), (3, 9)])
def test_exact_masks_have_exactly_the_given_count(size, count):
    masks = BlockMaskGenerator(size, count, min_num_patches=min(count, 4), seed=0)(8)
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    assert masks.dtype == torch.bool
    assert masks.shape == (8, height, width)
    assert masks.sum((1, 2)).tolist() == [count] * 8


def test_masks_of_ten_attempts_have_at_most_the_given_count():
    counts = BlockMaskGenerator(exact=False, seed=0)(64).sum((1, 2))
    assert counts.max() == 75
    assert counts.min() < 75


def test_shapes_of_one_mask_and_of_flat_masks():
    assert BlockMaskGenerator((4, 6), 6, 2)().shape == (4, 6)
    assert BlockMaskGenerator((4, 6), 6, 2, flat=True)().shape == (24,)
    assert BlockMaskGenerator((4, 6), 6, 2, flat=True)(3).shape == (3, 24)
    assert BlockMaskGenerator((4, 6), 6, 2)(0).shape == (0, 4, 6)
    stacked = BlockMaskGenerator((4, 6), 6, 2, seed=1)(2)
    assert torch.equal(BlockMaskGenerator((4, 6), 6, 2, seed=1, flat=True)(2), stacked.flatten(1))


def test_seed_decides_the_masks_and_global_state_does_not():
    first = BlockMaskGenerator(seed=7)
    np.random.seed(0)
    torch.manual_seed(0)
    before = first(4)
    torch.manual_seed(1)
    assert torch.equal(BlockMaskGenerator(seed=7)(4), before)
    assert not torch.equal(first(4), before)
    assert not torch.equal(BlockMaskGenerator(seed=8)(4), before)


def test_without_a_seed_torch_decides_the_masks_and_numpy_keeps_its_state():
    state = np.random.get_state()[1].copy()
    torch.manual_seed(3)
    masks = BlockMaskGenerator()(4)
    torch.manual_seed(3)
    assert torch.equal(BlockMaskGenerator()(4), masks)
    assert np.array_equal(np.random.get_state()[1], state)


def test_generator_of_a_call_decides_its_masks():
    masks = [BlockMaskGenerator(seed=seed)(2, torch.Generator().manual_seed(4)) for seed in (1, 2)]
    assert torch.equal(*masks)


def test_pickled_generator_goes_through_the_same_masks():
    original = BlockMaskGenerator(seed=0)
    original(3)
    copy = pickle.loads(pickle.dumps(original))
    assert torch.equal(copy(5), original(5))


class Masks(Dataset):
    def __init__(self, generator: BlockMaskGenerator) -> None:
        self.generator = generator

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.generator()


@pytest.mark.parametrize("seed", [None, 0])
def test_workers_of_a_loader_draw_different_and_reproducible_masks(seed):
    def epochs() -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        dataset = Masks(BlockMaskGenerator(seed=seed))
        loader = DataLoader(dataset, 1, num_workers=2, multiprocessing_context="fork", generator=generator)
        return [mask for _ in range(2) for mask in loader]

    masks = epochs()
    assert len({tuple(mask.flatten().tolist()) for mask in masks}) == 8
    assert all(torch.equal(a, b) for a, b in zip(masks, epochs(), strict=True))


def test_generator_is_pickled_into_a_spawned_worker():
    loader = DataLoader(Masks(BlockMaskGenerator(seed=0)), 4, num_workers=1, multiprocessing_context="spawn")
    (masks,) = loader
    assert masks.sum((1, 2)).tolist() == [75] * 4
    assert not torch.equal(masks[0], masks[1])


@pytest.mark.parametrize(
    ("arguments", "kind", "expected"),
    [
        ({"num_masking_patches": 197}, ValueError, ["num_masking_patches=197", "at most 196", "14x14"]),
        ({"input_size": (2, 4), "num_masking_patches": 9, "min_num_patches": 1}, ValueError, ["at most 8"]),
        ({"num_masking_patches": 10}, ValueError, ["min_num_patches=16", "max_num_patches=10"]),
        ({"max_num_patches": 15}, ValueError, ["min_num_patches=16", "max_num_patches=15"]),
        ({"input_size": 4, "num_masking_patches": 16}, ValueError, ["blocks of 16 patches", "do not fit", "4x4"]),
        ({"min_aspect": 2.0, "max_aspect": 1.0}, ValueError, ["min_aspect=2", "max_aspect=1"]),
        (
            {"min_aspect": 0, "num_masking_patches": 0},
            ValueError,
            ["2 errors", "min_aspect=0", "num_masking_patches=0"],
        ),
        ({"min_aspect": 100.0, "max_aspect": 200.0}, ValueError, ["do not fit"]),
        ({"input_size": 14.0}, TypeError, ["input_size=14.0", "an int or a (height, width) pair"]),
        ({"input_size": (14, 14, 14)}, ValueError, ["input_size=(14, 14, 14)"]),
        ({"input_size": 1}, ValueError, ["at least 2"]),
        ({"num_masking_patches": 0.4}, TypeError, ["num_masking_patches=0.4"]),
        ({"max_aspect": "3"}, TypeError, ["max_aspect='3'"]),
        ({"seed": -1}, ValueError, ["seed=-1"]),
        ({"seed": "a"}, TypeError, ["seed='a'"]),
    ],
)
def test_masks_that_do_not_fit_are_one_error(arguments, kind, expected):
    with pytest.raises(kind) as error:
        BlockMaskGenerator(**arguments)
    assert all(text in str(error.value) for text in expected), str(error.value)


@pytest.mark.parametrize("batch_size", [-1, 1.5, True])
def test_batch_size_that_does_not_fit_is_an_error(batch_size):
    with pytest.raises(ValueError, match="batch_size="):
        BlockMaskGenerator()(batch_size)


def test_exact_mask_that_blocks_cannot_complete_is_an_error(monkeypatch):
    monkeypatch.setattr("beit_fast.training.block_masks._MOST_ATTEMPTS", 50)
    generator = BlockMaskGenerator(14, 17, min_num_patches=16, max_num_patches=16, min_aspect=1.0, max_aspect=1.0)
    generator.min_num_patches = generator.max_num_patches = 0  # blocks without patches
    with pytest.raises(ValueError, match=r"the last 17 of its patches after 50 attempts.*exact=False"):
        generator()


def test_arguments_may_be_numpy_integers_and_repr_names_them():
    generator = BlockMaskGenerator(np.int64(6), np.int64(9), np.int64(4))
    assert generator().sum() == 9
    assert repr(generator).startswith("BlockMaskGenerator(6x6, 9 masked, blocks of 4 to 9, aspect 0.300 to 3.333)")
