"""Sources of training images: what the training loop reads from."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

if TYPE_CHECKING:
    from PIL.Image import Image as PillowImage

SourceKind = Literal["images", "classes", "segmentation"]
"""What a source has: images, images with class ids, or images with annotations."""


class Example(NamedTuple):
    """One image and its label.

    Attributes:
        image: An upright RGB image of Pillow.
        label: The class id; or an image of class ids of the same size, as stored; None without labels.
    """

    image: PillowImage
    label: int | PillowImage | None


class ImageSource(Protocol):
    """Images by their indices, with labels or without.

    Attributes:
        name: The path of the source, for errors.
        classes: Names of the classes by id; None without classes or without names.
        groups: Rows of each contiguous block that is cheap to read together, such as the row groups of Parquet. None
            if each image is read on its own.
    """

    name: str
    classes: tuple[str, ...] | None
    groups: tuple[int, ...] | None

    def __len__(self) -> int:
        """Count the images."""
        ...

    def read(self, index: int) -> Example:
        """Read one image with its label. Any exception means that it is unreadable."""
        ...

    def name_of(self, index: int) -> str:
        """Name one image, for errors and logs."""
        ...

    def digest(self) -> str:
        """Return a hash of the names and labels, in hexadecimal.

        It does not depend on the location of the source.
        """
        ...


def digest_of(parts: Iterable[str]) -> str:
    """Return a hash of strings, in hexadecimal."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode("utf-8", "surrogateescape") + b"\0")
    return digest.hexdigest()
