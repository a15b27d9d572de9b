"""One process of a distributed run: `python scale_out_run.py RANK WORLD FOLDER`.

It needs only torch and beit_fast. `FOLDER/orders.pt` has orders by name. An order has a task of `TASKS`, an engine of
`ENGINES`, and `class`, `config`, `state` and `dtype` of a model. It also has the `inputs` of the whole batch, and the
options of `build`, `checkpointed` and the engines. Each process writes the results of the tasks to
`FOLDER/results-RANK.pt`.
"""

from __future__ import annotations

import functools
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import beit_fast
from beit_fast.layers import BeitLayer

SEED = 5
COUNTED = ("beit_fast::", "mkldnn::_linear_pointwise", "_c10d_functional::")


def train_step(model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Any]:
    """Run forward and backward; return logits, loss, and the calls of each operator in `COUNTED`."""
    torch.manual_seed(SEED)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        outputs = model(**inputs)
        outputs.loss.backward()
    calls = Counter(event.name for event in profile.events() if event.name.startswith(COUNTED))
    return {"logits": outputs.logits.detach(), "loss": outputs.loss.detach(), "calls": dict(calls)}


def train(order: dict[str, Any], rank: int, world: int, folder: Path) -> dict[str, Any]:
    """Run a training step of an order's model with its engine."""
    model, report = ENGINES[order["engine"]](order, rank)
    inputs = order["inputs"]
    if order["engine"] != "tensor":
        inputs = {name: tensor.chunk(world)[rank] for name, tensor in inputs.items()}
    if order["compiled"]:
        model.compile(fullgraph=True, backend="aot_eager")
        model(**inputs).loss.backward()  # tracing calls the operators, too
        model.zero_grad()
    with torch.no_grad():
        before = {name: tensor.clone() for name, tensor in full_state(model).items()}
    result = train_step(model, inputs) | report
    parameters = dict(model.named_parameters())
    result["placements"] = {name: str(getattr(p, "placements", None)) for name, p in parameters.items()}
    result["local_shapes"] = {name: list(local_part(p).shape) for name, p in parameters.items()}
    with torch.no_grad():
        for p in parameters.values():
            p.copy_(torch.full_like(p, torch.nan) if p.grad is None else p.grad)
    return result | {"state": before, "gradients": full_state(model)}


def full_state(model: nn.Module) -> dict[str, Tensor]:
    """Gather the full tensors under their hub names."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))


def local_part(tensor: Any) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


@functools.cache
def device_mesh() -> Any:
    from torch.distributed.tensor import init_device_mesh

    return init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("all",))


def build(order: dict[str, Any]) -> Any:
    """Build the model; load its weights unless it is on the meta device."""
    with torch.device("meta" if order["on_meta"] else "cpu"):
        config = beit_fast.BeitConfig(**order["config"])
        model = getattr(beit_fast, order["class"])(config, attn_implementation=order["attention"]).to(order["dtype"])
    model.train(order["training"])
    if order["state"] is not None and not order["on_meta"]:
        model.load_state_dict(order["state"], strict=True)
    return model


def checkpointed(model: Any, order: dict[str, Any]) -> Any:
    """Enable checkpointing by the model's own method or by torch's wrapper."""
    if order["checkpointing"] == "own":
        model.gradient_checkpointing_enable()
    elif order["checkpointing"] == "wrapper":
        from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

        apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, BeitLayer))
    return model


def data_parallel(order: dict[str, Any], rank: int) -> tuple[nn.Module, dict[str, Any]]:
    model = checkpointed(build(order), order)
    unused = order["class"] == "BeitForSemanticSegmentation"  # the head does not use the last layer
    return nn.parallel.DistributedDataParallel(model, find_unused_parameters=unused), {}


def fully_sharded(order: dict[str, Any], rank: int) -> tuple[nn.Module, dict[str, Any]]:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mixed = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32} if order["mixed"] else {}
    options = {"mesh": device_mesh(), "mp_policy": MixedPrecisionPolicy(**mixed)}
    model = checkpointed(build(order), order)
    owners = [module for module in model.modules() if any(True for _ in module.parameters(recurse=False))]
    for unit in reversed(owners) if order["every_module"] else model.base_model.encoder.layer:
        fully_shard(unit, **options)
    fully_shard(model, **options)
    return model, initialize(model, order, rank) if order["on_meta"] else {}


def initialize(model: Any, order: dict[str, Any], rank: int) -> dict[str, Any]:
    """Allocate and initialize a sharded model, then broadcast rank 0's weights.

    Returns:
        The initial values, and whether every parameter was empty before them.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    torch.use_deterministic_algorithms(True)  # uninitialized memory is then NaN
    model.to_empty(device="cpu")
    torch.use_deterministic_algorithms(False)
    empty = all(local_part(p).isnan().all() for p in model.parameters())
    torch.manual_seed(rank)
    model.init_weights()
    first = {name: tensor.clone() for name, tensor in full_state(model).items()}
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, order["state"] if rank == 0 else {}, options=options)
    return {"was_empty": empty, "first_values": first}


def tensor_parallel(order: dict[str, Any], rank: int) -> tuple[nn.Module, dict[str, Any]]:
    from torch.distributed.tensor.parallel import parallelize_module

    from beit_fast.parallel import tensor_parallel_plan

    model = build(order)
    parallelize_module(model, device_mesh(), tensor_parallel_plan(model, device_mesh()))
    return checkpointed(model, order), {}


ENGINES = {"data": data_parallel, "sharded": fully_sharded, "tensor": tensor_parallel}


def save(order: dict[str, Any], rank: int, world: int, folder: Path) -> dict[str, Any]:
    """Save a distributed model without a state dict (an error) and with the gathered one."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    model, _ = ENGINES[order["engine"]](order, rank)
    error = message_of(model.save_pretrained, folder / "invalid")
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        model.save_pretrained(folder / order["engine"], state_dict=state)
    return {"error": error, "wrote": (folder / "invalid").exists()}


def plan_errors(order: dict[str, Any], rank: int, world: int, folder: Path) -> dict[str, Any]:
    """Collect the errors of `tensor_parallel_plan` for invalid models and meshes, and whether a model changed."""
    from torch.distributed.tensor import init_device_mesh
    from torch.distributed.tensor.parallel import parallelize_module

    from beit_fast.parallel import tensor_parallel_plan

    def parallelize(model: nn.Module, mesh: Any) -> None:
        parallelize_module(model, mesh, tensor_parallel_plan(model, mesh))

    twice, uneven = build(order), build(order | {"config": order["config"] | order["uneven"]})
    parallelize(twice, device_mesh())
    uneven.base_model.encoder.layer[1].attention.output.dense = nn.Identity()
    grid = init_device_mesh("cpu", (1, world), mesh_dim_names=("data", "tensor"))
    messages = {
        "uneven": message_of(parallelize, uneven, device_mesh()),
        "grid": message_of(parallelize, uneven, grid),
        "twice": message_of(parallelize, twice, device_mesh()),
        "foreign": message_of(parallelize, nn.Sequential(nn.Linear(2, 2)), device_mesh()),
    }
    return messages | {"changed": any(hasattr(p, "placements") for p in uneven.parameters())}


def message_of(function: Callable[..., Any], *arguments: Any) -> str:
    """Call `function` and return the class and message of its exception."""
    try:
        function(*arguments)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


TASKS = {"train": train, "save": save, "plan errors": plan_errors}


def main(rank: int, world: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    orders = torch.load(folder / "orders.pt")
    results = {name: TASKS[order["task"]](order, rank, world, folder) for name, order in orders.items()}
    torch.save(results, folder / f"results-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
