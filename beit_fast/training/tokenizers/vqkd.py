"""The tokenizer of BEiT v2: vector-quantized knowledge distillation (VQ-KD, arXiv 2208.06366, section 2.2).

Names and sizes are those of unilm's beit2. It has not been tried on the public file.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...checkpoint.key_mapping import to_hub_names, to_timm_names
from ...configuration import BeitConfig
from ...models.beit import BeitModel
from ...utils.messages import join_some
from ...utils.paths import as_path
from .files import read_numbers
from .pixels import patch_grid
from .pretrained import PretrainedTokenizer, check_positive

HEAD_DIM = 64
"""The width of an attention head in every published model; shapes do not tell it."""

_EPS = 1e-6
_CODEBOOK = "quantize.embedding.weight"
_TRAINING_ONLY = (
    "decoder.",
    "decode_task_layer.",
    "teacher_model.",
    "scaling_layer.",
    "loss",
    "quantize.cluster_size",
    "quantize.embedding.cluster_size",
    "quantize.embedding.embed_avg",
    "quantize.embedding.initted",
)
"""Prefixes of names that only the training of the tokenizer needs."""


class VQKDTokenizer(PretrainedTokenizer):
    """BEiT v2's tokenizer: the entry of a codebook that is nearest to the feature of each patch.

    A ViT encodes the pixels. A layer projects each patch to `code_dim` numbers of length 1. The id is the nearest row
    of the codebook, equation (1) of arXiv 2208.06366. Rows have length 1, so it is the row of the largest cosine.

    Args:
        vocab_size: Rows of the codebook.
        code_dim: Columns of the codebook.
        image_size: Height and width of the images; other sizes are refused.
        patch_size: Height and width of a patch.
        num_channels: Channels of the pixels.
        hidden_size, num_hidden_layers, num_attention_heads, intermediate_size: Sizes of the ViT.

    Raises:
        TypeError, ValueError: If a size is not a positive integer, or patches do not divide the image.
    """

    tokenizer_type: ClassVar[str] = "vqkd"
    field_names: ClassVar[tuple[str, ...]] = (
        "vocab_size",
        "code_dim",
        "image_size",
        "patch_size",
        "num_channels",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
    )

    def __init__(
        self,
        vocab_size: int = 8192,
        code_dim: int = 32,
        image_size: int = 224,
        patch_size: int = 16,
        num_channels: int = 3,
        hidden_size: int = 768,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 12,
        intermediate_size: int = 3072,
    ) -> None:
        super().__init__()
        self.vocab_size, self.code_dim = vocab_size, code_dim
        self.image_size, self.patch_size, self.num_channels = image_size, patch_size, num_channels
        self.hidden_size, self.num_hidden_layers = hidden_size, num_hidden_layers
        self.num_attention_heads, self.intermediate_size = num_attention_heads, intermediate_size
        sizes = {name: getattr(self, name) for name in self.field_names}
        check_positive(type(self).__name__, **sizes)
        patch_grid(image_size, patch_size)
        self.encoder = BeitModel(_encoder_config(sizes), add_pooling_layer=False)
        self.encoder_norm = nn.LayerNorm(hidden_size, eps=_EPS)
        self.encode_task_layer = nn.Sequential(
            nn.Linear(hidden_size, hidden_size), nn.Tanh(), nn.Linear(hidden_size, code_dim)
        )
        self.codebook = nn.Parameter(F.normalize(torch.randn(vocab_size, code_dim), dim=-1))
        self._finish_construction()

    @classmethod
    def from_unilm_file(cls, path: str | os.PathLike[str], num_attention_heads: int | None = None) -> Self:
        """Read a checkpoint of unilm's beit2, such as `vqkd_encoder_base_decoder_3x768x12_clip.pth`.

        Only tensors are read, and no code runs. Decoder, teacher and training statistics are left aside. It has not
        been tried on the public file.

        Args:
            path: The file.
            num_attention_heads: Heads of the ViT; None takes `hidden_size / 64`, as in every published model.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file is damaged, contains other objects, or names or shapes do not fit.
        """
        file = as_path("the VQ-KD tokenizer", path)
        if not file.is_file():
            raise FileNotFoundError(f"no VQ-KD tokenizer at {os.fspath(path)!r}: there is no such file")
        tensors = {key: each for key, each in read_numbers(file).items() if not key.startswith(_TRAINING_ONLY)}
        return cls._build(_sizes_of(tensors, os.fspath(path), num_attention_heads), tensors, os.fspath(path))

    def grid_size(self, image_size: int | tuple[int, int]) -> tuple[int, int]:
        """Return the rows and columns of ids; only `image_size` is accepted.

        Raises:
            ValueError: If the size is another.
        """
        size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        if size != (self.image_size, self.image_size):
            raise ValueError(
                f"images of {size[0]}x{size[1]} pixels are not supported (expected "
                f"{self.image_size}x{self.image_size}, the size of the tokenizer's position embeddings)"
            )
        return patch_grid(self.image_size, self.patch_size)

    def _normalize(self, pixels: Tensor) -> Tensor:
        return 2 * pixels - 1

    def features(self, values: Tensor) -> Tensor:
        """Return features of length 1: preprocessed pixels `[B, C, H, W]` to `[B, P, code_dim]`, both float32."""
        patches = self.encoder(values).last_hidden_state[:, 1:]  # [B, P, E]
        return F.normalize(self.encode_task_layer(self.encoder_norm(patches)), dim=-1)

    def _ids(self, values: Tensor) -> Tensor:
        features = self.features(values)
        # The squared distance without the length of the feature, which is the same for every row.
        distance = self.codebook.square().sum(-1) - 2 * features @ self.codebook.mT  # [B, P, V]
        return distance.argmin(-1).unflatten(1, self.grid_size((values.shape[-2], values.shape[-1])))

    def _to_file_names(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        trunk = {f"beit.{key.removeprefix('encoder.')}": t for key, t in tensors.items() if key.startswith("encoder.")}
        named = {f"encoder.{key}": tensor for key, tensor in to_timm_names(trunk).items()}
        for key, tensor in tensors.items():
            if not key.startswith("encoder."):
                named[key.replace("encoder_norm.", "encoder.fc_norm.") if key != "codebook" else _CODEBOOK] = tensor
        return named

    def _from_file_names(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        trunk = {key.removeprefix("encoder."): t for key, t in tensors.items() if key.startswith("encoder.")}
        renamed, _ = to_hub_names(trunk)
        named = {f"encoder.{key.removeprefix('beit.')}": tensor for key, tensor in renamed.items()}
        for name in ("weight", "bias"):
            named[f"encoder_norm.{name}"] = named.pop(f"encoder.pooler.layernorm.{name}")
        tasks = {key: tensor for key, tensor in tensors.items() if key.startswith("encode_task_layer.")}
        return named | tasks | {"codebook": tensors[_CODEBOOK]}


def _encoder_config(sizes: Mapping[str, int]) -> BeitConfig:
    """Return the configuration of unilm's encoder: absolute positions, no bias table, no layer scale."""
    return BeitConfig(
        **{name: size for name, size in sizes.items() if name not in ("vocab_size", "code_dim")},
        layer_norm_eps=_EPS,
        layer_scale_init_value=0.0,
        drop_path_rate=0.0,
        use_absolute_position_embeddings=True,
        use_mean_pooling=True,
    )


