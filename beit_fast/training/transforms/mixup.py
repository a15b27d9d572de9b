"""Mixup (arXiv 1710.09412), CutMix (arXiv 1905.04899) and soft targets."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from ...configuration.fields import is_integer, is_number
from ...utils.messages import FieldError, describe, join_choices, join_some, raise_errors
from ..arguments import fraction_errors
from .random_numbers import numpy_generator

MixupMode = Literal["batch", "elem", "pair"]
MIXUP_MODES: tuple[MixupMode, ...] = get_args(MixupMode)


class _Mix(NamedTuple):
    """How images are mixed with their partners.

    Args:
        shares: float64 `[B]`, the share of each image that is its own.
        is_cut: bool `[B]`, whether a rectangle is replaced instead.
        boxes: int64 `[B, 4]`, top, bottom, left and right of the rectangle.
    """

    shares: np.ndarray
    is_cut: np.ndarray
    boxes: np.ndarray


class Mixup:
    """Mix each image of a batch, and its targets, with another.

    Image `i` of `B` is mixed with image `B - 1 - i`, as in timm. The share of mixup is drawn from Beta(alpha, alpha).
    CutMix replaces a rectangle whose sides are `sqrt(1 - share)` of the image, around a uniform center; its part
    outside the image is cut off, and the share is that of the pixels which are left.

    Args:
        num_classes: Number of classes.
        mixup, cutmix: The alpha of both; 0 turns one off. With both at 0, targets are only smoothed.
        probability: Probability of mixing. unilm's name is `mixup_prob`.
        switch_probability: Probability of CutMix if both are on. unilm's name is `mixup_switch_prob`.
        mode: Draw once for a `"batch"`, for each image (`"elem"`), or for each `"pair"` of images. unilm's name is
            `mixup_mode`.
        smoothing: Label smoothing: the share of the target that is spread over all classes.

    Raises:
        TypeError, ValueError: If arguments do not fit; the error lists all of them.
    """

    def __init__(
        self,
        num_classes: int,
        mixup: float = 0.8,
        cutmix: float = 1.0,
        probability: float = 1.0,
        switch_probability: float = 0.5,
        mode: MixupMode = "batch",
        smoothing: float = 0.1,
    ) -> None:
        errors = _class_errors(num_classes) + _alpha_errors("mixup", mixup) + _alpha_errors("cutmix", cutmix)
        for name, value in {
            "probability": probability,
            "switch_probability": switch_probability,
            "smoothing": smoothing,
        }.items():
            errors += fraction_errors(name, value)
        if mode not in MIXUP_MODES:
            errors.append(FieldError(f"{describe('mode', mode)} (expected {join_choices(MIXUP_MODES)})"))
        raise_errors(type(self).__name__, errors)
        self.num_classes, self.mixup, self.cutmix = num_classes, mixup, cutmix
        self.probability, self.switch_probability = probability, switch_probability
        self.mode, self.smoothing = mode, smoothing

    def __call__(self, pixel_values: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Mix a batch.

        Args:
            pixel_values: Floating-point `[B, C, H, W]`; not modified.
            labels: Class ids `[B]` of any integer dtype.
            generator: A CPU generator, from which all random numbers come.

        Returns:
            Mixed pixels `[B, C, H, W]`, and targets float32 `[B, num_classes]`, whose rows sum to 1.

        Raises:
            ValueError: If there is not one class id for each image, or an id is outside the classes.
        """
        targets = soft_targets(labels, self.num_classes, self.smoothing)
        if len(targets) != len(pixel_values):
            raise ValueError(f"{type(self).__name__} got {len(targets)} labels for {len(pixel_values)} images")
        if not (self.mixup or self.cutmix):
            return pixel_values, targets
        height, width = pixel_values.shape[-2:]
        mix = self._draw(len(pixel_values), height, width, numpy_generator(generator))
        return _mixed_pixels(pixel_values, mix), _mixed_targets(targets, mix.shares)

    def _draw(self, batch: int, height: int, width: int, random: np.random.Generator) -> _Mix:
        """Draw, and repeat each draw for the images that share it."""
        count = {"batch": 1, "elem": batch, "pair": (batch + 1) // 2}[self.mode]
        if self.mixup and self.cutmix:
            is_cut = random.random(count) < self.switch_probability
        else:
            is_cut = np.full(count, bool(self.cutmix))
        alphas = np.where(is_cut, self.cutmix, self.mixup)
        shares = random.beta(alphas, alphas)
        shares = np.where(random.random(count) < self.probability, shares, 1.0)
        boxes = _boxes(shares, height, width, random)
        areas = (boxes[:, 1] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 2])
        shares = np.where(is_cut, 1.0 - areas / (height * width), shares)
        places = np.arange(batch)
        places = {"batch": places * 0, "elem": places, "pair": np.minimum(places, places[::-1])}[self.mode]
        return _Mix(shares[places], is_cut[places], boxes[places])


