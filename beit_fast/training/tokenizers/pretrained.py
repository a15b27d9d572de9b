"""The base class of visual tokenizers: pixels, files, sizes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from ...configuration.fields import is_integer
from ...utils.hub import HubOptions
from ...utils.messages import FieldError, describe, join_some, raise_errors, unexpected_arguments
from .files import TYPE_KEY, check_tensors, find_files, read_numbers, write_files
from .pixels import check_values, patch_grid, unit_pixels


class PretrainedTokenizer(nn.Module):
    """A `VisualTokenizer` with `from_pretrained` and `save_pretrained`.

    Parameters are float32 and need no gradient. Subclasses are built from keyword arguments, their `field_names`.
    """

    tokenizer_type: ClassVar[str]
    field_names: ClassVar[tuple[str, ...]]

    vocab_size: int
    patch_size: int
    num_channels: int

    def _finish_construction(self) -> None:
        self.requires_grad_(False)
        self.eval()

    def grid_size(self, image_size: int | tuple[int, int]) -> tuple[int, int]:
        """Return the rows and columns of ids for images of that size; see `VisualTokenizer.grid_size`."""
        return patch_grid(image_size, self.patch_size)

    def preprocess(self, pixels: Tensor) -> Tensor:
        """Convert pixels `[B, C, H, W]` for `encode`; see `VisualTokenizer.preprocess`."""
        values = self._normalize(unit_pixels(pixels, self.num_channels))
        self.grid_size((pixels.shape[-2], pixels.shape[-1]))
        return values

    @torch.no_grad()
    def encode(self, values: Tensor) -> Tensor:
        """Return the ids of preprocessed pixels.

        Args:
            values: `[B, C, H, W]`, float32, the output of `preprocess`.

        Returns:
            `[B, h, w]`, int64.

        Raises:
            TypeError: If `values` is not a tensor.
            ValueError: If its shape or dtype does not fit.
        """
        check_values(values, self.num_channels)
        grid = self.grid_size((values.shape[-2], values.shape[-1]))
        if not values.shape[0]:
            return values.new_empty(0, *grid, dtype=torch.long)
        # Ids must not depend on the autocast of the model that is trained.
        with torch.autocast(values.device.type, enabled=False):
            return self._ids(values)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return the ids of pixels.

        Args:
            pixels: `[B, C, H, W]`, uint8 in 0..255 or floating point in 0..1.

        Returns:
            `[B, h, w]`, int64.

        Raises:
            TypeError: If `pixels` is not a tensor.
            ValueError: If its shape, dtype or values do not fit.
        """
        return self.encode(self.preprocess(pixels))

    def _normalize(self, pixels: Tensor) -> Tensor:
        """Map float32 pixels in 0..1 to the range of the encoder."""
        raise NotImplementedError

    def _ids(self, values: Tensor) -> Tensor:
        """Return the ids of checked values."""
        raise NotImplementedError

    def _to_file_names(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rename the module's tensors for its file."""
        return dict(tensors)

    def _from_file_names(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rename the tensors of a file for the module."""
        return dict(tensors)

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> None:
        """Write `visual_tokenizer.json` and `visual_tokenizer.safetensors`.

        They replace older ones only when both are complete.

        Args:
            save_directory: The folder, created if missing. It may also hold a model.

        Raises:
            OSError: If the folder cannot be written.
            TypeError, ValueError: If the path is not valid.
        """
        fields = {name: getattr(self, name) for name in self.field_names}
        write_files(save_directory, fields | {TYPE_KEY: self.tokenizer_type}, self._to_file_names(self.state_dict()))

    @classmethod
    def from_pretrained(cls, name_or_path: str | os.PathLike[str], /, **options: Any) -> Self:
        """Read a tokenizer that `save_pretrained` wrote.

        Args:
            name_or_path: A folder, or the name of a hub repository such as "org/name".
            options: `revision`, `cache_dir`, `token`, `local_files_only`, `force_download` and `subfolder` as in
                `huggingface_hub`.

        Raises:
            FileNotFoundError: If a file is missing.
            TypeError: If an argument is unexpected, or a size in the file is not an integer.
            ValueError: If the files are of another tokenizer, or names, shapes or values do not fit.
        """
        raise_errors(f"{cls.__name__}.from_pretrained", unexpected_arguments(options, HubOptions._fields))
        files = find_files(name_or_path, HubOptions(**options))
        fields = cls._check_fields(os.fspath(name_or_path), files.fields)
        return cls._build(fields, read_numbers(files.tensors), os.fspath(files.tensors))

    @classmethod
    def _check_fields(cls, name: str, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Return the keyword arguments of the class from the JSON file `fields`."""
        kind = fields.get(TYPE_KEY)
        given = {key: value for key, value in fields.items() if key != TYPE_KEY}
        errors = []
        if kind != cls.tokenizer_type:
            errors.append(FieldError(f"{describe(TYPE_KEY, kind)} (expected {cls.tokenizer_type!r})"))
        else:
            lacking = [field for field in cls.field_names if field not in given]
            unknown = [field for field in given if field not in cls.field_names]
            errors += [FieldError(f"it lacks {join_some(lacking)}")] if lacking else []
            errors += [FieldError(f"it has unknown fields {join_some(unknown)}")] if unknown else []
        raise_errors(f"the visual tokenizer {name!r}", errors)
        return given

    @classmethod
    def _build(cls, fields: Mapping[str, Any], tensors: Mapping[str, Tensor], owner: str) -> Self:
        """Build a tokenizer that owns copies of the tensors of a file."""
        with torch.device("meta"):
            tokenizer = cls(**fields)
        check_tensors(f"{owner!r}", tensors, tokenizer._to_file_names(tokenizer.state_dict()))
        named = tokenizer._from_file_names(tensors)
        own = {name: tensor.to(torch.float32, copy=True).contiguous() for name, tensor in named.items()}
        tokenizer.load_state_dict(own, assign=True)
        tokenizer._finish_construction()
        return tokenizer


def check_positive(owner: str, **sizes: int) -> None:
    """Check sizes that were passed to a tokenizer.

    Raises:
        TypeError, ValueError: If some are not positive integers; the error lists all of them.
    """
    expected = "(expected a positive integer)"
    errors = [
        FieldError(f"{describe(name, size)} {expected}", wrong_type=not is_integer(size))
        for name, size in sizes.items()
        if not is_integer(size) or size < 1
    ]
    raise_errors(owner, errors)
