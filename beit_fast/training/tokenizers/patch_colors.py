"""A small visual tokenizer that is trained on the spot: k-means of patch colors."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .kmeans import cluster, nearest_center
from .pretrained import PretrainedTokenizer, check_positive


class PatchColorTokenizer(PretrainedTokenizer):
    """The nearest of `vocab_size` small pictures for each patch.

    A patch is averaged to `cells` x `cells` colors. `fit` clusters such patches; the centers are the codebook
    `[vocab_size, num_channels * cells * cells]`. It needs no download, and its ids can be decoded to pixels.

    Args:
        vocab_size: The number of ids.
        patch_size: Height and width of a patch.
        cells: Rows and columns of colors in a patch, a divisor of `patch_size`.
        num_channels: Channels of the pixels.

    Raises:
        TypeError, ValueError: If a size is not a positive integer, or `cells` does not divide `patch_size`.
    """

    tokenizer_type: ClassVar[str] = "patch_colors"
    field_names: ClassVar[tuple[str, ...]] = ("vocab_size", "patch_size", "cells", "num_channels")

    def __init__(self, vocab_size: int, patch_size: int = 16, cells: int = 4, num_channels: int = 3) -> None:
        super().__init__()
        check_positive(
            type(self).__name__, vocab_size=vocab_size, patch_size=patch_size, cells=cells, num_channels=num_channels
        )
        if patch_size % cells:
            raise ValueError(f"cells={cells} is not supported (expected a divisor of patch_size={patch_size})")
        self.vocab_size, self.patch_size = vocab_size, patch_size
        self.cells, self.num_channels = cells, num_channels
        self.codebook = nn.Parameter(torch.rand(vocab_size, num_channels * cells * cells))
        self._finish_construction()

    @classmethod
    def fit(
        cls,
        images: Tensor | Iterable[Tensor],
        vocab_size: int,
        *,
        patch_size: int = 16,
        cells: int = 4,
        iterations: int = 20,
        max_patches: int = 65536,
        seed: int = 0,
    ) -> Self:
        """Cluster the patches of images; the same images and seed give the same codebook.

        Args:
            images: `[B, C, H, W]`, uint8 in 0..255 or floating point in 0..1, or batches of them. Batches may differ in
                size. Each is read once.
            vocab_size: The number of ids.
            patch_size: Height and width of a patch.
            cells: Rows and columns of colors in a patch.
            iterations: The most rounds of k-means.
            max_patches: Patches to cluster, drawn at random if there are more. Memory grows with it, not with the
                number of images.
            seed: Of the patches and of the first centers.

        Raises:
            TypeError: If `images` has no tensors, or a size is not an integer.
            ValueError: If there are no images, pixels or sizes do not fit, or distinct patches are fewer than ids.
        """
        check_positive(f"{cls.__name__}.fit", vocab_size=vocab_size, iterations=iterations, max_patches=max_patches)
        if max_patches < vocab_size:
            raise ValueError(f"max_patches={max_patches} is not supported (expected at least vocab_size={vocab_size})")
        generator = torch.Generator().manual_seed(seed)
        tokenizer: Self | None = None
        kept, keys = torch.empty(0), torch.empty(0, dtype=torch.float64)
        for batch in [images] if isinstance(images, Tensor) else images:
            if tokenizer is None:
                channels = batch.shape[1] if isinstance(batch, Tensor) and batch.ndim == 4 else 3
                with torch.device("meta"):  # draw nothing from the global generator
                    tokenizer = cls(vocab_size, patch_size, cells, channels)
            points = tokenizer._colors(tokenizer.preprocess(batch)).flatten(0, 2).cpu()
            # The patches with the smallest of random keys are a uniform sample of all patches.
            drawn = torch.rand(len(points), generator=generator, dtype=torch.float64)
            kept, keys = torch.cat([kept.reshape(-1, points.shape[1]), points]), torch.cat([keys, drawn])
            if len(keys) > max_patches:
                order = keys.argsort(stable=True)[:max_patches].sort().values
                kept, keys = kept[order], keys[order]
        if tokenizer is None:
            raise ValueError("there are no images to fit the visual tokenizer (expected a tensor, or batches of them)")
        centers = cluster(kept, vocab_size, iterations, seed)
        tokenizer.codebook = nn.Parameter(centers.float(), requires_grad=False)
        return tokenizer

    def decode(self, ids: Tensor) -> Tensor:
        """Return the pictures of ids.

        Args:
            ids: `[B, h, w]`, of an integer dtype.

        Returns:
            Pixels in 0..1, `[B, C, h * patch_size, w * patch_size]`, float32.

        Raises:
            TypeError: If `ids` is not a tensor.
            ValueError: If shape or dtype differ, or ids are outside the vocabulary (checked on a CPU only).
        """
        if not isinstance(ids, Tensor):
            raise TypeError(f"ids are of type {type(ids).__name__} (expected a torch.Tensor)")
        if ids.ndim != 3 or ids.is_floating_point() or ids.dtype == torch.bool:
            raise ValueError(f"ids are {list(ids.shape)} {ids.dtype} (expected [batch, rows, columns] of integers)")
        if ids.device.type == "cpu" and ids.numel():
            low, high = int(ids.min()), int(ids.max())
            if low < 0 or high >= self.vocab_size:
                raise ValueError(f"ids are from {low} to {high} (expected 0 to {self.vocab_size - 1})")
        colors = self.codebook[ids.long()]  # [B, h, w, C * cells * cells]
        colors = colors.unflatten(-1, (self.num_channels, self.cells, self.cells)).permute(0, 3, 1, 4, 2, 5)
        pixels = colors.flatten(4, 5).flatten(2, 3)  # [B, C, h * cells, w * cells]
        repeat = self.patch_size // self.cells
        return pixels.repeat_interleave(repeat, 2).repeat_interleave(repeat, 3)

    def _normalize(self, pixels: Tensor) -> Tensor:
        return pixels

    def _ids(self, values: Tensor) -> Tensor:
        colors = self._colors(values)
        index, _ = nearest_center(colors.flatten(0, 2), self.codebook)
        return index.unflatten(0, colors.shape[:3])

    def _colors(self, values: Tensor) -> Tensor:
        """Average pixels to the colors of each patch.

        The shapes are `[B, C, H, W]` and `[B, h, w, C * cells * cells]`.
        """
        cells = F.avg_pool2d(values, self.patch_size // self.cells)  # [B, C, h * cells, w * cells]
        patches = cells.unflatten(2, (-1, self.cells)).unflatten(4, (-1, self.cells))
        return patches.permute(0, 2, 4, 1, 3, 5).flatten(3)
