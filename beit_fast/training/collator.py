"""Batches for masked image modeling."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ..position_bias import Window
from ..utils.messages import join_some, raise_value_error
from .block_masks import BlockMaskGenerator

_MASK_NAMES = ("bool_masked_pos", "mask")
_SHOWN = 5


class MaskedModelingConfig(Protocol):
    """The fields that the collator reads; a `BeitConfig` of this package or of Transformers has them."""

    patch_size: Any
    vocab_size: int
    use_mask_token: bool


class MaskedImageCollator:
    """Collate images to `pixel_values`, `bool_masked_pos` and `labels`.

    The batch is that of `BeitForMaskedImageModeling`, here and in Transformers: one label, a visual token, for each
    True of `bool_masked_pos` in row-major order (equation 2 of the paper). The number of labels is not the batch
    size, so `torch.nn.DataParallel` and `dispatch_batches` of accelerate cannot split the batch.

    Args:
        config: The model's configuration: its patch size and vocabulary.
        mask_generator: Draws the masks of a batch. None: each example has its mask.
        tokenizer: Computes visual tokens, an integer tensor `[B, h, w]` or `[B, N]`, from `tokenizer_pixels`
            `[B, C, H, W]`. It is called without gradients. None: each example has its visual tokens.

    Raises:
        ValueError: If the model has no mask token, or the tokenizer's `vocab_size` is larger than the model's.
    """

    def __init__(
        self,
        config: MaskedModelingConfig,
        mask_generator: BlockMaskGenerator | None = None,
        tokenizer: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        errors = []
        if not config.use_mask_token:
            errors.append("the model has no mask token (expected a configuration with use_mask_token=True)")
        tokens = getattr(tokenizer, "vocab_size", None)
        if isinstance(tokens, int) and tokens > config.vocab_size:
            errors.append(f"the tokenizer has {tokens} tokens (expected at most vocab_size={config.vocab_size})")
        raise_value_error(f"{type(self).__name__} got arguments that do not fit", errors)
        patch = config.patch_size
        self.patch_size: tuple[int, int] = tuple(patch) if isinstance(patch, (tuple, list)) else (patch, patch)
        self.vocab_size = config.vocab_size
        self.mask_generator = mask_generator
        self.visual_tokenizer = tokenizer  # `Trainer` saves an attribute `tokenizer` of a collator

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Collate examples.

        Args:
            examples: Mappings with `pixel_values` `[C, H, W]`, all of one size, and

                - without a mask generator, `bool_masked_pos` or `mask`: bool, or numbers 0 and 1, `[h, w]` or `[N]`.
                  `mask` is the name in Transformers' `run_mim.py`.
                - with a tokenizer, `tokenizer_pixels` `[C, H, W]`, else `visual_tokens`: integers `[h, w]` or `[N]`.

                `h` and `w` count the whole patches of `pixel_values`, and `N = h * w`. Other fields are ignored.

        Returns:
            `pixel_values` `[B, C, H, W]`, `bool_masked_pos` bool `[B, N]`, `labels` int64 `[masked patches]`.

        Raises:
            ValueError: If fields are missing, or masks or visual tokens do not fit; the error lists every reason.
        """
        heading = f"{type(self).__name__} got examples that do not fit"
        errors = _field_errors(examples, self.mask_generator is not None, self.visual_tokenizer is not None)
        raise_value_error(heading, errors)
        pixels = _stacked(examples, "pixel_values", errors)  # [B, C, H, W]
        masks = self._masks(examples, errors)
        tokens = _stacked(examples, "visual_tokens" if self.visual_tokenizer is None else "tokenizer_pixels", errors)
        raise_value_error(heading, errors)
        window = self._window(pixels)
        if self.visual_tokenizer is not None:
            with torch.no_grad():
                tokens = self.visual_tokenizer(tokens)
        errors += _grid_errors(masks, "masks", len(pixels), window) + _mask_errors(masks)
        errors += _grid_errors(tokens, "visual tokens", len(pixels), window) + self._token_errors(tokens)
        raise_value_error(heading, errors)
        masked = masks.flatten(1).bool()
        labels = tokens.to(masked.device).flatten(1)[masked].long()  # [masked patches]
        return {"pixel_values": pixels, "bool_masked_pos": masked, "labels": labels}

    def _masks(self, examples: Sequence[Mapping[str, Any]], errors: list[str]) -> Tensor:
        """Draw the masks, or stack those of the examples."""
        if self.mask_generator is not None:
            return self.mask_generator(len(examples))
        return _stacked(examples, next(name for name in _MASK_NAMES if name in examples[0]), errors)

    def _window(self, pixels: Tensor) -> Window:
        """Count the whole patches of `[B, C, H, W]`."""
        height, width = pixels.shape[-2:] if pixels.ndim == 4 else (0, 0)
        window = height // self.patch_size[0], width // self.patch_size[1]
        if 0 in window:
            raise ValueError(
                f"pixel_values of an example are {list(pixels.shape[1:])} (expected [channels, height, width] with at "
                f"least one patch of {self.patch_size[0]}x{self.patch_size[1]})"
            )
        return window

    def _token_errors(self, tokens: Tensor) -> list[str]:
        """Return why values of visual tokens do not fit the vocabulary."""
        expected = f"integers from 0 to {self.vocab_size - 1}, the model's vocabulary"
        if tokens.dtype == torch.bool or tokens.is_floating_point() or tokens.is_complex():
            return [f"visual tokens are {str(tokens.dtype).removeprefix('torch.')} (expected {expected})"]
        tokens = tokens.long()
        wrong = tokens[(tokens < 0) | (tokens >= self.vocab_size)].unique().tolist()
        return [f"visual tokens contain {join_some(wrong, _SHOWN)} (expected {expected})"] if wrong else []


