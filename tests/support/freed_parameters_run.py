"""Models whose hooks free parameters after each forward, one process a case.

`python -m tests.support.freed_parameters_run FOLDER` writes `FOLDER/results.pt`. For each case it has the results of
the model with hooks and of the same model without them, or the text of an error. A segfault is recorded as an error.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import multiprocessing
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from beit_fast.integrations.mmseg import MmsegBeit

from . import models, timm_reference, transformers_models
from .transformers_reference import randomize

# By name, after timm_reference: it imports timm if torchvision is not installed.
accelerate_timm = importlib.import_module("beit_fast.integrations.timm").accelerate
transformers_integration = importlib.import_module("beit_fast.integrations.transformers")

CLASSIFICATION = "BeitForImageClassification"
TIMM_POSITIONS = {
    "per layer": {"use_rel_pos_bias": True},
    "shared": {"use_shared_rel_pos_bias": True},
    "both": {"use_rel_pos_bias": True, "use_shared_rel_pos_bias": True},
}


@contextlib.contextmanager
def own_model(position: str) -> Iterator[Any]:
    model = models.build(CLASSIFICATION, position)
    model.set_attn_implementation("triton")
    yield model


@contextlib.contextmanager
def accelerated_model(position: str) -> Iterator[Any]:
    model = transformers_models.build(CLASSIFICATION, position)
    transformers_integration.accelerate(model, "triton")
    yield model


@contextlib.contextmanager
def registered_model(position: str) -> Iterator[Any]:
    transformers_integration.register()
    try:
        yield transformers_models.build(CLASSIFICATION, position, "triton")
    finally:
        transformers_integration.unregister()


@contextlib.contextmanager
def timm_model(position: str) -> Iterator[Any]:
    model = timm_reference.build(**TIMM_POSITIONS[position])
    accelerate_timm(model, "triton")
    yield model


@contextlib.contextmanager
def mmseg_model(position: str) -> Iterator[Any]:
    """`MmsegBeit` with its pyramid; mmsegmentation's BEiT has the bias of each layer only."""
    torch.manual_seed(7)
    model = MmsegBeit(img_size=32, patch_size=8, embed_dims=32, num_layers=4, num_heads=4, mlp_ratio=1.5,
        out_indices=(0, 1, 2, 3), feature_pyramid=True, attn_implementation="triton")  # fmt: skip
    randomize(model)
    yield model.eval()


ROUTES: dict[str, Callable[[str], contextlib.AbstractContextManager[Any]]] = {
    "own": own_model,
    "accelerated": accelerated_model,
    "registered": registered_model,
    "timm": timm_model,
    "mmseg": mmseg_model,
}
POSITIONS_OF = {route: ["per layer"] if route == "mmseg" else list(TIMM_POSITIONS) for route in ROUTES}
"""The kinds of bias of each route."""


def table_owners(model: nn.Module) -> list[nn.Module]:
    """The modules that own a bias table: bias modules, or the attention of timm."""
    return [x for x in model.modules() if getattr(x, "relative_position_bias_table", None) is not None]


def parameter_owners(model: nn.Module) -> list[nn.Module]:
    """The modules inside a model that own a parameter, children before their parents.

    timm reads the weight of `qkv` without calling it, so that this module cannot be freed alone.
    """
    read_by_parent = {x.qkv for x in model.modules() if hasattr(x, "q_bias")}
    owners = [x for x in model.modules() if any(True for _ in x.parameters(recurse=False))]
    return [x for x in reversed(owners) if x is not model and x not in read_by_parent]


def shard(model: nn.Module, owners: list[nn.Module]) -> None:
    """Shard each owner alone, then the rest of the model, with FSDP2."""
    from torch.distributed.fsdp import fully_shard

    for owner in owners:
        fully_shard(owner)
    fully_shard(model)