def soft_targets(labels: Tensor, num_classes: int, smoothing: float = 0.0) -> Tensor:
    """Convert class ids to probabilities, for `torch.nn.functional.cross_entropy`.

    Args:
        labels: Class ids `[B]` of any integer dtype, on a CPU.
        num_classes: Number of classes.
        smoothing: Share of the target that is spread over all classes.

    Returns:
        float32 `[B, num_classes]`. A class id has `1 - smoothing + smoothing / num_classes`.

    Raises:
        ValueError: If labels are not class ids.
    """
    is_integer_dtype = labels.dtype != torch.bool and not (labels.is_floating_point() or labels.is_complex())
    expected = f"class ids [B] of an integer dtype, from 0 to {num_classes - 1}"
    if labels.ndim != 1 or not is_integer_dtype:
        dtype = str(labels.dtype).removeprefix("torch.")
        raise ValueError(f"labels are {dtype} {list(labels.shape)} (expected {expected})")
    labels = labels.long()
    wrong = labels[(labels < 0) | (labels >= num_classes)].unique().tolist()
    if wrong:
        raise ValueError(f"labels contain {join_some(wrong, 5)} (expected {expected})")
    targets = torch.full((len(labels), num_classes), smoothing / num_classes)
    return targets.scatter_(1, labels[:, None], 1.0 - smoothing + smoothing / num_classes)


def _boxes(shares: np.ndarray, height: int, width: int, random: np.random.Generator) -> np.ndarray:
    """Draw the rectangles of CutMix, int64 `[n, 4]`."""
    sides = np.sqrt(1.0 - shares)
    box_height, box_width = (height * sides).astype(np.int64), (width * sides).astype(np.int64)
    center_y, center_x = random.integers(height, size=len(shares)), random.integers(width, size=len(shares))
    edges = [center_y - box_height // 2, center_y + (box_height + 1) // 2]
    edges += [center_x - box_width // 2, center_x + (box_width + 1) // 2]
    limits = [height, height, width, width]
    return np.stack([np.clip(edge, 0, limit) for edge, limit in zip(edges, limits, strict=True)], axis=1)


def _mixed_pixels(pixel_values: Tensor, mix: _Mix) -> Tensor:
    partners = pixel_values.flip(0)
    mixed = pixel_values.clone()
    for index, (share, is_cut, box) in enumerate(zip(mix.shares, mix.is_cut, mix.boxes, strict=True)):
        if is_cut:
            top, bottom, left, right = box
            mixed[index, :, top:bottom, left:right] = partners[index, :, top:bottom, left:right]
        elif share < 1:
            mixed[index].mul_(share).add_(partners[index], alpha=1 - share)
    return mixed


def _mixed_targets(targets: Tensor, shares: np.ndarray) -> Tensor:
    own = torch.from_numpy(shares).float()[:, None]  # [B, 1]
    return targets * own + targets.flip(0) * (1 - own)


def _class_errors(num_classes: Any) -> list[FieldError]:
    has_type = is_integer(num_classes)
    if has_type and num_classes >= 2:
        return []
    return [FieldError(f"{describe('num_classes', num_classes)} (expected an int from 2)", not has_type)]


def _alpha_errors(name: str, value: Any) -> list[FieldError]:
    if is_number(value) and 0 <= value < math.inf:
        return []
    return [FieldError(f"{describe(name, value)} (expected a number from 0; 0 turns it off)", not is_number(value))]
