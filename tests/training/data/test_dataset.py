"""Data sets and loaders: keys, unreadable images, workers."""

from __future__ import annotations

import signal

import pytest
import torch

from beit_fast.training.data import (
    EpochSampler,
    EvaluationDataset,
    EvaluationSampler,
    TrainingDataset,
    build_loader,
    collate_evaluation,
    collate_items,
    open_source,
)
from beit_fast.training.data import dataset as dataset_module

from .make import red_of, write_classes, write_image


def transform(example, generator):
    """Return the red of a picture, its label and a random number."""
    return {
        "red": torch.tensor(red_of(example.image)),
        "labels": torch.tensor(example.label),
        "draw": torch.rand((), generator=generator),
    }


def preprocess(example):
    return {"pixel_values": torch.full((2,), float(red_of(example.image))), "labels": torch.tensor(example.label)}


@pytest.fixture
def source(tmp_path):
    return open_source(write_classes(tmp_path / "set", {"a": 5, "b": 7}), "classes")


def damage(source, *indices):
    """Truncate images of a source."""
    for index in indices:
        file = source._folder / source.name_of(index)
        file.write_bytes(file.read_bytes()[:40])


def same(first, second):
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]) if isinstance(value, torch.Tensor) else value == second[name], name


def test_training_dataset_item_is_a_function_of_seed_epoch_and_index(source):
    items = TrainingDataset(source, transform, seed=4)
    item = items[(2, 6)]
    assert (item["red"].item(), item["labels"].item(), item["key"], item["unreadable"]) == (6, 1, [2, 6], [])
    same(item, TrainingDataset(source, transform, seed=4)[(2, 6)])
    draws = {items[key]["draw"].item() for key in ((2, 6), (3, 6), (2, 7))}
    draws.add(TrainingDataset(source, transform, seed=5)[(2, 6)]["draw"].item())
    assert len(draws) == 4


def test_training_dataset_replaces_unreadable_images_by_the_next_readable_one(source):
    damage(source, 3, 4, 11)
    items = TrainingDataset(source, transform, seed=0)
    item = items[(0, 3)]
    assert (item["red"].item(), item["labels"].item(), item["key"]) == (5, 1, [0, 3])
    assert [line.partition(": ")[0] for line in item["unreadable"]] == ["a/3.png", "a/4.png"]
    assert all("damaged or truncated" in line or "cannot" in line for line in item["unreadable"])
    assert items[(0, 11)]["red"].item() == 0
    assert items[(0, 3)]["draw"] != items[(0, 5)]["draw"]


def test_training_dataset_without_readable_images_raises_one_error_with_reasons(source, monkeypatch):
    damage(source, *range(12))
    with pytest.raises(OSError, match=r"has 12 unreadable images in a row:\n- a/2.png: ") as error:
        TrainingDataset(source, transform, seed=0)[(0, 2)]
    assert str(error.value).count("\n") == 3
    monkeypatch.setattr(dataset_module, "MOST_UNREADABLE", 4)
    with pytest.raises(OSError, match="4 unreadable images in a row"):
        TrainingDataset(source, transform, seed=0)[(0, 2)]


def test_training_dataset_error_of_the_transform_names_the_image_and_is_not_skipped(source):
    def fail(example, generator):
        raise ValueError("class 9 of 3")

    with pytest.raises(ValueError, match=r"^image 'a/0\.png': class 9 of 3$"):
        TrainingDataset(source, fail, seed=0)[(0, 0)]


def test_training_dataset_error_of_another_kind_has_a_note_with_the_image(source):
    def fail(example, generator):
        raise KeyError("size")

    with pytest.raises(KeyError) as error:
        TrainingDataset(source, fail, seed=0)[(0, 0)]
    assert error.value.__notes__ == ["in the transform of image 'a/0.png'"]


def test_training_dataset_does_not_skip_an_image_for_lack_of_memory(source, monkeypatch):
    def read(index):
        raise MemoryError

    monkeypatch.setattr(source, "read", read)
    with pytest.raises(MemoryError):
        TrainingDataset(source, transform, seed=0)[(0, 0)]


def test_collate_items_stacks_tensors_joins_unreadable_and_keeps_the_first_key(source):
    damage(source, 1)
    items = TrainingDataset(source, transform, seed=0)
    batch = collate_items([items[(7, index)] for index in (2, 1, 8)])
    assert batch["red"].tolist() == [2, 2, 8]
    assert batch["labels"].tolist() == [0, 0, 1]
    assert batch["key"] == [7, 2]
    assert [line.partition(":")[0] for line in batch["unreadable"]] == ["a/1.png"]


