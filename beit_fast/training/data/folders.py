"""Sources in folders: images, one folder for each class, images beside annotations."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from ...image_processing.image_folders import IMAGE_SUFFIXES, files_below, is_image_name
from ...image_processing.inputs import read_label_image, read_rgb
from ...utils.messages import count_of, join_some, raise_value_error
from .source import Example, digest_of

_SHOWN = 5


class ImageFolder:
    """The images below a folder, without labels.

    Hidden files and files with other suffixes are left out. The order is that of the sorted paths.

    Args:
        folder: The folder; images may be in folders below it.

    Raises:
        ValueError: If there are no images.
    """

    classes: tuple[str, ...] | None = None
    groups: tuple[int, ...] | None = None

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.name = os.fspath(folder)
        self._folder = Path(folder)
        self._paths = _images_below(self._folder)
        raise_value_error(f"the folder {self.name!r} cannot be used", _no_image_errors(self._paths, self._folder))

    def __len__(self) -> int:
        return len(self._paths)

    def read(self, index: int) -> Example:
        """Read one image; its label is None."""
        path = self._paths[index]
        return Example(read_rgb(self._folder / path, f"image {path!r}"), None)

    def name_of(self, index: int) -> str:
        """Return the path of one image below the folder."""
        return self._paths[index]

    def digest(self) -> str:
        """Return a hash of the paths, in hexadecimal."""
        return digest_of(self._paths)


class ClassFolder:
    """Images in one folder for each class; the sorted names of the folders are the classes.

    Images may be in folders below that of their class.

    Args:
        folder: The folder of the folders.

    Raises:
        ValueError: If a class has no images, images are outside of the classes, or there are no images.
    """

    groups: tuple[int, ...] | None = None

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.name = os.fspath(folder)
        self._folder = Path(folder)
        classes = sorted(entry.name for entry in self._folder.iterdir() if _is_visible_folder(entry))
        by_class: dict[str, list[str]] = {name: [] for name in classes}
        outside: list[str] = []
        for path in _images_below(self._folder):
            first, slash, _ = path.partition("/")
            (by_class[first] if slash else outside).append(path)
        raise_value_error(f"the folder of classes {self.name!r} cannot be used", self._errors(by_class, outside))
        self.classes: tuple[str, ...] | None = tuple(classes)
        self._paths = tuple(path for name in classes for path in by_class[name])
        self._labels = tuple(label for label, name in enumerate(classes) for _ in by_class[name])

    def _errors(self, by_class: dict[str, list[str]], outside: list[str]) -> list[str]:
        if not outside and not any(by_class.values()):
            return _no_image_errors((), self._folder)
        errors = []
        if outside:
            some = join_some(map(repr, outside), _SHOWN)
            errors.append(f"{count_of(len(outside), 'image')} outside of a class folder: {some}")
        if empty := [name for name, paths in by_class.items() if not paths]:
            errors.append(f"class folders without images: {join_some(map(repr, empty), _SHOWN)}")
        return errors

    def __len__(self) -> int:
        return len(self._paths)

    def read(self, index: int) -> Example:
        """Read one image with its class id."""
        path = self._paths[index]
        return Example(read_rgb(self._folder / path, f"image {path!r}"), self._labels[index])

    def name_of(self, index: int) -> str:
        """Return the path of one image below the folder."""
        return self._paths[index]

    def digest(self) -> str:
        """Return a hash of the paths, in hexadecimal. The class of an image is the first part of its path."""
        return digest_of(self._paths)


class SegmentationFolder:
    """Images in `images/` and annotations in `annotations/`.

    They are paired by their paths without suffix.

    Args:
        folder: The folder of both.

    Raises:
        ValueError: If a folder is missing, an image has no annotation, or the reverse; if two files of a folder differ
            in the suffix only; or if there are no images.
    """

    classes: tuple[str, ...] | None = None
    groups: tuple[int, ...] | None = None

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.name = os.fspath(folder)
        self._folder = Path(folder)
        heading = f"the segmentation folder {self.name!r} cannot be used"
        parts = ("images", "annotations")
        missing = [part for part in parts if not (self._folder / part).is_dir()]
        raise_value_error(
            heading, [f"there is no folder {part}/ (expected images/ and annotations/)" for part in missing]
        )
        images, annotations = (_images_below(self._folder / part) for part in parts)
        raise_value_error(heading, _pairing_errors(images, annotations) or _no_image_errors(images, self._folder))
        self._pairs = tuple(zip(images, _in_order_of(images, annotations), strict=True))

    def __len__(self) -> int:
        return len(self._pairs)

    def read(self, index: int) -> Example:
        """Read one image with its annotation."""
        path, annotation_path = self._pairs[index]
        image = read_rgb(self._folder / "images" / path, f"image {path!r}")
        annotation = read_label_image(self._folder / "annotations" / annotation_path, f"annotation {annotation_path!r}")
        if annotation.size != image.size:
            sizes = (f"{width}x{height}" for width, height in (annotation.size, image.size))
            raise ValueError("its annotation has {} pixels (expected {}, as the image)".format(*sizes))
        return Example(image, annotation)

    def name_of(self, index: int) -> str:
        """Return the path of one image below `images/`."""
        return self._pairs[index][0]

    def digest(self) -> str:
        """Return a hash of the paths of images and annotations, in hexadecimal."""
        return digest_of(path for pair in self._pairs for path in pair)


def _is_visible_folder(entry: Path) -> bool:
    return entry.is_dir() and not entry.name.startswith(".")


def _images_below(folder: Path) -> tuple[str, ...]:
    return tuple(sorted(filter(is_image_name, files_below(folder))))


def _no_image_errors(images: Iterable[str], folder: Path) -> list[str]:
    if any(True for _ in images):
        return []
    files = count_of(len(files_below(folder)), "file")
    return [f"it does not contain images: {files}, none of which ends in {', '.join(IMAGE_SUFFIXES)}"]


def _pairing_errors(images: Iterable[str], annotations: Iterable[str]) -> list[str]:
    """Return why images and annotations do not form pairs."""
    by_stem = {"images": _by_stem(images), "annotations": _by_stem(annotations)}
    errors = []
    for part, files in by_stem.items():
        if same := [path for paths in files.values() if len(paths) > 1 for path in paths]:
            errors.append(f"{part}/ has files that differ in the suffix only: {join_some(map(repr, same), _SHOWN)}")
    for part, other in (("images", "annotations"), ("annotations", "images")):
        if alone := [path for stem, paths in by_stem[part].items() if stem not in by_stem[other] for path in paths]:
            some = join_some(map(repr, alone), _SHOWN)
            errors.append(f"{len(alone)} of {part}/ have no file of the same name in {other}/: {some}")
    return errors


def _by_stem(paths: Iterable[str]) -> dict[str, list[str]]:
    files: dict[str, list[str]] = defaultdict(list)
    for path in paths:
        files[_stem(path)].append(path)
    return files


def _in_order_of(images: Iterable[str], annotations: Iterable[str]) -> list[str]:
    by_stem = {_stem(path): path for path in annotations}
    return [by_stem[_stem(path)] for path in images]


def _stem(path: str) -> str:
    return os.path.splitext(path)[0]
