"""One rank of a sharded run: `python sharded_run.py RANK WORLD FOLDER`.

It needs only torch and beit_fast. `FOLDER/runs.pt` has a list of runs, each a dict with these keys:
    op: A name in `beit_fast`.
    args, kwargs: Its arguments.
    trained: The positions of the arguments that require gradients.
    placements: A list for each argument, None if it is not a tensor.
    mesh: The shape of the device mesh.
    grad_out: The gradient of the output.
    compiled: Whether to compile the operator.
Rank 0 writes `FOLDER/results.pt`: for each run the gathered output and gradients, their placements, and rank 0's local
part of the gradients.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import torch
import torch.distributed as dist

import beit_fast


@functools.cache
def device_mesh(shape: tuple[int, ...]):
    """Return one mesh object for each shape.

    DTensor caches the first object, and torch.compile requires a single one in a graph.
    """
    from torch.distributed.tensor import init_device_mesh

    return init_device_mesh("cpu", shape)


def perform(run: dict) -> dict:
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    def place(tensor, dims):
        placements = [Replicate() if dim is None else Shard(dim) for dim in dims]
        return distribute_tensor(tensor, device_mesh(run["mesh"]), placements)

    args = [x if dims is None else place(x, dims) for x, dims in zip(run["args"], run["placements"], strict=True)]
    for number in run["trained"]:
        args[number].requires_grad_()
    function = getattr(beit_fast, run["op"])
    if run["compiled"]:
        function = torch.compile(function, fullgraph=True, backend="aot_eager")
    out = function(*args, **run["kwargs"])
    trained = [args[number] for number in run["trained"]]
    grads = torch.autograd.grad(out, trained, place(run["grad_out"], run["placements"][0]))
    return {
        "out": out.full_tensor().detach(),
        "out_placements": str(out.placements),
        "grads": [grad.full_tensor() for grad in grads],
        "grad_placements": [str(grad.placements) for grad in grads],
        "local_grads": [grad.to_local() for grad in grads],
    }


def main(rank: int, world: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    results = [perform(run) for run in torch.load(folder / "runs.pt")]
    if rank == 0:
        torch.save(results, folder / "results.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