def test_collate_items_extra_reads_the_batch_and_replaces_fields(source):
    items = [TrainingDataset(source, transform, seed=0)[(1, index)] for index in (4, 5)]
    batch = collate_items(items, lambda batch: {"red": batch["red"] * 2, "total": sum(batch["key"])})
    assert batch["red"].tolist() == [8, 10]
    assert batch["total"] == 5
    assert batch["labels"].tolist() == [0, 1]


def test_collate_items_with_different_shapes_raises(source):
    items = [{"pixel_values": torch.ones(size), "key": [0, 0], "unreadable": []} for size in (1, 2)]
    with pytest.raises(RuntimeError, match="equal size"):
        collate_items(items)


@pytest.mark.parametrize("workers", [1, 2])
def test_loader_batches_do_not_depend_on_workers_or_the_position_it_starts_at(source, workers):
    damage(source, 2)

    def run(num_workers, starts):
        sampler = EpochSampler(len(source), 4, seed=6)
        loader = build_loader(TrainingDataset(source, transform, seed=6), sampler, collate_items, num_workers)
        found = []
        for epoch, batch in starts:
            sampler.set_position(epoch, batch)
            found += list(loader)
        return found

    expected = run(0, [(0, 0), (1, 0)])
    assert len(expected) == 6
    assert sum(len(batch["unreadable"]) for batch in expected) == 2
    for first, second in zip(run(workers, [(0, 0), (1, 0)]), expected, strict=True):
        same(first, second)
    for first, second in zip(run(workers, [(0, 2), (1, 1)]), [expected[2], *expected[4:]], strict=True):
        same(first, second)


def test_loader_of_two_processes_has_the_items_of_one(source):
    items = TrainingDataset(source, transform, seed=1)

    def run(batch_size, **processes):
        sampler = EpochSampler(len(source), batch_size, seed=1, **processes)
        return list(build_loader(items, sampler, collate_items, 0))

    halves = [run(2, num_processes=2, process_index=index) for index in range(2)]
    for whole, first, second in zip(run(4), *halves, strict=True):
        for name in ("red", "labels", "draw"):
            assert torch.equal(whole[name], torch.cat([first[name], second[name]]))


class InterruptHandler(torch.utils.data.Dataset):
    """Whether Ctrl-C is ignored where the item is read."""

    def __len__(self):
        return 2

    def __getitem__(self, index):
        return {"ignored": torch.tensor(signal.getsignal(signal.SIGINT) == signal.SIG_IGN), "unreadable": []}


def test_loader_workers_ignore_interrupts():
    loader = build_loader(InterruptHandler(), EvaluationSampler(2, 1), lambda items: items[0]["ignored"], 1)
    assert [bool(ignored) for ignored in loader] == [True, True]


def test_evaluation_dataset_leaves_unreadable_images_out_and_counts_them(source):
    damage(source, 0, 5)
    items = EvaluationDataset(source, preprocess)
    loader = build_loader(items, EvaluationSampler(len(source), 5), collate_evaluation, 0)
    batches = list(loader)
    assert [index for batch in batches for index in batch["index"]] == [1, 2, 3, 4, 6, 7, 8, 9, 10, 11]
    assert batches[0]["pixel_values"].tolist() == [[1.0, 1.0], [2.0, 2.0], [3.0, 3.0], [4.0, 4.0]]
    names = [line.partition(":")[0] for batch in batches for line in batch["unreadable"]]
    assert names == ["a/0.png", "b/0.png"]


def test_collate_evaluation_without_readable_images_has_no_fields(source):
    damage(source, 0, 1)
    items = EvaluationDataset(source, preprocess)
    batch = collate_evaluation([items[0], items[1]])
    assert batch.keys() == {"index", "unreadable"}
    assert (batch["index"], len(batch["unreadable"])) == ([], 2)


def test_collate_evaluation_keeps_tensors_of_different_shapes_in_a_list():
    items = [
        {"labels": torch.ones(size), "pixel_values": torch.ones(2), "index": size, "unreadable": []} for size in (2, 3)
    ]
    batch = collate_evaluation(items)
    assert [tensor.shape for tensor in batch["labels"]] == [(2,), (3,)]
    assert batch["pixel_values"].shape == (2, 2)


def test_evaluation_dataset_error_of_the_preprocessing_names_the_image(source):
    def fail(example):
        raise ValueError("wrong")

    with pytest.raises(ValueError, match=r"^image 'a/3\.png': wrong$"):
        EvaluationDataset(source, fail)[3]


def test_training_dataset_with_an_empty_file_names_the_reason(tmp_path):
    write_image(tmp_path / "a.png", 1)
    (tmp_path / "b.png").write_bytes(b"")
    items = TrainingDataset(open_source(tmp_path, "images"), lambda example, _: {"x": torch.ones(1)}, seed=0)
    assert items[(0, 1)]["unreadable"] == [
        "b.png: cannot be read: Pillow does not recognize its format, since it is empty"
    ]
