"""Tensor parallelism over heads: a plan for torch's own `parallelize_module`. Nothing else here imports this module.

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

_BY_COLUMNS = (
    "attention.attention.query",
    "attention.attention.key",
    "attention.attention.value",
    "intermediate.dense",
)
_BY_ROWS = ("attention.output.dense", "output.dense")


def tensor_parallel_plan(model: nn.Module, mesh: DeviceMesh) -> dict[str, ParallelStyle]:
    """How `parallelize_module(model, mesh, plan)` spreads every block's heads and MLP over the processes of `mesh`.

    Query, key, value and the first half of the MLP are split by columns, the two linears after them by rows, and bias
    tables, those of single layers and the shared one, by heads. A block needs two all-reduces forward and two backward;
    attention itself needs none. All else is repeated in every process, the residual stream too: give each process the
    same images and labels and, where drop path or dropout is on, the same seed, or what is repeated drifts apart.
    Attention dropout then drops the same places in the heads of each process; attention weights that are returned
    are those of its own heads. Some parameters become DTensors and some do not: foreach optimizers and
    `clip_grad_norm_` of torch take one kind at a time.

    Args:
        model: holds blocks of this package, at any depth. `fully_shard` and checkpoint wrappers come afterwards.
        mesh: of one dimension, whose size divides the number of heads and the width of the MLP.

    Raises:
        TypeError: the model holds no block of this package; says what was looked for and found.
        ValueError: this model cannot be spread over this mesh; every reason is listed. Nothing is changed.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, BeitLayer)}
    if not layers:
        found = ", ".join(sorted({type(module).__name__ for module in model.modules()}))
        raise TypeError(f"tensor_parallel_plan looks for BeitLayer of beit_fast and found only {found}")
    problems = _mesh_problems(mesh) or [
        f"{name or 'the layer'}: {problem}" for name, x in layers.items() for problem in _layer_problems(x, mesh.size())
    ]
    if problems:
        raise ValueError(f"{type(model).__name__} cannot be spread over {mesh}:\n- " + "\n- ".join(problems))
    plan: dict[str, ParallelStyle] = {}
    for name in layers:
        plan |= {f"{name}.{part}".lstrip("."): style for part, style in _layer_plan().items()}
    tables = (name for name, module in model.named_modules() if isinstance(module, BeitRelativePositionBias))
    return plan | {name: HeadwiseTable() for name in tables}


class HeadwiseTable(ParallelStyle):
    """Splits the table `[rows, H]` of a `BeitRelativePositionBias` by heads.

    The parameter becomes a DTensor placed `Shard(1)`; the module gives each process the columns of its own heads.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        for name, table in list(module.named_parameters(recurse=False)):
            columns = distribute_tensor(table, device_mesh, [Shard(1)], src_data_rank=self.src_data_rank)
            module.register_parameter(name, nn.Parameter(columns, requires_grad=table.requires_grad))
        module.register_forward_hook(_own_columns)
        return module


def _own_columns(module: nn.Module, inputs: Any, table: Any) -> Tensor:
    return table.to_local()


def _layer_plan() -> dict[str, ParallelStyle]:
    # Query, key and value take one DTensor, so that their gradients are added before they are reduced.
    repeated = Replicate()
    shared_input = PrepareModuleOutput(output_layouts=repeated, desired_output_layouts=repeated, use_local_output=False)
    plan: dict[str, ParallelStyle] = {"layernorm_before": shared_input}
    return plan | {name: ColwiseParallel() for name in _BY_COLUMNS} | {name: RowwiseParallel() for name in _BY_ROWS}


def _mesh_problems(mesh: DeviceMesh) -> list[str]:
    if mesh.ndim == 1:
        return []
    examples = " or ".join(f"mesh[{name!r}]" for name in mesh.mesh_dim_names or ())
    return [f"the mesh has {mesh.ndim} dimensions; give one of them{f', such as {examples}' if examples else ''}"]


def _layer_problems(layer: BeitLayer, processes: int) -> list[str]:
    if any(isinstance(parameter, DTensor) for parameter in layer.parameters()):
        return ["its parameters are DTensors; tensor parallelism is applied once, and before fully_shard"]
    self_attention = layer.attention.attention
    if not isinstance(self_attention, BeitSelfAttention):
        return [f"attention.attention is a {type(self_attention).__name__}, not a BeitSelfAttention"]
    linears = {name: layer.get_submodule(name) for name in (*_BY_COLUMNS, *_BY_ROWS)}
    problems = [
        f"{name} is a {type(linear).__name__}, not an nn.Linear"
        for name, linear in linears.items()
        if type(linear) is not nn.Linear
    ]
    width = getattr(layer.intermediate.dense, "out_features", 0)
    return problems + [
        f"{count} {what} cannot be split evenly among {processes} processes"
        for count, what in ((self_attention.num_heads, "attention heads"), (width, "numbers in the MLP"))
        if count % processes
    ]
