"""What the attention kernels are called with: addressable tensors, packed bias, scalars, and the machine's limits."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ..common import gpu
from ..common.device import architecture_of, dot_precision
from . import configs, pack_bias

LARGEST_TOKEN_STRIDE = 2**24
"""Elements: offsets within a tile of up to 127 tokens are int32."""


class Inputs(NamedTuple):
    """The tensors and numbers of one attention call, ready for the kernels."""

    query: Tensor
    key: Tensor
    value: Tensor
    table: Tensor | None
    key_mask: Tensor | None
    window: tuple[int, int]
    scale: float
    sign: int
    dropout_p: float
    seed: int

    @property
    def patch_count(self) -> int:
        return self.query.shape[1] - 1

    @property
    def bias_layout(self) -> configs.BiasLayout:
        return configs.bias_layout(architecture_of(self.query), self.query.element_size(), self.window)


def prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor | None,
    key_mask: Tensor | None,
    window: tuple[int, int],
    scale: float,
    dropout_p: float,
    seed: int,
) -> Inputs:
    """Copies what the kernels cannot address, and moves the sign of the scale, which they take as positive, into q."""
    sign = (scale > 0) - (scale < 0)
    query = addressable(q if sign == 1 else q * sign)
    scale = abs(scale) if sign else 1.0
    window = (window[0], window[1]) if table is not None else (1, 1)
    return Inputs(query, addressable(k), addressable(v), table, key_mask, window, scale, sign, dropout_p, seed)


def addressable(tensor: Tensor) -> Tensor:
    """The tensor, or a contiguous copy where the kernels cannot address it.

    The last stride has to be 1; 16-byte loads need the others, and where the tensor begins, to be multiples of 8
    elements; and offsets within a tile are int32, so tokens must not lie LARGEST_TOKEN_STRIDE apart.
    """
    strides = [stride for size, stride in zip(tensor.shape[:3], tensor.stride(), strict=False) if size > 1]
    aligned = tensor.storage_offset() % 8 == 0 and all(stride % 8 == 0 for stride in strides)
    if tensor.stride(-1) == 1 and aligned and tensor.stride(1) < LARGEST_TOKEN_STRIDE:
        return tensor
    return tensor.contiguous()


def score_arguments(inputs: Inputs) -> dict[str, Any]:
    """The arguments, by name, that every kernel that computes scores takes; those of the bias apart."""
    q, k, v, key_mask = inputs.query, inputs.key, inputs.value, inputs.key_mask
    batch, tokens, heads, _ = q.shape
    dropout_p = inputs.dropout_p
    return {
        "query": q,
        "key": k,
        "value": v,
        "key_mask": key_mask,
        "query_strides": q.stride()[:3],
        "key_strides": k.stride()[:3],
        "value_strides": v.stride()[:3],
        "mask_strides": (0, 0) if key_mask is None else key_mask.stride(),
        "batch_size": batch,
        "patch_count": tokens - 1,
        "head_count": heads,
        "scale_log2": inputs.scale * math.log2(math.e),
        "drop_threshold": min(int(dropout_p * 2**31), 2**31 - 1),
        "seed_low": signed_word(inputs.seed),
        "seed_high": signed_word(inputs.seed >> 32),
        "HEAD_DIM": q.shape[-1],
        "BLOCK_D": configs.padded_head_dim(q.shape[-1]),
        "DROPOUT": dropout_p > 0.0,
        "PRECISION": dot_precision(q),
        "UPCAST": not q.is_cuda and q.dtype != torch.float32,
    }


def drop_scale(dropout_p: float) -> float:
    """What the kept weights are multiplied by."""
    return 1.0 / (1.0 - dropout_p) if dropout_p < 1.0 else 0.0


def bias_arguments(inputs: Inputs, *, flipped: bool) -> dict[str, Any]:
    """The arguments, by name, through which a kernel reads the bias, and its packed bias.

    Args:
        flipped: whether tile rows are keys and columns queries.
    """
    height, width = inputs.window
    layout, vector = inputs.bias_layout if inputs.table is not None else configs.NO_BIAS
    arguments: dict[str, Any] = {
        "packed_bias": None,
        "column_offsets": None,
        "packed_size": 0,
        "window_height": height,
        "window_width": width,
        "BIAS_LAYOUT": layout,
        "BIAS_VECTOR": vector,
    }
    if inputs.table is not None:
        arguments["packed_size"] = configs.packed_size(layout, inputs.window)
        arguments["packed_bias"] = _pack_bias(inputs, arguments["packed_size"], layout, flipped)
    if layout == "extended":
        arguments["column_offsets"] = _column_offsets(inputs.patch_count, width, inputs.query.device)
    return arguments


def _pack_bias(inputs: Inputs, size: int, layout: str, flipped: bool) -> Tensor:
    """`[H, size]` fp32, with room behind the last for the columns that the last tile reads beyond its patches."""
    table = inputs.table
    assert table is not None
    heads = table.shape[1]
    storage = torch.empty(heads * size + configs.PACKED_MARGIN, dtype=torch.float32, device=table.device)
    pack_bias.pack_bias_kernel[(heads * triton.cdiv(size, configs.PACK_BLOCK),)](
        table,
        storage,
        table.stride(),
        int(flipped),
        1.0 / inputs.scale,
        size,
        *inputs.window,
        BIAS_LAYOUT=layout,
        BLOCK=configs.PACK_BLOCK,
    )
    return storage


def _column_offsets(patch_count: int, width: int, device: torch.device) -> Tensor:
    """int32: what each column takes from an address in the extended table; the last one repeated as a margin."""
    patches = torch.arange(patch_count + configs.PACKED_MARGIN, dtype=torch.int32, device=device)
    patches = patches.clamp_(max=patch_count - 1)
    return patches + patches // width * (width - 1)


def signed_word(value: int) -> int:
    """The low 32 bits as a signed integer, so that Triton sees an int32 whatever the seed is."""
    return ((value & 0xFFFFFFFF) ^ 0x80000000) - 0x80000000


def tile_config(kernel: str, arguments: dict[str, Any]) -> configs.TileConfig:
    """The tiles of `kernel` for these score arguments."""
    query = arguments["query"]
    return configs.select(
        kernel,
        architecture_of(query),
        arguments["BLOCK_D"],
        gpu.arithmetic(query.element_size(), arguments["PRECISION"]),
        arguments["DROPOUT"],
    )
