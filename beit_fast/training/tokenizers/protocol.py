"""The interface of a visual tokenizer."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class VisualTokenizer(Protocol):
    """A map from pixels to one id for each patch.

    `tokenizer(pixels)` is `tokenizer.encode(tokenizer.preprocess(pixels))`. A data loader may call `preprocess` in its
    workers, and the training loop `encode`.

    Attributes:
        vocab_size: The number of ids; they are 0 to `vocab_size - 1`.
        patch_size: Height and width in pixels of the patch that has one id.
        num_channels: Channels of the pixels.
    """

    vocab_size: int
    patch_size: int
    num_channels: int

    def grid_size(self, image_size: int | tuple[int, int]) -> tuple[int, int]:
        """Return the rows and columns of ids.

        Args:
            image_size: Height and width of the images, or one number for both.

        Raises:
            ValueError: If the tokenizer does not take images of that size.
        """
        ...

    def preprocess(self, pixels: Tensor) -> Tensor:
        """Convert pixels to the numbers that `encode` takes, without resizing.

        Args:
            pixels: `[B, C, H, W]`, uint8 in 0..255 or floating point in 0..1.

        Returns:
            `[B, C, H, W]`, float32.

        Raises:
            TypeError: If `pixels` is not a tensor.
            ValueError: If its shape, dtype or values do not fit. Values are checked on a CPU only.
        """
        ...

    def encode(self, values: Tensor) -> Tensor:
        """Return the ids of preprocessed pixels: `[B, C, H, W]` float32 to `[B, h, w]` int64."""
        ...

    def __call__(self, pixels: Tensor) -> Tensor:
        """Return the ids of pixels: `[B, C, H, W]` as in `preprocess` to `[B, h, w]` int64."""
        ...
