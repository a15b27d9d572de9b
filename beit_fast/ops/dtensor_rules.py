"""Sharding rules of the operators for `torch.distributed.tensor`. They are registered when that module is imported.

Attention needs no communication if samples or heads are sharded over a mesh dimension:

| sharded | q, k, v, out and their gradients | lse | key_mask | table | gradient of table |
|---|---|---|---|---|---|
| samples | `Shard(0)` | `Shard(0)` | `Shard(0)` | `Replicate()` | `Partial("sum")` |
| heads | `Shard(2)` | `Shard(1)` | `Replicate()` | `Shard(1)` | `Shard(1)` |

The rules combine over the dimensions of a mesh. Inputs with other placements are redistributed first; tokens and head
dimensions are never sharded. `patch_embed` shards samples.

Attention dropout numbers the (sample, head) pairs of one process, so two shards would use the same masks. With
`dropout_p > 0` everything is replicated, and the mask is that of one process.

Models apply other functions to their tables by `map_columns`. `parallel.py` shards a whole model.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .arguments import AttentionArguments, AttentionBackwardArguments, PatchEmbedArguments
from .attention import attention_backward_op, attention_op
from .import_hooks import when_imported
from .patch_embed import patch_embed_op

_Sharding = tuple[list[Any], list[Any]]
"""Placements of an operator's outputs, then of those of its inputs that are tensors."""


class _Placements(NamedTuple):
    """Placements of attention's tensors along one mesh dimension."""

    tokens: Any  # q, k, v, out, their gradients [B, N, H, D]
    lse: Any  # [B, H, N]
    key_mask: Any  # [B, N]
    table: Any  # [rows, H]
    grad_table: Any  # [rows, H]

    def inputs(self, table: Any, key_mask: Any) -> list[Any]:
        """Placements of the inputs: q, k, v, and table and key_mask unless they are None."""
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


def _shard_attention(*args: Any) -> list[_Sharding]:
    given = AttentionArguments(*args)
    return [
        ([at.tokens, at.lse], at.inputs(given.table, given.key_mask)) for at in _attention_placements(given.dropout_p)
    ]


def _shard_attention_backward(*args: Any) -> list[_Sharding]:
    from torch.distributed.tensor import Replicate

    given = AttentionBackwardArguments(*args)
    shardings = []
    for at in _attention_placements(given.dropout_p):
        gradients = [at.tokens] * 3 + [at.grad_table if given.table is not None else Replicate()]
        # Gradients that are not needed are empty tensors, the same on every device.
        outputs = [place if needed else Replicate() for place, needed in zip(gradients, given.output_mask, strict=True)]
        shardings.append((outputs, [at.tokens, *at.inputs(given.table, given.key_mask), at.tokens, at.lse]))
    return shardings


def _shard_patch_embed(*args: Any) -> list[_Sharding]:
    from torch.distributed.tensor import Replicate, Shard

    given = PatchEmbedArguments(*args)
    tensors = {name: x for name, x in given._asdict().items() if x is not None and name not in ("mean", "std")}
    shardings: list[_Sharding] = []
    for samples in (Replicate(), Shard(0)):
        inputs = [samples if name in ("pixels", "mask") else Replicate() for name in tensors]
        shardings.append(([samples], inputs))
    return shardings


def map_columns(function: Callable[[Tensor], Tensor], table: Any) -> Any:
    """Apply a column-wise function to a table `[rows, H]`; a DTensor keeps its columns sharded."""
    if not hasattr(table, "device_mesh"):
        return function(table)
    from torch.distributed.tensor import DTensor, Replicate, Shard

    placements = [place if place == Shard(1) else Replicate() for place in table.placements]
    columns = function(table.redistribute(placements=placements).to_local())
    shape = torch.Size([columns.shape[0], table.shape[1]])
    return DTensor.from_local(columns, table.device_mesh, placements, shape=shape, stride=(table.shape[1], 1))


def _register(distributed_tensor: ModuleType) -> None:
    """Register the rules with DTensor; without them DTensor rejects the operators."""
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
        # Rules are cached by the arguments from `static_argnum` on. The default of register_sharding is the first
        # integer, the seed: a call with dropout would then reuse the shardings of a call without.
        names = [argument.name for argument in op._schema.arguments]
        schema_infos[op] = RuntimeSchemaInfo(static_argnum=names.index("dropout_p"))


when_imported("torch.distributed.tensor", _register)
