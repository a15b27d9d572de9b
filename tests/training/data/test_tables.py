"""Sources in Parquet files and in folders of Hugging Face datasets."""

from __future__ import annotations

import io
import json
import pickle
import sys

import numpy as np
import pytest
from PIL import Image

from beit_fast.training.data import (
    EpochSampler,
    TableSource,
    TrainingDataset,
    build_loader,
    collate_items,
    open_source,
)
from beit_fast.training.data.sampler import WINDOW
from beit_fast.training.data.table_files import TableFiles

from .make import picture, red_of, write_image
from .test_dataset import same, transform

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

NAMES = ["cat", "dog", "eel"]


def encoded(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def table_of(numbers, structs=True, names=NAMES, **columns):
    """Return a table of pictures; labels repeat 0, 1, 2."""
    images = [encoded(picture(number)) for number in numbers]
    cells = [{"bytes": image, "path": None} for image in images] if structs else images
    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())]) if structs else pyarrow.binary()
    table = pyarrow.table({"image": pyarrow.array(cells, kind), "label": [number % 3 for number in numbers], **columns})
    if names is None:
        return table
    features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
    return table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})


def write_parts(folder, numbers=range(20), per_file=10, rows=3, **options):
    """Write Parquet files of `per_file` pictures in row groups of `rows`."""
    folder.mkdir(exist_ok=True)
    for start in range(0, len(numbers), per_file):
        table = table_of(numbers[start : start + per_file], **options)
        parquet.write_table(table, folder / f"train-{start:03}.parquet", row_group_size=rows)
    return folder


def write_saved(folder, numbers, rows=3):
    """Write what `datasets.save_to_disk` writes."""
    folder.mkdir(parents=True)
    table = table_of(numbers, names=None)
    with pyarrow.ipc.new_stream(str(folder / "data-00000-of-00001.arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=rows)
    features = {"image": {"_type": "Image"}, "label": {"names": NAMES, "_type": "ClassLabel"}}
    (folder / "dataset_info.json").write_text(json.dumps({"features": features}))
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}))
    return folder


@pytest.mark.parametrize("structs", [True, False])
def test_table_source_reads_images_and_named_labels_of_all_files(tmp_path, structs):
    source = open_source(write_parts(tmp_path / "set", structs=structs), "classes")
    assert isinstance(source, TableSource)
    assert (len(source), source.classes, source.groups) == (20, ("cat", "dog", "eel"), (3, 3, 3, 1) * 2)
    examples = [source.read(index) for index in range(20)]
    assert [red_of(example.image) for example in examples] == list(range(20))
    assert [example.label for example in examples] == [number % 3 for number in range(20)]
    assert source.name_of(14) == "train-010.parquet, row 4"


def test_table_source_of_one_file_without_names_has_no_classes(tmp_path):
    write_parts(tmp_path, range(5), names=None)
    source = open_source(tmp_path / "train-000.parquet", "classes")
    assert (len(source), source.classes, source.read(4).label) == (5, None, 1)


def test_table_source_of_images_ignores_labels(tmp_path):
    source = open_source(write_parts(tmp_path, range(4)), "images")
    assert (source.classes, source.read(2).label) == (None, None)


def test_table_source_reads_what_save_to_disk_writes(tmp_path):
    source = open_source(write_saved(tmp_path / "saved", range(8)), "classes")
    assert (len(source), source.classes, source.groups) == (8, ("cat", "dog", "eel"), (3, 3, 2))
    assert [red_of(source.read(index).image) for index in (7, 0, 4)] == [7, 0, 4]
    assert source.read(7).label == 1


def test_table_source_of_several_splits_names_them(tmp_path):
    write_saved(tmp_path / "train", range(2))
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(ValueError, match="has the splits 'train' or 'test': pass the folder of one of them"):
        open_source(tmp_path, "classes")


def test_table_source_reads_annotations_as_stored(tmp_path):
    ids = np.arange(96, dtype=np.uint8).reshape(8, 12)
    cells = [{"bytes": encoded(Image.fromarray(ids)), "path": None}]
    small = [{"bytes": encoded(Image.fromarray(ids[:4])), "path": None}]
    table = table_of([1, 2], names=None).drop_columns("label")
    parquet.write_table(table.append_column("annotation", [cells + small]), tmp_path / "a.parquet")
    source = open_source(tmp_path, "segmentation")
    assert np.array_equal(np.asarray(source.read(0).label), ids)
    with pytest.raises(ValueError, match=r"its annotation has 12x4 pixels \(expected 12x8"):
        source.read(1)