def _sizes_of(tensors: Mapping[str, Tensor], name: str, num_attention_heads: int | None) -> dict[str, Any]:
    """Infer the arguments of `VQKDTokenizer` from the shapes of its tensors."""
    needed = {
        "encoder.patch_embed.proj.weight": 4,
        "encoder.pos_embed": 3,
        "encoder.blocks.0.mlp.fc1.weight": 2,
        _CODEBOOK: 2,
    }
    lacking = [key for key, ndim in needed.items() if key not in tensors or tensors[key].ndim != ndim]
    if lacking:
        found = join_some(tensors, 5) or "no tensors"
        raise ValueError(f"{name!r} is not a VQ-KD tokenizer: it lacks {join_some(lacking)} (it has {found})")
    patches, positions, expansion, codebook = (tensors[key] for key in needed)
    hidden_size, num_channels, patch_size = patches.shape[:3]
    if num_attention_heads is None and hidden_size % HEAD_DIM:
        raise ValueError(
            f"num_attention_heads can neither be inferred from {name!r} nor was passed: hidden_size={hidden_size} "
            f"is not a multiple of {HEAD_DIM}"
        )
    blocks = {match[1] for key in tensors if (match := re.match(r"encoder\.blocks\.(\d+)\.", key))}
    return {
        "vocab_size": codebook.shape[0],
        "code_dim": codebook.shape[1],
        "image_size": math.isqrt(positions.shape[1] - 1) * patch_size,
        "patch_size": patch_size,
        "num_channels": num_channels,
        "hidden_size": hidden_size,
        "num_hidden_layers": len(blocks),
        "num_attention_heads": hidden_size // HEAD_DIM if num_attention_heads is None else num_attention_heads,
        "intermediate_size": expansion.shape[0],
    }
