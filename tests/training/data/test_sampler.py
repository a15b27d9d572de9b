"""The order of images: seeds, epochs, processes, positions, groups."""

from __future__ import annotations

import pytest

from beit_fast.training.data import EpochSampler, EvaluationSampler
from beit_fast.training.data.sampler import WINDOW


def batches(sampler: EpochSampler, epoch: int = 0, batch: int = 0) -> list[list[int]]:
    sampler.set_position(epoch, batch)
    keys = list(sampler)
    assert {key[0] for part in keys for key in part} <= {epoch}
    return [[index for _, index in part] for part in keys]


def flat(parts: list[list[int]]) -> list[int]:
    return [index for part in parts for index in part]


@pytest.mark.parametrize("groups", [None, [7, 3, 5, 1, 4, 10, 6, 2, 2]])
def test_epoch_sampler_yields_each_index_once_and_drops_the_last_batch(groups):
    sampler = EpochSampler(40, 6, seed=1, groups=groups)
    parts = batches(sampler)
    assert [len(part) for part in parts] == [6] * 6
    assert sampler.steps_per_epoch == len(parts) == 6
    assert len(set(flat(parts))) == 36
    assert set(flat(parts)) < set(range(40))
    assert flat(parts) != sorted(flat(parts))


@pytest.mark.parametrize("groups", [None, [10] * 4])
def test_epoch_sampler_order_is_a_function_of_seed_and_epoch(groups):
    make = lambda seed: EpochSampler(40, 4, seed=seed, groups=groups)  # noqa: E731
    assert batches(make(1), epoch=2) == batches(make(1), epoch=2)
    assert batches(make(1), epoch=2) != batches(make(1), epoch=3)
    assert batches(make(1), epoch=2) != batches(make(2), epoch=2)


@pytest.mark.parametrize("groups", [None, [9, 1, 20, 10]])
def test_epoch_sampler_of_two_processes_has_the_batches_of_one(groups):
    whole = batches(EpochSampler(40, 8, seed=3, groups=groups), epoch=1)
    halves = [
        batches(EpochSampler(40, 4, seed=3, groups=groups, num_processes=2, process_index=index), epoch=1)
        for index in range(2)
    ]
    assert [first + second for first, second in zip(*halves, strict=True)] == whole


@pytest.mark.parametrize("groups", [None, [3] * 13 + [1]])
@pytest.mark.parametrize("shuffle", [False, True])
def test_epoch_sampler_position_continues_the_epoch(groups, shuffle):
    sampler = EpochSampler(40, 4, seed=3, groups=groups, shuffle=shuffle)
    whole = batches(sampler, epoch=5)
    for batch in (0, 1, 7, 10):
        assert batches(sampler, epoch=5, batch=batch) == whole[batch:]
        assert len(sampler) == 10 - batch
    if not shuffle:
        assert flat(whole) == list(range(40))


def test_epoch_sampler_with_groups_reads_few_groups_at_a_time():
    sampler = EpochSampler(400, 10, seed=0, groups=[10] * 40)
    indices = flat(batches(sampler))
    for start in range(0, 400, 10 * WINDOW):
        window = indices[start : start + 10 * WINDOW]
        assert len({index // 10 for index in window}) == WINDOW
        assert [index // 10 for index in window] != sorted(index // 10 for index in window)
    firsts = [indices[start] // 10 for start in range(0, 400, 10 * WINDOW)]
    assert firsts != sorted(firsts)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"length": 7, "batch_size": 4, "num_processes": 2}, "7 images are fewer than a global batch of 8 images"),
        ({"length": 3, "batch_size": 4}, "3 images are fewer than a global batch of 4 images .the batch size"),
        ({"length": 9, "batch_size": 4, "groups": [4, 4]}, "groups have 8 images .expected 9"),
        ({"length": 9, "batch_size": 0}, "batch_size=0 .expected an int from 1"),
        ({"length": 9, "batch_size": 1, "process_index": 1}, "process_index=1 .expected an int from 0 to 0"),
        ({"length": 9, "batch_size": 1, "seed": -1}, "seed=-1 .expected an int from 0"),
    ],
)
def test_epoch_sampler_with_arguments_that_do_not_fit_raises(arguments, reason):
    with pytest.raises(ValueError, match=reason):
        EpochSampler(**{"seed": 0, **arguments})


def test_epoch_sampler_without_a_seed_raises():
    with pytest.raises(TypeError, match="seed=None"):
        EpochSampler(8, 4, seed=None)


def test_set_position_outside_of_the_epoch_raises_and_keeps_the_position():
    sampler = EpochSampler(8, 4, seed=0)
    with pytest.raises(ValueError, match=r"epoch=-1[\s\S]*batch=3 .expected an int from 0 to 2"):
        sampler.set_position(-1, 3)
    assert (sampler.epoch, sampler.batch) == (0, 0)


@pytest.mark.parametrize("processes", [1, 2, 3, 8])
@pytest.mark.parametrize("length", [0, 1, 5, 12])
def test_evaluation_sampler_shares_images_in_order_without_repetition(length, processes):
    samplers = [EvaluationSampler(length, 2, num_processes=processes, process_index=at) for at in range(processes)]
    shares = [list(sampler) for sampler in samplers]
    assert flat([index for share in shares for index in share]) == list(range(length))
    assert [len(sampler) for sampler in samplers] == [len(share) for share in shares]
    sizes = [sum(map(len, share)) for share in shares]
    assert max(sizes) - min(sizes) <= 1


def test_evaluation_sampler_with_arguments_that_do_not_fit_raises():
    with pytest.raises(ValueError, match=r"process_index=2 \(expected an int from 0 to 1"):
        EvaluationSampler(4, 2, num_processes=2, process_index=2)
