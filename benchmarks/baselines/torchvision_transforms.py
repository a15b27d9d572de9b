"""The training transforms of BEiT by torchvision, for Pillow images, as unilm composes them."""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

Pipeline = Callable[[Path], Any]

_META = "torchvision._meta_registrations"


def import_torchvision() -> tuple[Any, Any]:
    """Import torchvision and its transforms.

    torchvision's operators may not load beside this torch; transforms of Pillow images do not need them. The module
    that describes these operators is then left out.

    Raises:
        ImportError: If torchvision is not installed.
    """
    try:
        package = importlib.import_module("torchvision")
    except RuntimeError:
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        sys.modules[_META] = types.ModuleType(_META)
        package = importlib.import_module("torchvision")
    return package, importlib.import_module("torchvision.transforms")


def two_views(color_jitter: float | None, whole: bool = False) -> Pipeline:
    """Return the two views of pre-training: 224 bicubic and normalized, 112 Lanczos.

    With `whole`, the crop is the whole image and there is no flip.
    """
    _, transforms = import_torchvision()
    functional, filters = transforms.functional, transforms.InterpolationMode
    scale, ratio = ((1.0, 1.0), (4 / 3, 4 / 3)) if whole else ((0.08, 1.0), (3 / 4, 4 / 3))
    flip = transforms.RandomHorizontalFlip(0.0 if whole else 0.5)
    jitter = [] if color_jitter is None else [transforms.ColorJitter(color_jitter, color_jitter, color_jitter)]
    before = transforms.Compose([*jitter, flip])
    normalize = transforms.Compose([transforms.ToTensor(), transforms.Normalize([0.5] * 3, [0.5] * 3)])
    to_tensor = transforms.ToTensor()

    def transform(file: Path) -> tuple[Any, Any]:
        image = before(load(file))
        crop = transforms.RandomResizedCrop.get_params(image, scale, ratio)
        view = functional.resized_crop(image, *crop, [224, 224], filters.BICUBIC)
        second = functional.resized_crop(image, *crop, [112, 112], filters.LANCZOS)
        return normalize(view), to_tensor(second)

    return transform


def classification(whole: bool = False) -> Pipeline:
    """Return the transform of a classifier: crop, flip, jitter 0.4 and normalize."""
    _, transforms = import_torchvision()
    scale, ratio = ((1.0, 1.0), (4 / 3, 4 / 3)) if whole else ((0.08, 1.0), (3 / 4, 4 / 3))
    steps = [
        transforms.RandomResizedCrop(224, scale, ratio, interpolation=transforms.InterpolationMode.BICUBIC),
        transforms.RandomHorizontalFlip(0.0 if whole else 0.5),
        *([] if whole else [transforms.ColorJitter(0.4, 0.4, 0.4)]),
        transforms.ToTensor(),
        transforms.Normalize([0.5] * 3, [0.5] * 3),
    ]
    composed = transforms.Compose(steps)
    return lambda file: (composed(load(file)),)


def load(file: Path) -> Image.Image:
    with file.open("rb") as stream:
        return Image.open(stream).convert("RGB")
