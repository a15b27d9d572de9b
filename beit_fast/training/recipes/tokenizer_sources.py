"""The visual tokenizer of a pre-training run: one of a file, or one that is fitted to its images."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from ...configuration.beit_config import BeitConfig
from ...utils.messages import raise_value_error
from ..data.dataset import read_example
from ..data.source import ImageSource
from ..seeding import SAMPLES, derived_generator, derived_seed
from ..tokenizers import (
    DalleTokenizer,
    PatchColorTokenizer,
    PretrainedTokenizer,
    VQKDTokenizer,
    load_visual_tokenizer,
)
from ..two_views import TwoViewTransform

FITTED = "patch_colors"
_DALLE_FILE = "encoder.pkl"
_FITTED_IMAGES, _BATCH = 1024, 32


def read_tokenizer(name: str) -> PretrainedTokenizer:
    """Read a tokenizer: a folder or hub name, DALL-E's `encoder.pkl` or its folder, or a `.pth` file of VQ-KD.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If a file does not hold one.
    """
    in_folder = Path(name) / _DALLE_FILE
    if in_folder.is_file():
        return DalleTokenizer.from_dalle_file(in_folder)
    suffix = Path(name).suffix.lower()
    if suffix == ".pkl":
        return DalleTokenizer.from_dalle_file(name)
    if suffix in (".pth", ".pt"):
        return VQKDTokenizer.from_unilm_file(name)
    return load_visual_tokenizer(name)


def fit_tokenizer(
    source: ImageSource, transform: TwoViewTransform, vocab_size: int, patch_size: int, seed: int
) -> PatchColorTokenizer:
    """Fit patch colors to views of images.

    The seed draws at most 1024 images; unreadable ones are left out.

    Raises:
        ValueError: If no image can be read, or distinct patches are fewer than `vocab_size`.
    """
    order = torch.randperm(len(source), generator=derived_generator(seed, SAMPLES))[:_FITTED_IMAGES].tolist()
    return PatchColorTokenizer.fit(
        _views(source, transform, order, seed), vocab_size, patch_size=patch_size, seed=derived_seed(seed, SAMPLES)
    )


def _views(source: ImageSource, transform: TwoViewTransform, order: list[int], seed: int) -> Iterator[Tensor]:
    """Yield batches of the tokenizer's views of readable images."""
    views = (view for index in order if (view := _view(source, transform, index, seed)) is not None)
    while batch := list(itertools.islice(views, _BATCH)):
        yield torch.stack(batch)  # [B, 3, H, W]


def _view(source: ImageSource, transform: TwoViewTransform, index: int, seed: int) -> Tensor | None:
    example = read_example(source, index)
    if isinstance(example, str):  # the training counts it
        return None
    return transform(example.image, derived_generator(seed, SAMPLES, index))["tokenizer_pixels"]


def second_size(config: BeitConfig, tokenizer: PretrainedTokenizer | None, given: int | None) -> tuple[int, int]:
    """Return the size of the tokenizer's images: the given one, or one token for each patch.

    Args:
        config: The configuration of the model.
        tokenizer: The tokenizer, or None for one with the patches of the model.
        given: The size, or None.
    """
    if given is not None:
        return given, given
    patch = config.patch_size if tokenizer is None else tokenizer.patch_size
    height, width = config.window
    return height * patch, width * patch


def check_tokenizer(config: BeitConfig, tokenizer: PretrainedTokenizer, size: tuple[int, int]) -> None:
    """Check that a tokenizer gives one token to each patch.

    Raises:
        ValueError: If its grid or its channels differ.
    """
    errors = []
    grid = tokenizer.grid_size(size)
    if grid != config.window:
        height, width = config.window
        patch = tokenizer.patch_size
        errors.append(
            f"it gives {grid[0]}x{grid[1]} tokens to images of {size[0]}x{size[1]} pixels, and the model has "
            f"{height}x{width} patches (expected second_input_size={height * patch} for a height of {height} patches)"
        )
    if tokenizer.num_channels != 3:
        errors.append(f"its images have {tokenizer.num_channels} channels (expected 3)")
    raise_value_error(f"the visual tokenizer {type(tokenizer).__name__} does not fit the model", errors)
