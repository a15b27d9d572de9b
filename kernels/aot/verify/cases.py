"""Cases: one operator with its backward, the inputs, and the compute capability that it is compiled for."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ...common import gpu

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32, "fp32": torch.float32}
"""Elements; tf32 are fp32 whose products use tf32."""


class AttentionCase(NamedTuple):
    """Attention forward and, without `split`, backward."""

    capability: int
    dtype: str
    head_dim: int
    layout: str  # of the bias: see attention_variants.layout_name
    window: tuple[int, int]
    key_mask: bool = False
    dropout: bool = False
    split: bool = False  # keys in the forward; samples of the bias gradient in the backward
    backward: bool = True
    batch: int = 2
    heads: int = 1
    gradients: str = "all"  # or "dk" or "dv": that one alone

    @property
    def patch_count(self) -> int:
        return self.window[0] * self.window[1]

    def __str__(self) -> str:
        words = ["attention", f"sm_{self.capability}", self.dtype, f"D={self.head_dim}", self.layout]
        words += [f"{self.window[0]}x{self.window[1]}", f"B={self.batch}", f"H={self.heads}"]
        words += [name.replace("_", " ") for name in ("key_mask", "dropout", "split") if getattr(self, name)]
        if self.gradients != "all":
            words.append(f"{self.gradients} alone")
        return " ".join(words if self.backward else [*words, "forward"])


class LinearCase(NamedTuple):
    """A linear layer with GELU."""

    capability: int
    dtype: str
    rows: int
    inputs: int
    outputs: int
    bias: bool = True

    def __str__(self) -> str:
        words = ["linear_gelu", f"sm_{self.capability}", self.dtype, f"{self.rows}x{self.inputs}x{self.outputs}"]
        return " ".join(words if self.bias else [*words, "no bias"])


class NormCase(NamedTuple):
    """Residual sum and LayerNorm, with the backward."""

    capability: int
    dtype: str  # of the branch
    row_dtype: str  # of the other rows and of the vectors
    size: int
    form: str = "everything"  # see residual_norm_variants.ABSENT
    batch: int = 3
    tokens: int = 7
    num_sms: int = 1

    def __str__(self) -> str:
        dtypes = "/".join(dict.fromkeys((self.dtype, self.row_dtype)))
        words = ["residual_norm", f"sm_{self.capability}", dtypes, f"E={self.size}", self.form]
        return " ".join([*words, f"B={self.batch} N={self.tokens}", f"{self.num_sms} SMs"])


class PatchCase(NamedTuple):
    """Patch embedding, compiled by nvcc."""

    capability: int
    dtype: str  # of weight and bias
    pixels: str  # dtype
    tokens: str  # dtype of CLS, mask token and positions
    tile: str  # large or small
    image: tuple[int, int]
    patch: tuple[int, int]
    columns: int
    layout: str  # of the pixels: see tuning.patch_case.LAYOUTS
    form: str = "everything"  # see patch_table.ABSENT
    batch: int = 2

    def __str__(self) -> str:
        sizes = "/".join(f"{height}x{width}" for height, width in (self.image, self.patch))
        words = ["patch_embed", f"sm_{self.capability}", self.dtype, f"{self.pixels} pixels", f"{self.tokens} tokens"]
        return " ".join([*words, self.tile, sizes, f"E={self.columns}", self.layout, self.form, f"B={self.batch}"])


Case = AttentionCase | LinearCase | NormCase | PatchCase


def architecture_of(capability: int) -> str:
    return gpu.architecture_class(*divmod(capability, 10))


def arithmetic_of(dtype: str) -> str:
    return {"tf32": "tf32", "fp32": "ieee"}.get(dtype, "half")
