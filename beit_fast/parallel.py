"""Tensor parallelism over heads: a plan for `torch.distributed.tensor.parallel.parallelize_module`.

from torch.distributed.tensor.parallel import parallelize_module
from beit_fast.parallel import tensor_parallel_plan

parallelize_module(model, mesh, tensor_parallel_plan(model, mesh))
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, PrepareModuleOutput, RowwiseParallel

from .layers.attention import BeitRelativePositionBias, BeitSelfAttention
from .layers.block import BeitLayer
from .utils.messages import full_name

_BY_COLUMNS = (
    "attention.attention.query",
    "attention.attention.key",
    "attention.attention.value",
    "intermediate.dense",
)
_BY_ROWS = ("attention.output.dense", "output.dense")


def tensor_parallel_plan(model: nn.Module, mesh: DeviceMesh) -> dict[str, ParallelStyle]:
    """Plan how `parallelize_module` shards the heads and the MLP of every block.

    Query, key, value and the first half of the MLP are sharded by columns. The two linear layers after them are sharded
    by rows, and all bias tables by heads. A block needs two all-reduces in the forward pass and two in the backward
    pass, none of them within attention.

    All other computation is replicated, including the residual stream. Give each process the same images and labels
    and, with drop path or dropout, the same seed; otherwise the replicas diverge. Attention dropout then drops the same
    positions in the heads of each process. Attention weights that are returned are those of the local heads.

    Some parameters become DTensors and some do not. Foreach optimizers and `clip_grad_norm_` of torch need separate
    calls for the two kinds.

    Args:
        model: A module with blocks of this package at any depth. Apply `fully_shard` and checkpoint wrappers later.
        mesh: A mesh of one dimension, whose size divides the number of heads and the width of the MLP.

    Raises:
        TypeError: If the model has no block of this package.
        ValueError: If the model cannot be sharded over this mesh, with every reason. The model is unchanged.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, BeitLayer)}
    if not layers:
        found = ", ".join(sorted({type(module).__name__ for module in model.modules()}))
        raise TypeError(f"tensor_parallel_plan expects a model with a BeitLayer of beit_fast, not only {found}")
    errors = _mesh_errors(mesh) or [
        f"{name or 'the layer'}: {error}" for name, x in layers.items() for error in _layer_errors(x, mesh.size())
    ]
    if errors:
        raise ValueError(f"{type(model).__name__} cannot be sharded over {mesh}:\n- " + "\n- ".join(errors))
    plan: dict[str, ParallelStyle] = {}
    for name in layers:
        plan |= {f"{name}.{part}".lstrip("."): style for part, style in _layer_plan().items()}
    tables = (name for name, module in model.named_modules() if isinstance(module, BeitRelativePositionBias))
    return plan | {name: HeadwiseTable() for name in tables}


class HeadwiseTable(ParallelStyle):
    """Shard the table `[rows, H]` of a `BeitRelativePositionBias` by heads.

    The parameter becomes a DTensor placed `Shard(1)`. The module returns the columns of the local heads.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        for name, table in list(module.named_parameters(recurse=False)):
            columns = distribute_tensor(table, device_mesh, [Shard(1)], src_data_rank=self.src_data_rank)
            module.register_parameter(name, nn.Parameter(columns, requires_grad=table.requires_grad))
        module.register_forward_hook(_local_columns)
        return module


def _local_columns(module: nn.Module, inputs: Any, table: Any) -> Tensor:
    return table.to_local()


def _layer_plan() -> dict[str, ParallelStyle]:
    # Query, key and value share one DTensor, so that their gradients are summed before the all-reduce.
    repeated = Replicate()
    shared_input = PrepareModuleOutput(output_layouts=repeated, desired_output_layouts=repeated, use_local_output=False)
    plan: dict[str, ParallelStyle] = {"layernorm_before": shared_input}
    return plan | {name: ColwiseParallel() for name in _BY_COLUMNS} | {name: RowwiseParallel() for name in _BY_ROWS}


def _mesh_errors(mesh: DeviceMesh) -> list[str]:
    if mesh.ndim == 1:
        return []
    examples = " or ".join(f"mesh[{name!r}]" for name in mesh.mesh_dim_names or ())
    return [f"the mesh has {mesh.ndim} dimensions; pass one of them{f', such as {examples}' if examples else ''}"]


def _layer_errors(layer: BeitLayer, processes: int) -> list[str]:
    if any(isinstance(parameter, DTensor) for parameter in layer.parameters()):
        return ["its parameters are DTensors; apply tensor parallelism once and before fully_shard"]
    self_attention = layer.attention.attention
    if not isinstance(self_attention, BeitSelfAttention):
        return [f"attention.attention is a {full_name(type(self_attention))}, not a {full_name(BeitSelfAttention)}"]
    linears = {name: layer.get_submodule(name) for name in (*_BY_COLUMNS, *_BY_ROWS)}
    errors = [
        f"{name} is a {full_name(type(linear))}, not a {full_name(nn.Linear)}"
        for name, linear in linears.items()
        if type(linear) is not nn.Linear
    ]
    width = getattr(layer.intermediate.dense, "out_features", 0)
    return errors + [
        f"{count} {what} cannot be split evenly among {processes} processes"
        for count, what in ((self_attention.num_heads, "attention heads"), (width, "MLP features"))
        if count % processes
    ]