def shard_twice(model: Any, owners: list[nn.Module]) -> None:
    """Apply tensor parallelism, then shard each owner along another mesh dimension."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import init_device_mesh
    from torch.distributed.tensor.parallel import parallelize_module

    from beit_fast.parallel import tensor_parallel_plan

    mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=("data", "tensor"))
    parallelize_module(model, mesh["tensor"], tensor_parallel_plan(model, mesh["tensor"]))
    for unit in (*owners, model):
        fully_shard(unit, mesh=mesh["data"])


def free_by_hooks(model: nn.Module, owners: list[nn.Module]) -> list[Callable[[], None]]:
    """Empty the parameters of each owner outside its forward, as ZeRO-3 does.

    Returns:
        A function for each owner that restores its parameters.
    """
    return [_free_outside_forward(owner) for owner in owners]


def _free_outside_forward(owner: nn.Module) -> Callable[[], None]:
    whole = {p: p.detach().clone() for p in owner.parameters(recurse=False)}

    def restore(*unused: Any) -> None:
        for parameter, values in whole.items():
            parameter.data = values.clone()

    def free(*unused: Any) -> None:
        for parameter in whole:
            parameter.data.fill_(torch.nan)  # a saved view then reads NaN
            parameter.data = parameter.new_empty(0)

    free()
    owner.register_forward_pre_hook(restore)
    owner.register_forward_hook(free)
    return restore


@dataclass(frozen=True)
class Case:
    """A model, its image size, and the engine that frees its parameters."""

    route: str
    position: str
    engine: str
    size: tuple[int, int] = (32, 32)

    @property
    def name(self) -> str:
        height, width = self.size
        return f"{self.route}, {self.position}, {self.engine}, {height}x{width}"

    def run(self) -> dict[str, dict[str, Tensor]]:
        with ROUTES[self.route](self.position) as model:
            model.double()
            whole = copy.deepcopy(model)
            before_backward: list[Callable[[], None]] = []
            if self.engine == "ZeRO-3":
                before_backward = free_by_hooks(model, table_owners(model))
            elif self.engine == "FSDP2 and tensor parallel":
                shard_twice(model, table_owners(model))
            else:
                shard(model, table_owners(model) if self.engine == "FSDP2" else parameter_owners(model))
            pixels = torch.randn(2, 3, *self.size, dtype=torch.float64)
            return {"expected": step(whole, pixels), "found": step(model, pixels, before_backward)}


CASES = {
    case.name: case
    for case in (
        *(
            Case(route, position, engine)
            for route in ROUTES
            for position in POSITIONS_OF[route]
            for engine in ("FSDP2", "ZeRO-3")
        ),
        *(Case(route, "both", engine, (48, 40)) for route in ("own", "accelerated") for engine in ("FSDP2", "ZeRO-3")),
        *(Case("registered", "both", engine, (48, 40)) for engine in ("FSDP2", "ZeRO-3")),
        *(Case("mmseg", "per layer", engine, (48, 40)) for engine in ("FSDP2", "ZeRO-3")),
        *(Case(route, POSITIONS_OF[route][-1], "FSDP2 of every module") for route in ROUTES),
        Case("own", "both", "FSDP2 and tensor parallel"),
    )
}


def step(
    model: nn.Module, pixels: Tensor, before_backward: list[Callable[[], None]] | None = None
) -> dict[str, Tensor]:
    """Return the logits, or the maps in a row, and every gradient, each as a full tensor."""
    logits = _as_one_tensor(model(pixels))
    for restore in before_backward or ():
        restore()
    (logits * torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).view_as(logits)).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    whole = {name: x.full_tensor() if hasattr(x, "full_tensor") else x for name, x in gradients.items()}
    return {"logits": logits.detach()} | whole


def _as_one_tensor(outputs: Any) -> Tensor:
    if isinstance(outputs, tuple):
        return torch.cat([x.flatten() for x in outputs])
    return outputs if isinstance(outputs, Tensor) else outputs.logits


def run_alone(name: str, file: Path) -> None:
    """Run a case in a process group of one process and save its result."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        result: Any = CASES[name].run()
    except Exception:
        result = {"error": traceback.format_exc()}
    torch.save(result, file)
    dist.destroy_process_group()


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    for number, name in enumerate(CASES):
        file = folder / f"{number}.pt"
        process = multiprocessing.get_context("fork").Process(target=run_alone, args=(name, file))
        process.start()
        process.join()
        ended = {"error": f"the process ended with {process.exitcode}"}
        results[name] = torch.load(file) if file.exists() else ended
    torch.save(results, folder / "results.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
