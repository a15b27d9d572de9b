"""Labels of masked image modeling, from a visual tokenizer.

The configuration names the tokenizer. Models do not import `training`, so the class that `register()` adds to the Auto
class makes the labels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...configuration.beit_config import BeitConfig
from ...layers.embeddings import window_of
from ...models.inputs import check_inputs
from ...training.tokenizers import PretrainedTokenizer, load_visual_tokenizer
from ...utils.messages import raise_value_error

_PROCESSOR_MEAN = _PROCESSOR_STD = 0.5  # defaults of BEiT's image processor
_LARGEST_PIXEL = 255
_OVERSHOOT = 0.15  # outside 0..1, of bicubic resizing


class TokenLabels:
    """Visual tokens of masked patches.

    The first call reads the tokenizer. Copies and pickles hold no tokenizer and read it again.
    """

    def __init__(self) -> None:
        self._name: str | None = None
        self._tokenizers: dict[torch.device, PretrainedTokenizer] = {}

    def __reduce__(self) -> tuple[type[TokenLabels], tuple[()]]:
        return type(self), ()

    @torch.compiler.disable
    @torch.no_grad()
    def __call__(self, config: BeitConfig, pixel_values: Tensor, bool_masked_pos: Tensor) -> Tensor | None:
        """Make the labels of masked patches.

        Args:
            config: The model's configuration. It names the tokenizer, and may have the mean and standard deviation.
            pixel_values: `[B, C, H, W]`: uint8, or normalized.
            bool_masked_pos: `[B, P]` or `[B, h, w]` of any dtype.

        Returns:
            int64 `[masked patches]`; None for masks of another shape, which the model reports.

        Raises:
            FileNotFoundError: If the tokenizer is missing.
            ValueError: If it does not fit the model, or pixels are not in 0..1 without their normalization.
        """
        window = window_of(pixel_values, config.patch_size)
        masked = bool_masked_pos.flatten(1).bool().to(pixel_values.device)
        if masked.shape != (pixel_values.shape[0], window[0] * window[1]):
            return None
        is_first = pixel_values.device not in self._tokenizers
        tokenizer = self._tokenizer_on(pixel_values.device, config)
        height, width = (count * config.patch_size for count in window)
        pixels = _without_normalization(config, pixel_values[..., :height, :width])
        if is_first or pixels.device.type == "cpu":  # elsewhere each check would wait for the device
            _check_range(config, pixels)
        size = window[0] * tokenizer.patch_size, window[1] * tokenizer.patch_size
        if size != (height, width):
            pixels = F.interpolate(pixels, size, mode="bicubic", antialias=True)
        return tokenizer(pixels.clamp(0, 1)).flatten(1)[masked]

    def _tokenizer_on(self, device: torch.device, config: BeitConfig) -> PretrainedTokenizer:
        if config.visual_tokenizer != self._name:
            self._tokenizers.clear()
        if device not in self._tokenizers:
            self._tokenizers[device] = _load(config).to(device)
            self._name = config.visual_tokenizer
        return self._tokenizers[device]


def making_labels(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the forward of masked image modeling to make labels.

    It makes them if there is a mask, no labels, and a tokenizer in the configuration.
    """

    @functools.wraps(forward)
    def forward_with_labels(
        self: Any,
        pixel_values: Tensor,
        bool_masked_pos: Tensor | None = None,
        labels: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if labels is None and bool_masked_pos is not None and self.config.visual_tokenizer is not None:
            check_inputs(pixel_values, self.config.num_channels, bool_masked_pos)
            make_labels = vars(self).setdefault("_token_labels", TokenLabels())
            labels = make_labels(self.config, pixel_values, bool_masked_pos)
        return forward(self, pixel_values, bool_masked_pos, labels, *args, **kwargs)

    return forward_with_labels


def _load(config: BeitConfig) -> PretrainedTokenizer:
    """Read the tokenizer of a configuration, and check that it fits.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If the tokenizer cannot be read, or does not fit; the error lists every reason.
    """
    heading = f"visual_tokenizer={config.visual_tokenizer!r} of the configuration"
    try:
        tokenizer = load_visual_tokenizer(config.visual_tokenizer or "")
    except (OSError, TypeError, ValueError) as error:
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
        raise kind(f"{heading} cannot be read: {error}") from error
    errors = []
    if tokenizer.vocab_size > config.vocab_size:
        errors.append(f"it has {tokenizer.vocab_size} tokens (expected at most vocab_size={config.vocab_size})")
    if tokenizer.num_channels != config.num_channels:
        errors.append(f"its images have {tokenizer.num_channels} channels (expected {config.num_channels})")
    raise_value_error(f"{heading} does not fit the model", errors)
    return tokenizer


def _normalization(config: BeitConfig) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation of the configuration.

    Without them they are the defaults of BEiT's image processor.
    """
    if config.pixel_mean is None or config.pixel_std is None:
        return [_PROCESSOR_MEAN] * config.num_channels, [_PROCESSOR_STD] * config.num_channels
    return list(config.pixel_mean), list(config.pixel_std)


def _without_normalization(config: BeitConfig, pixel_values: Tensor) -> Tensor:
    """Return float32 pixels, from 0 to 1 apart from rounding and overshoot."""
    if pixel_values.dtype == torch.uint8:
        return pixel_values.float() / _LARGEST_PIXEL
    mean, std = (pixel_values.new_tensor(each, dtype=torch.float32) for each in _normalization(config))
    return pixel_values.float() * std[:, None, None] + mean[:, None, None]


def _check_range(config: BeitConfig, pixels: Tensor) -> None:
    if not pixels.numel():
        return
    low, high = (bound.item() for bound in pixels.aminmax())
    if not (low >= -_OVERSHOOT and high <= 1 + _OVERSHOOT):
        mean, std = _normalization(config)
        raise ValueError(
            f"pixel_values times std={std} plus mean={mean} are from {low:.4g} to {high:.4g} (expected 0..1 for the "
            "visual tokenizer: set pixel_mean and pixel_std of the configuration to the image processor's image_mean "
            "and image_std)"
        )
