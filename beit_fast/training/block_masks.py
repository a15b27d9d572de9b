"""Blockwise masks of patches, as in BEiT's pre-training."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..configuration.fields import is_integer, is_number, to_integer
from ..utils.messages import FieldError, describe, raise_errors
from .arguments import sides_of, size_errors
from .seeding import MASKS, RandomStream, seed_errors

_ATTEMPTS = 10  # of unilm's generator, for one block
_MOST_ATTEMPTS = 100_000


class BlockMaskGenerator:
    """Draw blockwise masks of patches (algorithm 1 of the paper).

    Blocks are added until `num_masking_patches` patches are masked. The area of a block is uniform from
    `min_num_patches` to the patches that are still to be masked, or to `max_num_patches`. Its aspect ratio, height by
    width, is log-uniform. Its sides are rounded and smaller than those of the window; its position is uniform. A
    block is drawn again if it masks no new patch or too many. Names and defaults are those of unilm's pre-training.

    Args:
        input_size: The window in patches: an int for a square, or (height, width).
        num_masking_patches: Patches to mask in each image.
        min_num_patches, max_num_patches: Range of the area of a block. None is `num_masking_patches`. If fewer
            patches than the minimum are still to be masked, the area is between that number and the minimum.
        min_aspect, max_aspect: Range of the aspect ratio; None is `1 / min_aspect`.
        exact: Whether every mask has `num_masking_patches`. If False, a mask is complete after ten blocks in a row
            that do not fit, as in unilm. About a third of its masks have 1 to 7 patches less.
        flat: Return `[N]` or `[B, N]` in row-major order instead of `[h, w]` or `[B, h, w]`.
        seed: Seed of an own random stream, which differs between the workers of a DataLoader and between epochs. None
            draws from torch's default generator, which a DataLoader seeds in each worker.

    Raises:
        TypeError, ValueError: If arguments do not fit; the error lists all of them.
    """

    def __init__(
        self,
        input_size: int | tuple[int, int] = 14,
        num_masking_patches: int = 75,
        min_num_patches: int = 16,
        max_num_patches: int | None = None,
        min_aspect: float = 0.3,
        max_aspect: float | None = None,
        *,
        exact: bool = True,
        flat: bool = False,
        seed: int | None = None,
    ) -> None:
        errors = size_errors("input_size", input_size, 2, "an int or a (height, width) pair of ints, each at least 2")
        errors += _count_errors("num_masking_patches", num_masking_patches)
        errors += _count_errors("min_num_patches", min_num_patches) + _aspect_errors("min_aspect", min_aspect)
        errors += [] if max_num_patches is None else _count_errors("max_num_patches", max_num_patches)
        errors += [] if max_aspect is None else _aspect_errors("max_aspect", max_aspect)
        errors += seed_errors(seed)
        raise_errors(type(self).__name__, errors)
        self.height, self.width = sides_of(input_size)
        self.num_masking_patches, self.min_num_patches = int(num_masking_patches), int(min_num_patches)
        self.max_num_patches = self.num_masking_patches if max_num_patches is None else int(max_num_patches)
        self.min_aspect = float(min_aspect)
        self.max_aspect = 1 / self.min_aspect if max_aspect is None else float(max_aspect)
        self.exact, self.flat, self.seed = exact, flat, seed
        raise_errors(type(self).__name__, self._contradictions())
        self._stream = RandomStream(seed, MASKS)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.height}x{self.width}, {self.num_masking_patches} masked, blocks of "
            f"{self.min_num_patches} to {self.max_num_patches}, aspect {self.min_aspect:.3f} to {self.max_aspect:.3f})"
        )

    @property
    def window(self) -> tuple[int, int]:
        """Height and width in patches."""
        return self.height, self.width

    def __call__(self, batch_size: int | None = None, generator: torch.Generator | None = None) -> Tensor:
        """Draw masks, True where a patch is masked.

        Args:
            batch_size: Number of masks; None is one mask without a batch dimension.
            generator: A CPU generator for this call; None is the stream of the constructor.

        Returns:
            bool `[B, h, w]`, or `[B, N]` if `flat`; without a batch size `[h, w]` or `[N]`.

        Raises:
            ValueError: If `batch_size` is not an int from 0, or blocks that complete an exact mask are not found.
        """
        batch_size = to_integer(batch_size)
        if batch_size is not None and (not is_integer(batch_size) or batch_size < 0):
            raise ValueError(f"{describe('batch_size', batch_size)} (expected an int from 0, or None)")
        count = 1 if batch_size is None else int(batch_size)
        masks = torch.from_numpy(self._draw(count, self._stream.generator() if generator is None else generator))
        if self.flat:
            masks = masks.flatten(1)
        return masks[0] if batch_size is None else masks

    def _draw(self, count: int, generator: torch.Generator | None) -> np.ndarray:
        """Draw bool masks `[count, h, w]`, one block a round."""
        masks = np.zeros((count, *self.window), dtype=np.bool_)
        remaining = np.full(count, self.num_masking_patches)
        failed = np.zeros(count, dtype=np.int64)
        unfinished = np.arange(count)
        attempts = _MOST_ATTEMPTS if self.exact else _ATTEMPTS
        while len(unfinished):
            limit = np.minimum(remaining[unfinished], self.max_num_patches)
            added = self._blocks(limit, generator) & ~masks[unfinished]  # [unfinished, h, w]
            counts = added.sum((1, 2))
            accepted = (counts > 0) & (counts <= limit)
            masks[unfinished[accepted]] |= added[accepted]
            remaining[unfinished[accepted]] -= counts[accepted]
            failed[unfinished] = np.where(accepted, 0, failed[unfinished] + 1)
            unfinished = unfinished[(remaining[unfinished] > 0) & (failed[unfinished] < attempts)]
        if self.exact and remaining.any():
            raise ValueError(
                f"{self!r} found no block for the last {remaining.max()} of its patches after {_MOST_ATTEMPTS} "
                "attempts; change the limits of blocks, or pass exact=False"
            )
        return masks

    def _blocks(self, limit: np.ndarray, generator: torch.Generator | None) -> np.ndarray:
        """Draw blocks, bool `[n, h, w]`, of areas up to `limit`.

        Blocks that do not fit are empty.
        """
        uniform = torch.rand(4, len(limit), dtype=torch.float64, generator=generator).numpy()
        area = self.min_num_patches + (limit - self.min_num_patches) * uniform[0]
        low, high = math.log(self.min_aspect), math.log(self.max_aspect)
        aspect = np.exp(low + (high - low) * uniform[1])
        block_height, block_width = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
        fits = (block_height < self.height) & (block_width < self.width)
        top = np.floor(uniform[2] * (self.height - block_height + 1))
        left = np.floor(uniform[3] * (self.width - block_width + 1))
        rows, columns = np.arange(self.height), np.arange(self.width)
        in_rows = (rows >= top[:, None]) & (rows < (top + block_height)[:, None])
        in_columns = (columns >= left[:, None]) & (columns < (left + block_width)[:, None])
        return (in_rows & fits[:, None])[:, :, None] & in_columns[:, None, :]

    def _contradictions(self) -> list[FieldError]:
        """Return why masks of these numbers do not exist."""
        height, width, patches = *self.window, self.height * self.width
        errors = []
        if self.num_masking_patches > patches:
            errors.append(
                f"num_masking_patches={self.num_masking_patches} (expected at most {patches}, the patches of a window "
                f"of {height}x{width})"
            )
        if self.min_num_patches > self.max_num_patches:
            errors.append(
                f"min_num_patches={self.min_num_patches} (expected at most max_num_patches={self.max_num_patches})"
            )
        if self.min_aspect > self.max_aspect:
            errors.append(f"min_aspect={self.min_aspect:g} (expected at most max_aspect={self.max_aspect:g})")
        # The smallest block has the most aspect ratios whose rounded sides are smaller than the window.
        area = self.min_num_patches
        least, most = area / (width - 0.5) ** 2, (height - 0.5) ** 2 / area
        if not errors and max(least, self.min_aspect) > min(most, self.max_aspect):
            errors.append(
                f"blocks of {area} patches with aspect ratios from {self.min_aspect:g} to {self.max_aspect:g} do not "
                f"fit (expected blocks lower and narrower than the window of {height}x{width})"
            )
        return [FieldError(error) for error in errors]


def _count_errors(name: str, count: object) -> list[FieldError]:
    number = to_integer(count)
    fits = is_integer(number) and number >= 1
    return [] if fits else [FieldError(f"{describe(name, count)} (expected a positive int)", not is_integer(number))]


def _aspect_errors(name: str, aspect: Any) -> list[FieldError]:
    fits = is_number(aspect) and 0 < aspect < math.inf
    return [] if fits else [FieldError(f"{describe(name, aspect)} (expected a positive number)", not is_number(aspect))]
