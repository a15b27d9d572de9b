"""The classes of fine-tuning: names of folders, of a file, or of the checkpoint."""

from __future__ import annotations

import os
from collections.abc import Sequence

from ...utils.messages import count_of, join_some, raise_value_error
from ..data.source import ImageSource
from .finetune_options import FinetuneOptions


def class_names_of(options: FinetuneOptions, source: ImageSource, evaluation: ImageSource | None) -> list[str] | None:
    """Return the names of the classes by id.

    Args:
        options: The options of fine-tuning.
        source: The images of training.
        evaluation: The images of evaluation, or None.

    Returns:
        The names. None for segmentation without names and number: a segmentation model has them.

    Raises:
        FileNotFoundError: If there is no file of names.
        ValueError: If names, numbers or the classes of both sources do not fit together; the error lists all reasons.
    """
    if options.task == "segmentation":
        return _names_of_file(options)
    names = source.classes
    errors = []
    if names is None and options.nb_classes is None:
        errors.append(f"{source.name!r} has no names of classes (expected nb_classes)")
    count = options.nb_classes if names is None else len(names)
    if options.nb_classes is not None and options.nb_classes != count:
        errors.append(f"nb_classes={options.nb_classes}, but {source.name!r} has {count_of(count or 0, 'class')}")
    if count is not None and count < 2:
        errors.append(f"{source.name!r} has {count_of(count, 'class')} (expected at least 2)")
    if evaluation is not None and evaluation.classes != names:
        errors.append(_difference(source, evaluation))
    raise_value_error("the classes do not fit", errors)
    return _numbered(count or 0) if names is None else list(names)


def _numbered(count: int) -> list[str]:
    return [f"LABEL_{index}" for index in range(count)]


def _difference(source: ImageSource, evaluation: ImageSource) -> str:
    """Describe how the classes of two sources differ."""
    sides = [(source, evaluation), (evaluation, source)]
    texts = []
    for one, other in sides:
        only = sorted(set(one.classes or ()) - set(other.classes or ()))
        texts.append(f"{one.name!r} alone has {join_some(only, 5) if only else 'none'}")
    return f"training and evaluation have different classes: {'; '.join(texts)}"


def _names_of_file(options: FinetuneOptions) -> list[str] | None:
    if options.class_names is None:
        return None if options.nb_classes is None else _numbered(_checked(options.nb_classes, "nb_classes"))
    path = os.fspath(options.class_names)
    if not options.class_names.is_file():
        raise FileNotFoundError(f"no names of classes at {path!r} (expected a text file, one name a line)")
    names = [line.strip() for line in options.class_names.read_text(encoding="utf-8").splitlines()]
    names = names[: len(names) - next((i for i, name in enumerate(reversed(names)) if name), 0)]
    errors = _file_errors(names, options.nb_classes)
    raise_value_error(f"the names of classes in {path!r} do not fit", errors)
    return names


def _file_errors(names: Sequence[str], count: int | None) -> list[str]:
    repeated = sorted({name for name in names if names.count(name) > 1 and name})
    errors = [f"line {number} is empty" for number, name in enumerate(names, start=1) if not name]
    if repeated:
        errors.append(f"names are given twice: {join_some(repeated, 5)}")
    if len(names) < 2:
        errors.append(f"there are {len(names)} names (expected at least 2)")
    if count is not None and count != len(names):
        errors.append(f"there are {len(names)} names, but nb_classes={count}")
    return errors


def _checked(count: int, name: str) -> int:
    if count < 2:
        raise ValueError(f"{name}={count} (expected at least 2)")
    return count
