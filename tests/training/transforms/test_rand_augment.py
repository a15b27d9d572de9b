"""RandAugment: operations of timm bit by bit, policies, and how often each operation is drawn."""

from __future__ import annotations

import collections
import importlib.util
import math
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

from beit_fast.training.transforms import RandAugment, rand_augment
from beit_fast.training.transforms.augment_ops import OPERATIONS, Placement

PIXELS = np.random.default_rng(0).integers(9, 230, (20, 28, 3), dtype=np.uint8)
IMAGE = Image.fromarray(PIXELS)
BICUBIC = int(Image.Resampling.BICUBIC)
POLICY = "rand-m9-mstd0.5-inc1"


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def timm_policies() -> ModuleType:
    """timm's file of policies alone, which does not need torchvision."""
    found = importlib.util.find_spec("timm")
    if found is None or found.origin is None:
        pytest.skip("timm is not installed")
    file = Path(found.origin).parent / "data" / "auto_augment.py"
    spec = importlib.util.spec_from_file_location("timm_auto_augment", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", sorted(OPERATIONS))
def test_operation_is_that_of_timm_at_all_levels_and_signs(name, timm_policies, monkeypatch):
    changed = 0
    for level in (0.0, 0.4, 3.0, 5.0, 9.3, 10.0):
        for sign in (0.25, 0.75):  # above a half, timm negates
            monkeypatch.setattr(timm_policies.random, "random", lambda sign=sign: sign)
            of_level = timm_policies.LEVEL_TO_ARG[name]
            arguments = () if of_level is None else of_level(level, {})
            if arguments == (0,) and name.startswith("Posterize"):
                continue  # Pillow 13 refuses 0 bits
            expected = timm_policies.NAME_TO_OP[name](IMAGE, *arguments, resample=BICUBIC, fillcolor=(1, 2, 3))
            result = OPERATIONS[name](IMAGE, level, Placement(BICUBIC, (1, 2, 3)), lambda low, high, sign=sign: sign)
            assert np.array_equal(np.asarray(result), np.asarray(expected)), (level, sign)
            changed += not np.array_equal(np.asarray(result), PIXELS)
    assert changed > 0


@pytest.mark.parametrize(("name", "level"), [("Posterize", 0.0), ("PosterizeIncreasing", 10.0)])
def test_posterize_to_no_bits_is_black(name, level):
    result = OPERATIONS[name](IMAGE, level, Placement(BICUBIC, (1, 2, 3)), lambda low, high: low)
    assert not np.asarray(result).any()


@pytest.mark.parametrize("policy", ["rand", POLICY, "rand-m5-n3-p0.3-mmax8", "rand-inc1-tweights", "rand-t3a"])
def test_policy_has_the_operations_and_numbers_of_timm(policy, timm_policies):
    ours, theirs = RandAugment(policy), timm_policies.rand_augment_transform(policy, {})
    assert sorted(ours.names) == sorted(op.name for op in theirs.ops)
    assert ours.count == theirs.num_layers
    first = theirs.ops[0]
    assert (ours.magnitude, ours.probability, ours.deviation) == (first.magnitude, first.prob, first.magnitude_std)
    assert ours.most == (first.magnitude_max or 10)
    if theirs.choice_weights is not None:
        shares = dict(zip((op.name for op in theirs.ops), theirs.choice_weights, strict=True))
        assert {n: shares[n] for n in ours.names} == pytest.approx(
            dict(zip(ours.names, (ours.weights / ours.weights.sum()).tolist(), strict=True))
        )


def recorded(monkeypatch, policy: str, draws: int) -> list[tuple[str, float]]:
    """Call a policy and return the name and level of each operation that was applied."""
    calls = []

    def record(name):
        return lambda image, level, placement, draw: (calls.append((name, level)), image)[1]

    monkeypatch.setattr(rand_augment, "OPERATIONS", {name: record(name) for name in OPERATIONS})
    augment, stream = RandAugment(policy), generator(0)
    for _ in range(draws):
        augment(IMAGE, stream)
    return calls


def test_operations_are_uniform_and_applied_half_of_the_time(monkeypatch):
    calls = recorded(monkeypatch, POLICY, 6000)
    counts = collections.Counter(name for name, _ in calls)
    assert len(counts) == 15
    assert abs(len(calls) - 6000) < 5 * math.sqrt(12000 / 4)
    assert all(abs(count - 400) < 5 * math.sqrt(400) for count in counts.values())


def test_levels_are_normal_around_the_magnitude_and_clipped(monkeypatch):
    levels = np.array([level for _, level in recorded(monkeypatch, POLICY, 4000)])
    assert levels.max() == 10
    assert abs(np.median(levels) - 9) < 0.05
    assert abs((levels < 8.5).mean() - 0.1587) < 0.03
    assert abs((levels == 10).mean() - 0.0228) < 0.012


def test_levels_of_a_large_deviation_are_uniform(monkeypatch):
    levels = np.array([level for _, level in recorded(monkeypatch, "rand-m8-mstd101", 4000)])
    assert np.allclose(np.quantile(levels, [0.01, 0.25, 0.5, 0.75, 0.99]), [0.08, 2, 4, 6, 7.92], atol=0.3)


def test_weighted_operations_are_drawn_once_by_their_weights(monkeypatch):
    calls = recorded(monkeypatch, "rand-p1-n1-t3aw", 4000)
    counts = collections.Counter(name for name, _ in calls)
    assert abs(counts["GaussianBlur"] / 4000 - 6 / 33) < 0.03
    assert abs(counts["Invert"] / 4000 - 1 / 33) < 0.015
    pairs = [name for name, _ in recorded(monkeypatch, "rand-p1-n2-t3aw", 500)]
    assert all(first != second for first, second in zip(pairs[::2], pairs[1::2], strict=True))


def test_generator_decides_the_result_and_the_image_is_not_modified():
    augment = RandAugment(POLICY)
    results = [np.asarray(augment(IMAGE, generator(seed))) for seed in range(8)]
    torch.manual_seed(1)
    assert all(np.array_equal(result, np.asarray(augment(IMAGE, generator(s)))) for s, result in enumerate(results))
    assert len({result.tobytes() for result in results}) > 4
    assert np.array_equal(np.asarray(IMAGE), PIXELS)


def test_fill_is_the_color_outside_the_image(monkeypatch):
    monkeypatch.setattr(rand_augment, "_FIXED", ("TranslateXRel",))
    augment = RandAugment("rand-m10-n1-p1", fill=(10, 20, 30), interpolation="nearest")
    pixels = np.asarray(augment(IMAGE, generator(0)))
    columns = (pixels == (10, 20, 30)).all((0, 2))
    assert abs(int(columns.sum()) - round(0.45 * 28)) <= 1


@pytest.mark.parametrize(
    ("policy", "kind", "expected"),
    [
        ("original-mstd0.5", ValueError, ["original-mstd0.5", "rand"]),
        ("rand-m-x9", ValueError, ["2 errors", "'m'", "'x9'"]),
        ("rand-m9.5", ValueError, ["'m9.5'", "integer"]),
        ("rand-p2-n0", ValueError, ["2 errors", "'p2'", "'n0'"]),
        ("rand-tbest", ValueError, ["'tbest'", "'weights'"]),
        ("rand-n16-tweights", ValueError, ["n16", "at most 15"]),
        (9, TypeError, ["policy=9"]),
    ],
)
def test_policy_that_does_not_fit_is_one_error(policy, kind, expected):
    with pytest.raises(kind) as error:
        RandAugment(policy)
    assert all(text in str(error.value) for text in expected), str(error.value)


def test_interpolation_that_does_not_exist_is_an_error():
    with pytest.raises(ValueError, match=r"interpolation='cubic'.*'random'"):
        RandAugment(interpolation="cubic")
