"""The pictures that `beit-fast segment` writes: their names, formats and files."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from ..utils.files import atomic_write, writing
from ..utils.messages import count_of, join_some
from .options import SegmentOptions
from .outputs import check_file, check_folder, check_keeps, class_format, color_format, is_picture_name
from .predict.dataset import find_images


class Target(NamedTuple):
    """The pictures of one image.

    Attributes:
        image: The path of the image, as the user passed it, or below the folder that the user passed.
        files: Each file to write, and its format of Pillow: the overlay, and the classes if there is a second one.
    """

    image: str
    files: Sequence[tuple[Path, str]]


def plan_pictures(options: SegmentOptions) -> tuple[list[Target], bool]:
    """Name the pictures of every image; check that they can be written.

    Returns:
        The targets, and whether `--out` is a folder of pictures.

    Raises:
        FileExistsError: If a picture would replace an input.
        OSError: If a file or folder cannot be written.
        ValueError: If a folder has no images, a format is not supported, or two pictures have one name.
    """
    first = options.images[0]
    is_folder = len(options.images) > 1 or Path(first).is_dir()
    targets = _in_folders(options) if is_folder else [Target(first, _one_file_each(options))]
    files = [path for target in targets for path, _ in target.files]
    for path in files:
        check_file("the picture", path)
    check_keeps(files, [Path(target.image) for target in targets])
    return targets, is_folder


def save_pictures(files: Sequence[tuple[Path, str]], pictures: Sequence[Any]) -> None:
    """Write all pictures of Pillow, or none if one cannot be written."""
    with ExitStack() as stack:
        for (path, name), picture in zip(files, pictures, strict=True):
            stack.enter_context(writing("the picture", path))
            path.parent.mkdir(parents=True, exist_ok=True)
            picture.save(stack.enter_context(atomic_write(path)), format=name)


def _one_file_each(options: SegmentOptions) -> list[tuple[Path, str]]:
    files = [(options.out, color_format(options.out))]
    if options.labels is not None:
        files.append((options.labels, class_format(options.labels)))
        if options.labels.absolute() == options.out.absolute():
            raise ValueError(f"--out and --labels are the same file {str(options.out)!r} (expected two files)")
    return files


def _in_folders(options: SegmentOptions) -> list[Target]:
    folders = [folder for folder in (options.out, options.labels) if folder is not None]
    for folder in folders:
        if is_picture_name(folder) and not folder.is_dir():
            raise ValueError(f"{str(folder)!r} is the name of one picture (expected a folder for several images)")
        check_folder("the pictures", folder)
    named = list(_named_images(options.images, folders))
    images: dict[str, tuple[str, Path]] = {}
    for image, name in named:
        images.setdefault(os.path.abspath(image), (image, name))
    if len(images) < len(named):
        print(f"left out: {count_of(len(named) - len(images), 'repeated image')}", file=sys.stderr)
    names = _picture_names(dict(images.values()))
    targets = [Target(image, [(folder / name, "PNG") for folder in folders]) for image, name in names.items()]
    _check_names_differ(targets)
    return targets


def _named_images(arguments: Sequence[str], outputs: Sequence[Path]) -> Iterator[tuple[str, Path]]:
    """Yield the path of each image, and its name without its folder."""
    for argument in arguments:
        folder = Path(argument)
        if not folder.is_dir():
            yield argument, Path(folder.name)
            continue
        for output in outputs:
            if output.resolve().is_relative_to(folder.resolve()):
                raise ValueError(
                    f"{str(output)!r} is inside the folder of images {argument!r}, so the pictures would become images "
                    "of the next run (expected another folder)"
                )
        dataset = find_images(folder)
        if dataset.note:
            print(f"{argument}: {dataset.note}", file=sys.stderr)
        for path in dataset.paths:
            yield os.path.join(argument, path), Path(path)


def _picture_names(images: dict[str, Path]) -> dict[str, Path]:
    """Replace the suffix of each name by .png.

    Names that differ in nothing else keep their suffix before it.
    """
    counts = Counter(name.with_suffix(".png") for name in set(images.values()))
    return {
        image: name.with_suffix(".png") if counts[name.with_suffix(".png")] == 1 else name.with_name(f"{name.name}.png")
        for image, name in images.items()
    }


def _check_names_differ(targets: Sequence[Target]) -> None:
    """Check that no picture replaces another one.

    Raises:
        ValueError: If it does, or if its name is that of the folder of another; the error lists the images.
    """
    images: dict[str, list[str]] = {}
    for target in targets:
        for path, _ in target.files:
            images.setdefault(os.path.normcase(path.absolute()), []).append(target.image)
    folders = {os.fspath(parent) for path in images for parent in Path(path).parents}
    errors = [
        f"{path!r} for {' and '.join(map(repr, found))}"
        + (", and it is the folder of another" if path in folders else "")
        for path, found in images.items()
        if len(found) > 1 or path in folders
    ]
    if errors:
        raise ValueError(
            f"pictures need different names, but these would be written twice: {join_some(errors, 8)} (rename images, "
            "or run the command once for each folder)"
        )
