"""The encoder of DALL-E's discrete VAE, the tokenizer of BEiT.

Sources: arXiv 2102.12092 and 2106.08254. Sizes and names are those of the package `dall_e` of
github.com/openai/DALL-E. The code is ours. It has not been tried on the public file.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from itertools import pairwise
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...utils.messages import join_some
from ...utils.paths import as_path
from .module_pickle import read_module_tensors
from .pixels import dalle_pixels
from .pretrained import PretrainedTokenizer, check_positive

_WIDTHS = (1, 1, 2, 4, 8)
"""Channels of the first convolution and of the four groups, in units of `hidden_size`."""

_KERNELS = (3, 3, 3, 1)
_FIRST_KERNEL = 7


class _Convolution(nn.Module):
    """A convolution that keeps the size; the public file calls its parameters `w` and `b`."""

    def __init__(self, inputs: int, outputs: int, kernel: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(outputs, inputs, kernel, kernel) / math.sqrt(inputs * kernel**2))
        self.b = nn.Parameter(torch.zeros(outputs))

    def forward(self, values: Tensor) -> Tensor:
        return F.conv2d(values, self.w, self.b, padding=self.w.shape[-1] // 2)


class _Block(nn.Module):
    """A residual bottleneck of four convolutions, each after a ReLU."""

    def __init__(self, inputs: int, outputs: int, gain: float) -> None:
        super().__init__()
        self.gain = gain
        sizes = (inputs, *[outputs // 4] * 3, outputs)
        self.id_path = _Convolution(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        self.res_path = nn.ModuleDict(
            {
                f"conv_{index}": _Convolution(*pair, kernel)
                for index, (pair, kernel) in enumerate(zip(pairwise(sizes), _KERNELS, strict=True), 1)
            }
        )

    def forward(self, values: Tensor) -> Tensor:
        branch = values
        for convolution in self.res_path.values():
            branch = convolution(branch.relu())
        return self.id_path(values) + self.gain * branch


class DalleTokenizer(PretrainedTokenizer):
    """DALL-E's discrete VAE as a tokenizer: one of 8192 ids for each patch of 8x8 pixels.

    BEiT's tokens for 224x224 images come from this tokenizer at 112x112: 14x14 ids. The id of a patch is the largest of
    the encoder's logits (arXiv 2106.08254, section 2.1.1). All of it runs in float32.

    Args:
        vocab_size: The number of ids.
        hidden_size: Channels after the first convolution; the last group has eight times as many.
        blocks_per_group: Residual blocks in each of the four groups.
        num_channels: Channels of the pixels.

    Raises:
        TypeError, ValueError: If a size is not a positive integer, or `hidden_size` is not a multiple of 4.
    """

    tokenizer_type: ClassVar[str] = "dalle"
    field_names: ClassVar[tuple[str, ...]] = ("vocab_size", "hidden_size", "blocks_per_group", "num_channels")

    def __init__(
        self, vocab_size: int = 8192, hidden_size: int = 256, blocks_per_group: int = 2, num_channels: int = 3
    ) -> None:
        super().__init__()
        check_positive(
            type(self).__name__,
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            blocks_per_group=blocks_per_group,
            num_channels=num_channels,
        )
        if hidden_size % 4:
            raise ValueError(f"hidden_size={hidden_size} is not supported (expected a multiple of 4)")
        self.vocab_size, self.hidden_size = vocab_size, hidden_size
        self.blocks_per_group, self.num_channels = blocks_per_group, num_channels
        groups = list(pairwise(width * hidden_size for width in _WIDTHS))
        self.patch_size = 2 ** (len(groups) - 1)  # the groups are divided by poolings of 2x2
        gain = 1 / (len(groups) * blocks_per_group) ** 2
        parts: dict[str, nn.Module] = {"input": _Convolution(num_channels, hidden_size, _FIRST_KERNEL)}
        for number, (inputs, outputs) in enumerate(groups, 1):
            sizes = (inputs, *[outputs] * blocks_per_group)
            blocks = {f"block_{index}": _Block(*pair, gain) for index, pair in enumerate(pairwise(sizes), 1)}
            parts[f"group_{number}"] = nn.ModuleDict(blocks)
        parts["output"] = nn.ModuleDict({"conv": _Convolution(_WIDTHS[-1] * hidden_size, vocab_size, 1)})
        self.blocks = nn.ModuleDict(parts)
        self._finish_construction()

    @classmethod
    def from_dalle_file(cls, path: str | os.PathLike[str]) -> Self:
        """Read OpenAI's `encoder.pkl` without running its code.

        The file is a whole module in a pickle. Only tensors are built; sizes follow from their shapes. It has not been
        tried on the public file.

        Args:
            path: The file, or one that `torch.save` wrote from the encoder's state dict.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file is damaged, contains other objects, or lacks tensors.
        """
        file = as_path("the encoder of DALL-E", path)
        if not file.is_file():
            raise FileNotFoundError(f"no encoder of DALL-E at {os.fspath(path)!r}: there is no such file")
        tensors = read_module_tensors(file)
        return cls._build(_sizes_of(tensors, os.fspath(path)), tensors, os.fspath(path))

    def _normalize(self, pixels: Tensor) -> Tensor:
        return dalle_pixels(pixels)

    def logits(self, values: Tensor) -> Tensor:
        """Return the logits of preprocessed pixels: `[B, C, H, W]` to `[B, vocab_size, h, w]`, both float32."""
        hidden = self.blocks["input"](values)
        groups = [part for name, part in self.blocks.items() if name.startswith("group_")]
        for index, group in enumerate(groups):
            hidden = hidden if index == 0 else F.max_pool2d(hidden, 2)
            for block in group.values():  # type: ignore[operator]
                hidden = block(hidden)
        return self.blocks["output"]["conv"](hidden.relu())  # type: ignore[index]

    def _ids(self, values: Tensor) -> Tensor:
        return self.logits(values).argmax(1)


def _sizes_of(tensors: Mapping[str, Tensor], name: str) -> dict[str, Any]:
    """Infer the arguments of `DalleTokenizer` from the shapes of its tensors."""
    first, last = "blocks.input.w", "blocks.output.conv.w"
    lacking = [key for key in (first, last) if key not in tensors or tensors[key].ndim != 4]
    if lacking:
        found = join_some(tensors, 5) or "no tensors"
        raise ValueError(f"{name!r} is not an encoder of DALL-E: it lacks {join_some(lacking)} (it has {found})")
    blocks = {match[1] for key in tensors if (match := re.match(r"blocks\.group_1\.block_(\d+)\.", key))}
    hidden_size, num_channels = tensors[first].shape[:2]
    return {
        "vocab_size": tensors[last].shape[0],
        "hidden_size": hidden_size,
        "blocks_per_group": max(len(blocks), 1),
        "num_channels": num_channels,
    }
