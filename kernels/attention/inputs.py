"""One attention call as the kernels take it: tensors that they can address, and the parameters that kernels share."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..common import gpu, tuned_tiles
from ..common.device import architecture_of, dot_precision, is_pipelined, needs_copy_fence
from ..common.launch import launch_kernel
from . import configs, pack_bias
from .arguments import BiasArguments, MatmulArguments, PackBiasArguments, PackedBias, ScoreArguments

LARGEST_TOKEN_STRIDE = 2**24
"""Elements: offsets within a tile of up to 127 tokens are int32."""


class AttentionInputs(NamedTuple):
    """The tensors and numbers of one attention call, after `prepare`."""

    query: Tensor
    key: Tensor
    value: Tensor
    table: Tensor | None
    key_mask: Tensor | None
    window: tuple[int, int]
    scale: float  # positive
    sign: int  # of the scale as it was passed: -1, 0 or 1
    dropout_p: float
    seed: int

    @property
    def patch_count(self) -> int:
        return self.query.shape[1] - 1

    @property
    def block_d(self) -> int:
        return configs.padded_head_dim(self.query.shape[-1])

    @property
    def bias_layout(self) -> configs.BiasLayout:
        if self.table is None:
            return configs.NO_BIAS
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
) -> AttentionInputs:
    """Copy what the kernels cannot address, and make the scale positive."""
    # The kernels divide the bias by the scale, and take the maximum of scores before they multiply by it.
    sign = (scale > 0) - (scale < 0)
    query = addressable(q if sign == 1 else q * sign)
    scale = abs(scale) if sign else 1.0
    window = (window[0], window[1]) if table is not None else (1, 1)
    return AttentionInputs(query, addressable(k), addressable(v), table, key_mask, window, scale, sign, dropout_p, seed)


def addressable(tensor: Tensor) -> Tensor:
    """Return the tensor, or a contiguous copy if kernels cannot address it."""
    strides = [stride for size, stride in zip(tensor.shape[:3], tensor.stride(), strict=False) if size > 1]
    # Loads are of 16 bytes: 8 elements of the smallest dtype.
    aligned = tensor.storage_offset() % 8 == 0 and all(stride % 8 == 0 for stride in strides)
    if tensor.stride(-1) == 1 and aligned and tensor.stride(1) < LARGEST_TOKEN_STRIDE:
        return tensor
    return tensor.contiguous()


def score_arguments(inputs: AttentionInputs) -> ScoreArguments:
    """Parameters that do not depend on the kernel."""
    q, key_mask, dropout_p = inputs.query, inputs.key_mask, inputs.dropout_p
    batch, tokens, heads, head_dim = q.shape
    return ScoreArguments(
        query=q,
        key=inputs.key,
        value=inputs.value,
        key_mask=key_mask,
        query_strides=q.stride()[:3],
        key_strides=inputs.key.stride()[:3],
        value_strides=inputs.value.stride()[:3],
        mask_strides=(0, 0) if key_mask is None else key_mask.stride(),
        batch_size=batch,
        patch_count=tokens - 1,
        head_count=heads,
        scale_log2=inputs.scale * math.log2(math.e),
        drop_threshold=min(int(dropout_p * 2**31), 2**31 - 1),
        drop_scale=1.0 / (1.0 - dropout_p) if dropout_p < 1.0 else 0.0,
        seed_low=signed_word(inputs.seed),
        seed_high=signed_word(inputs.seed >> 32),
        HEAD_DIM=head_dim,
        BLOCK_D=inputs.block_d,
        DROPOUT=dropout_p > 0.0,
    )


def matmul_arguments(inputs: AttentionInputs) -> MatmulArguments:
    """Precision of fp32 products; UPCAST is for Triton's interpreter, which cannot multiply 16-bit floats.

    FENCE is for releases of Triton that omit a fence.
    """
    q = inputs.query
    return MatmulArguments(
        PRECISION=dot_precision(q), UPCAST=not q.is_cuda and q.dtype != torch.float32, FENCE=needs_copy_fence(q)
    )


def bias_arguments(inputs: AttentionInputs, *, flipped: bool) -> BiasArguments:
    """Pack the bias.

    Args:
        inputs: The call.
        flipped: Whether tile rows are keys and columns queries, as for dK and dV.
    """
    layout = inputs.bias_layout
    height, width = inputs.window
    return BiasArguments(
        packed=_pack(inputs, layout, flipped),
        column_offsets=_column_offsets(inputs) if layout.name == "extended" else None,
        window_height=height,
        window_width=width,
        BIAS_LAYOUT=layout.name,
        BIAS_VECTOR=layout.vector,
    )


def _pack(inputs: AttentionInputs, layout: configs.BiasLayout, flipped: bool) -> PackedBias:
    """Write the packed bias, `[H, packed_size]` fp32."""
    table, window = inputs.table, inputs.window
    if table is None:
        return PackedBias(None, 0)
    heads = table.shape[1]
    size = configs.packed_size(layout.name, window)
    # The last tile of the last head reads columns beyond its patches.
    storage = torch.empty(heads * size + configs.PACKED_MARGIN, dtype=torch.float32, device=table.device)
    packed = PackedBias(storage, size)
    arguments = PackBiasArguments(
        table=table,
        packed=packed,
        table_strides=table.stride(),
        flipped=int(flipped),
        inverse_scale=1.0 / inputs.scale,
        window_height=window[0],
        window_width=window[1],
        BIAS_LAYOUT=layout.name,
        BLOCK=configs.PACK_BLOCK,
    )
    launch_kernel(pack_bias.pack_bias_kernel, heads * -(-size // configs.PACK_BLOCK), arguments)
    return packed


def _column_offsets(inputs: AttentionInputs) -> Tensor:
    """int32: what each column subtracts from an address in the extended table."""
    patch_count, width = inputs.patch_count, inputs.window[1]
    patches = torch.arange(patch_count + configs.PACKED_MARGIN, dtype=torch.int32, device=inputs.query.device)
    # The margin repeats the last patch, so that the last tile reads inside the table.
    patches = patches.clamp_(max=patch_count - 1)
    return patches + patches // width * (width - 1)


def signed_word(value: int) -> int:
    """Return the low 32 bits as a signed integer."""
    # Triton passes an int32 for every seed then, and compiles once.
    return ((value & 0xFFFFFFFF) ^ 0x80000000) - 0x80000000


def tile_config(kernel: str, inputs: AttentionInputs, form: str | None = None) -> configs.TileConfig:
    """Choose the tiles of `kernel`, one of configs.KERNELS.

    `form` is its name in compiler_hazards.py if it differs.
    """
    q = inputs.query
    variant, amount = tuned_shape(inputs)
    tuned = tuned_tiles.find(kernel, variant, amount, q)
    tile = shipped_tile(kernel, inputs) if tuned is None else configs.TileConfig(*tuned)
    return tile if is_pipelined(form or kernel, q) else tile._replace(num_stages=1)


def shipped_tile(kernel: str, inputs: AttentionInputs) -> configs.TileConfig:
    """Return the tiles that the tables have for `kernel`."""
    q = inputs.query
    arithmetic = gpu.arithmetic(q.element_size(), dot_precision(q))
    return configs.select(kernel, architecture_of(q), inputs.block_d, arithmetic, inputs.dropout_p > 0.0)


def tuned_shape(inputs: AttentionInputs) -> tuple[str, int]:
    """Return the variant and the amount of a call for `tuned_tiles.find`."""
    q = inputs.query
    dtype, layout, dropout = tuned_tiles.dtype_name(q), inputs.bias_layout.name, int(inputs.dropout_p > 0.0)
    sizes = f"d{q.shape[-1]}-patches{inputs.patch_count}-{layout}-dropout{dropout}"
    return f"{dtype}-{dot_precision(q)}-{sizes}", q.shape[0] * q.shape[2]
