"""Folders of images, of classes and of annotations."""

from __future__ import annotations

import os

import numpy as np
import pytest
from PIL import Image

from beit_fast.training.data import ClassFolder, ImageFolder, SegmentationFolder, open_source

from .make import picture, red_of, write_annotation, write_classes, write_image

IDS = np.arange(96, dtype=np.uint8).reshape(8, 12)


def test_image_folder_reads_images_of_subfolders_in_sorted_order(tmp_path):
    for name, number in (("b.png", 3), ("a/z.PNG", 2), ("a/b/c.png", 1), (".hidden.png", 9), ("notes.txt", 9)):
        write_image(tmp_path / name, number)
    source = open_source(tmp_path, "images")
    assert isinstance(source, ImageFolder)
    assert [source.name_of(index) for index in range(len(source))] == ["a/b/c.png", "a/z.PNG", "b.png"]
    examples = [source.read(index) for index in range(3)]
    assert [red_of(example.image) for example in examples] == [1, 2, 3]
    assert [example.label for example in examples] == [None] * 3
    assert (source.classes, source.groups) == (None, None)


def test_image_folder_turns_images_upright_and_converts_them_to_rgb(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(5, (12, 8)).save(tmp_path / "a.png", exif=exif)
    Image.new("L", (4, 4), 7).save(tmp_path / "b.png")
    source = ImageFolder(tmp_path)
    assert source.read(0).image.size == (8, 12)
    assert source.read(1).image.getpixel((0, 0)) == (7, 7, 7)


@pytest.mark.parametrize("kind", ["images", "classes"])
def test_open_source_without_images_raises_one_error_with_the_suffixes(tmp_path, kind):
    (tmp_path / "class").mkdir()
    (tmp_path / "class" / "notes.txt").write_text("x")
    with pytest.raises(ValueError, match=r"does not contain images: 1 file, none of which ends in \.avif"):
        open_source(tmp_path, kind)


@pytest.mark.parametrize(("kind", "expected"), [("images", "a folder of images"), ("segmentation", "annotations/")])
def test_open_source_without_a_folder_names_what_is_expected(tmp_path, kind, expected):
    with pytest.raises(FileNotFoundError, match=f"there is no such folder.*{expected}"):
        open_source(tmp_path / "none", kind)
    with pytest.raises(FileNotFoundError, match="it is a file"):
        open_source(write_image(tmp_path / "a.png"), kind)


def test_open_source_with_an_unknown_kind_lists_the_kinds(tmp_path):
    with pytest.raises(ValueError, match="expected 'images', 'classes' or 'segmentation'"):
        open_source(tmp_path, "masks")


def test_class_folder_takes_sorted_folders_as_class_ids(tmp_path):
    write_classes(tmp_path, {"b": 2, "a": 1})
    write_image(tmp_path / "b" / "deeper" / "x.png", 9)
    source = open_source(tmp_path, "classes")
    assert isinstance(source, ClassFolder)
    assert source.classes == ("a", "b")
    labels = {source.name_of(index): source.read(index).label for index in range(len(source))}
    assert labels == {"a/0.png": 0, "b/0.png": 1, "b/1.png": 1, "b/deeper/x.png": 1}
    assert red_of(source.read(0).image) == 2


def test_class_folder_with_empty_classes_and_stray_images_lists_both(tmp_path):
    write_classes(tmp_path, {"a": 1})
    for name in ("empty", "void"):
        (tmp_path / name).mkdir()
    write_image(tmp_path / "stray.png")
    with pytest.raises(ValueError, match="cannot be used") as error:
        ClassFolder(tmp_path)
    assert "1 image outside of a class folder: 'stray.png'" in str(error.value)
    assert "class folders without images: 'empty', 'void'" in str(error.value)


@pytest.mark.parametrize("palette", [False, True])
def test_segmentation_folder_pairs_by_stem_and_keeps_the_ids(tmp_path, palette):
    for name in ("b", "part/a"):
        write_image(tmp_path / "images" / f"{name}.jpg", 4)
        write_annotation(tmp_path / "annotations" / f"{name}.png", IDS, palette)
    source = open_source(tmp_path, "segmentation")
    assert isinstance(source, SegmentationFolder)
    assert [source.name_of(index) for index in range(len(source))] == ["b.jpg", "part/a.jpg"]
    example = source.read(1)
    assert example.label.mode == ("P" if palette else "L")
    assert np.array_equal(np.asarray(example.label), IDS)
    assert red_of(example.image) == 4


def test_segmentation_folder_keeps_sixteen_bits(tmp_path):
    write_image(tmp_path / "images" / "a.png")
    ids = IDS.astype(np.uint16) * 500
    (tmp_path / "annotations").mkdir()
    Image.fromarray(ids).save(tmp_path / "annotations" / "a.png")
    assert np.array_equal(np.asarray(SegmentationFolder(tmp_path).read(0).label), ids)


def test_segmentation_folder_with_files_alone_counts_and_lists_them(tmp_path):
    for name in ("a", "b"):
        write_image(tmp_path / "images" / f"{name}.jpg")
    write_image(tmp_path / "images" / "b.png")
    for name in ("b", "c", "d"):
        write_annotation(tmp_path / "annotations" / f"{name}.png", IDS)
    with pytest.raises(ValueError, match="cannot be used") as error:
        SegmentationFolder(tmp_path)
    for reason in (
        "1 of images/ have no file of the same name in annotations/: 'a.jpg'",
        "2 of annotations/ have no file of the same name in images/: 'c.png', 'd.png'",
        "images/ has files that differ in the suffix only: 'b.jpg', 'b.png'",
    ):
        assert reason in str(error.value)


def test_segmentation_folder_without_annotations_names_the_missing_folder(tmp_path):
    write_image(tmp_path / "images" / "a.png")
    with pytest.raises(ValueError, match="there is no folder annotations/"):
        SegmentationFolder(tmp_path)


def test_segmentation_folder_read_of_an_annotation_that_does_not_fit_raises(tmp_path):
    for name in ("color", "small"):
        write_image(tmp_path / "images" / f"{name}.png")
    write_image(tmp_path / "annotations" / "color.png")
    write_annotation(tmp_path / "annotations" / "small.png", IDS[:4])
    source = SegmentationFolder(tmp_path)
    with pytest.raises(ValueError, match=r"annotation 'color.png' has mode 'RGB' \(expected one class id"):
        source.read(0)
    with pytest.raises(ValueError, match=r"its annotation has 12x4 pixels \(expected 12x8"):
        source.read(1)


def test_digest_changes_with_paths_and_not_with_the_location(tmp_path):
    first, second = (write_classes(tmp_path / name, {"a": 1, "b": 1}) for name in ("x", "y"))
    digest = ClassFolder(first).digest()
    assert ClassFolder(second).digest() == digest
    os.rename(second / "b" / "0.png", second / "a" / "1.png")
    write_image(second / "b" / "2.png")
    assert ClassFolder(second).digest() != digest
    assert len(bytes.fromhex(digest)) == 32
