"""How the operators are sharded: rules for `torch.distributed.tensor`, registered when somebody imports that.

Attention needs no communication where samples or heads are spread over a mesh dimension:

| sharded | q, k, v, out and their gradients | lse | key_mask | table | gradient of table |
|---|---|---|---|---|---|
| samples | `Shard(0)` | `Shard(0)` | `Shard(0)` | `Replicate()` | `Partial("sum")` |
| heads | `Shard(2)` | `Shard(1)` | `Replicate()` | `Shard(1)` | `Shard(1)` |

The rules combine over the dimensions of a mesh. Inputs placed otherwise are redistributed first; tokens and head
dimensions are never sharded. `patch_embed` shards samples.

Attention dropout numbers the (sample, head) pairs that one process sees, so shards would repeat each other's masks:
with `dropout_p > 0` everything is replicated, and the mask is that of one process.

What else a model does to its tables goes through `map_columns`; how a model is spread is said in `parallel.py`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .attention import attention_backward_op, attention_op, patch_embed_op
from .import_hooks import when_imported

_Sharding = tuple[list[Any], list[Any]]
"""Placements of an operator's outputs, then of those of its inputs that are tensors."""


class _Placements(NamedTuple):
    """Where the tensors of attention lie along one dimension of a mesh."""

    tokens: Any  # q, k, v, out, their gradients [B, N, H, D]
    lse: Any  # [B, H, N]
    key_mask: Any  # [B, N]
    table: Any  # [rows, H]
    grad_table: Any  # [rows, H]

    def inputs(self, table: Any, key_mask: Any) -> list[Any]:
        """q, k, v, and of table and key_mask those that are there."""
        optional = ((table, self.table), (key_mask, self.key_mask))
        return [self.tokens] * 3 + [placement for tensor, placement in optional if tensor is not None]


def _attention_placements(dropout_p: float) -> list[_Placements]:
    from torch.distributed.tensor import Partial, Replicate, Shard

    replicated = _Placements(*[Replicate()] * 5)
    if dropout_p > 0:
        return [replicated]
    samples = _Placements(Shard(0), Shard(0), Shard(0), Replicate(), Partial("sum"))
    heads = _Placements(Shard(2), Shard(1), Replicate(), Shard(1), Shard(1))
    return [replicated, samples, heads]


def _shard_attention(
    q: Any,
    k: Any,
    v: Any,
    table: Any,
    key_mask: Any,
    window: Any,
    scale: float,
    dropout_p: float = 0.0,
    seed: int = 0,
) -> list[_Sharding]:
    return [([at.tokens, at.lse], at.inputs(table, key_mask)) for at in _attention_placements(dropout_p)]


def _shard_attention_backward(
    grad_out: Any,
    q: Any,
    k: Any,
    v: Any,
    table: Any,
    key_mask: Any,
    out: Any,
    lse: Any,
    window: Any,
    scale: float,
    dropout_p: float,
    seed: int,
    output_mask: Sequence[bool],
) -> list[_Sharding]:
    from torch.distributed.tensor import Replicate

    shardings = []
    for at in _attention_placements(dropout_p):
        gradients = [at.tokens] * 3 + [at.grad_table if table is not None else Replicate()]
        # A gradient that nobody asked for has no elements, the same everywhere.
        outputs = [place if needed else Replicate() for place, needed in zip(gradients, output_mask, strict=True)]
        shardings.append((outputs, [at.tokens, *at.inputs(table, key_mask), at.tokens, at.lse]))
    return shardings


def _shard_patch_embed(
    pixels: Any,
    weight: Any,
    bias: Any,
    cls: Any,
    mask: Any,
    mask_token: Any,
    pos: Any,
    mean: Any,
    std: Any,
) -> list[_Sharding]:
    from torch.distributed.tensor import Replicate, Shard

    shardings: list[_Sharding] = []
    for samples in (Replicate(), Shard(0)):
        tensors: list[tuple[Any, Any]] = [(weight, Replicate()), (bias, Replicate()), (cls, Replicate())]
        tensors += [(mask, samples), (mask_token, Replicate()), (pos, Replicate())]
        shardings.append(([samples], [samples, *(place for tensor, place in tensors if tensor is not None)]))
    return shardings


def map_columns(function: Callable[[Tensor], Tensor], table: Any) -> Any:
    """`function` of a table `[rows, H]`, each column of which it treats alike: of a DTensor where its columns are."""
    if not hasattr(table, "device_mesh"):
        return function(table)
    from torch.distributed.tensor import DTensor, Replicate, Shard

    placements = [place if place == Shard(1) else Replicate() for place in table.placements]
    columns = function(table.redistribute(placements=placements).to_local())
    shape = torch.Size([columns.shape[0], table.shape[1]])
    return DTensor.from_local(columns, table.device_mesh, placements, shape=shape, stride=(table.shape[1], 1))


def _register(distributed_tensor: ModuleType) -> None:
    """Hand the rules to DTensor; in a torch that registers rules in another way, DTensor will refuse the operators."""
    try:
        from torch.distributed.tensor._op_schema import RuntimeSchemaInfo
        from torch.distributed.tensor.experimental import register_sharding

        schema_infos = distributed_tensor.DTensor._op_dispatcher.sharding_propagator.op_to_schema_info
    except (ImportError, AttributeError) as error:
        warnings.warn(f"beit_fast has no sharding rules for DTensor in this torch: {error}", stacklevel=2)
        return
    register_sharding(patch_embed_op)(_shard_patch_embed)
    for op, rule in ((attention_op, _shard_attention), (attention_backward_op, _shard_attention_backward)):
        register_sharding(op)(rule)
        # Rules are cached by the arguments from here on. register_sharding says from the first integer, which is the
        # seed: a call with dropout would then be served the shardings of one without.
        names = [argument.name for argument in op._schema.arguments]
        schema_infos[op] = RuntimeSchemaInfo(static_argnum=names.index("dropout_p"))


when_imported("torch.distributed.tensor", _register)