def _field_errors(examples: Sequence[Mapping[str, Any]], has_generator: bool, has_tokenizer: bool) -> list[str]:
    """Return which fields examples lack, or have twice."""
    if len(examples) == 0:
        return ["there are no examples"]
    counts = {
        name: sum(name in example for example in examples)
        for name in ("pixel_values", *_MASK_NAMES, "tokenizer_pixels", "visual_tokens")
    }
    errors = []
    for name, count in counts.items():
        if 0 < count < len(examples):
            errors.append(f"{count} of {len(examples)} examples have {name} (expected all or none)")
    if not counts["pixel_values"]:
        errors.append("the examples have no pixel_values")
    given_masks = [name for name in _MASK_NAMES if counts[name]]
    if has_generator and given_masks:
        errors.append(f"the examples have {' and '.join(given_masks)} and there is a mask_generator (expected one)")
    elif not has_generator and len(given_masks) != 1:
        have = "no masks" if not given_masks else "bool_masked_pos and mask"
        errors.append(f"the examples have {have} (expected a mask_generator, or bool_masked_pos or mask)")
    if has_tokenizer and counts["visual_tokens"]:
        errors.append("the examples have visual_tokens and there is a tokenizer (expected one)")
    elif has_tokenizer and not counts["tokenizer_pixels"]:
        errors.append("the examples have no tokenizer_pixels, which the tokenizer requires")
    elif not has_tokenizer and not counts["visual_tokens"]:
        errors.append("the examples have no visual_tokens (expected visual_tokens, or a tokenizer)")
    return errors


def _stacked(examples: Sequence[Mapping[str, Any]], name: str, errors: list[str]) -> Tensor:
    """Stack a field, or add an error if its shapes differ.

    The result is then empty.
    """
    tensors = [torch.as_tensor(example[name]) for example in examples]
    shapes = sorted({tuple(tensor.shape) for tensor in tensors})
    if len(shapes) == 1:
        return torch.stack(tensors)
    errors.append(f"{name} have the shapes {join_some(map(list, shapes), _SHOWN)} (expected one shape)")
    return torch.empty(0)


def _grid_errors(values: Tensor, what: str, batch: int, window: Window) -> list[str]:
    patches = window[0] * window[1]
    if tuple(values.shape) in ((batch, *window), (batch, patches)):
        return []
    expected = f"{[batch, *window]} or {[batch, patches]}, the patches of pixel_values"
    return [f"{what} are {list(values.shape)} (expected {expected})"]


def _mask_errors(masks: Tensor) -> list[str]:
    """Return why masks are not 0 and 1, or mask nothing."""
    wrong = [] if masks.dtype == torch.bool else masks[(masks != 0) & (masks != 1)].unique().tolist()
    if wrong:
        return [f"masks contain {join_some(wrong, _SHOWN)} (expected bool, or numbers 0 and 1)"]
    return [] if masks.any() else ["masks contain no masked patch (expected at least one in a batch)"]