def test_table_source_reads_the_path_of_a_row_without_bytes(tmp_path):
    write_image(tmp_path / "files" / "a.png", 77)
    table = pyarrow.table({"image": [{"bytes": b"", "path": "x"}, {"bytes": None, "path": "files/a.png"}]})
    parquet.write_table(table, tmp_path / "a.parquet")
    source = open_source(tmp_path, "images")
    assert red_of(source.read(1).image) == 77
    with pytest.raises(OSError, match=r"image 'a.parquet, row 0' cannot be read: .* it is empty"):
        source.read(0)


@pytest.mark.parametrize("label", [3, -1, None])
def test_table_source_label_that_is_not_a_class_raises(tmp_path, label):
    table = table_of([0, 1])
    labels = pyarrow.array([0, label], pyarrow.int64())
    parquet.write_table(table.set_column(1, "label", labels), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=rf"its label={label} is not a class id \(expected an int from 0 to 2\)"):
        open_source(tmp_path, "classes").read(1)


def test_table_source_reads_each_row_group_of_a_window_once(tmp_path, monkeypatch):
    source = open_source(write_parts(tmp_path, range(40), per_file=40, rows=5), "images")
    read, counts = TableFiles.read, []
    monkeypatch.setattr(
        TableFiles, "read", lambda self, number, columns: counts.append(number) or read(self, number, columns)
    )
    sampler = EpochSampler(len(source), 5, seed=0, groups=source.groups)
    for keys in sampler:
        for _, index in keys:
            source.read(index)
    assert sorted(counts) == list(range(8))
    assert len(source._cache) == WINDOW


def test_loader_of_a_table_gives_the_same_batches_in_workers(tmp_path):
    source = open_source(write_parts(tmp_path, range(24), per_file=12, rows=3), "classes")
    source.read(0)

    def run(workers):
        sampler = EpochSampler(len(source), 6, seed=2, groups=source.groups)
        return list(build_loader(TrainingDataset(source, transform, seed=2), sampler, collate_items, workers))

    for first, second in zip(run(2), run(0), strict=True):
        same(first, second)


def test_table_source_is_pickled_without_its_cache(tmp_path):
    source = open_source(write_parts(tmp_path, range(4)), "images")
    source.read(0)
    copy = pickle.loads(pickle.dumps(source))
    assert (len(source._cache), len(copy._cache)) == (1, 0)
    assert red_of(copy.read(3).image) == 3


def test_digest_of_a_table_changes_with_labels_and_not_with_the_location(tmp_path):
    first, second = (write_parts(tmp_path / name, range(6)) for name in ("x", "y"))
    digest = open_source(first, "classes").digest()
    assert open_source(second, "classes").digest() == digest
    table = parquet.read_table(second / "train-000.parquet")
    changed = table.set_column(1, "label", pyarrow.array([1] * 6))
    parquet.write_table(changed, second / "train-000.parquet", row_group_size=3)
    assert open_source(second, "classes").digest() != digest


@pytest.mark.parametrize(
    ("columns", "kind", "reasons"),
    [
        ({"picture": [b"x"]}, "images", ["there is no column 'image' (its columns are 'picture')"]),
        ({"image": ["x"]}, "images", ["the column 'image' is string (expected bytes, or structs of bytes and path)"]),
        (
            {"image": ["x"], "label": ["cat"]},
            "classes",
            ["'image' is string", "the column 'label' is string (expected integers, class ids)"],
        ),
        ({"image": [b"x"]}, "classes", ["there is no column 'label' or 'labels'"]),
        ({"image": [b"x"]}, "segmentation", ["there is no column 'annotation' or 'label'"]),
        ({"image": pyarrow.array([], pyarrow.binary())}, "images", ["it has no rows"]),
    ],
)
def test_table_source_with_columns_that_do_not_fit_lists_every_reason(tmp_path, columns, kind, reasons):
    parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="cannot be used") as error:
        open_source(tmp_path, kind)
    assert all(reason in str(error.value) for reason in reasons), error.value


def test_table_source_of_files_with_different_columns_names_them(tmp_path):
    write_parts(tmp_path, range(2))
    parquet.write_table(pyarrow.table({"image": [b"x"]}), tmp_path / "z.parquet")
    with pytest.raises(ValueError, match=r"have different columns: 'z.parquet' differ from 'train-000.parquet'"):
        open_source(tmp_path, "images")


def test_table_source_of_a_damaged_file_names_it(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(ValueError, match=r"a\.parquet' cannot be read"):
        open_source(tmp_path, "images")


def test_table_source_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    write_parts(tmp_path, range(2))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"pip install 'beit-fast\[parquet\]'"):
        open_source(tmp_path, "images")
