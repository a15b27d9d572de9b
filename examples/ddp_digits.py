"""Train a tiny BEiT on handwritten digits in several processes.

torchrun --standalone --nproc-per-node 2 examples/ddp_digits.py [--out FOLDER] [--epochs 8] [--seed 0]

Every process takes its share of each batch, and torch's DistributedDataParallel averages the gradients. The model needs
no changes. The data are scikit-learn's 1797 digits of 8x8 pixels, a fifth of which is held out.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from train_digits import ARCHITECTURE, PROCESSOR, Digits, augment, load_digits, optimizer_for

from beit_fast import BeitConfig, BeitForImageClassification, BeitImageProcessor


def main(arguments: list[str] | None = None) -> int:
    """Train, evaluate, print loss and accuracy once, and return the exit code."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if "RANK" not in os.environ:
        parser.error("torchrun starts the processes: torchrun --standalone --nproc-per-node 2 examples/ddp_digits.py")
    try:
        digits = load_digits(options.seed)
    except ImportError as error:
        parser.error(f"the digits come with scikit-learn: pip install scikit-learn ({error})")
    processes = int(os.environ["WORLD_SIZE"])
    if options.batch_size % processes or not 0 < options.batch_size <= len(digits.training):
        parser.error(f"--batch-size must be a multiple of {processes} from {processes} to {len(digits.training)}")
    start = time.perf_counter()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    config = BeitConfig(use_relative_position_bias=True, num_labels=10, dtype="float32", **ARCHITECTURE)
    model = BeitForImageClassification(config)
    loss = train(DistributedDataParallel(model), digits, options)
    right = accuracy(model, digits)
    if dist.get_rank() == 0:
        seconds = time.perf_counter() - start
        print(f"{processes} processes, {seconds:.1f} s: loss {loss:.3f}, held-out accuracy {right:.2%}")
        if options.out is not None:
            model.save_pretrained(options.out)
            BeitImageProcessor.from_dict(PROCESSOR).save_pretrained(options.out)
    dist.destroy_process_group()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Train a tiny BEiT on handwritten digits in several processes.")
    parser.add_argument("--out", type=Path, help="folder to write the model and its image processor to")
    parser.add_argument("--epochs", type=int, default=8, help="default: %(default)s")
    parser.add_argument("--rate", type=float, default=1.5e-3, help="peak learning rate (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=32, help="of all processes together (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the split and of all random numbers")
    return parser


def train(model: nn.Module, digits: Digits, options: argparse.Namespace) -> float:
    """Train on this process' share of each batch; return the mean loss of the last epoch."""
    steps = len(digits.training) // options.batch_size
    optimizer, schedule = optimizer_for(model, options.rate, steps * options.epochs)
    order = torch.Generator().manual_seed(options.seed)  # the same order everywhere
    torch.manual_seed(options.seed + dist.get_rank())  # but augmentation and drop path are each process' own
    mean = torch.zeros(())
    for epoch in range(1, options.epochs + 1):
        shuffled = digits.training[torch.randperm(len(digits.training), generator=order)]
        batches = shuffled.split(options.batch_size)[:steps]  # whole ones
        losses = [step(model, digits, batch, optimizer, schedule) for batch in batches]
        mean = torch.stack(losses).mean() / dist.get_world_size()
        dist.all_reduce(mean)
        if dist.get_rank() == 0:
            print(f"epoch {epoch:2}: loss {mean:.3f}", flush=True)
    return mean.item()


def step(
    model: nn.Module,
    digits: Digits,
    batch: Tensor,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
) -> Tensor:
    """Take one step on this process' share of the digits at `batch`; return its loss."""
    share = batch[dist.get_rank() :: dist.get_world_size()]
    loss = model(augment(digits.pixels[share]), labels=digits.labels[share]).loss
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 3.0)
    optimizer.step()
    schedule.step()
    return loss.detach()


@torch.no_grad()
def accuracy(model: nn.Module, digits: Digits) -> float:
    """The share of held-out digits that are classified correctly, over all processes."""
    model.eval()
    share = digits.held_out[dist.get_rank() :: dist.get_world_size()]
    right = (model(digits.pixels[share]).logits.argmax(-1) == digits.labels[share]).sum()
    dist.all_reduce(right)
    return right.item() / len(digits.held_out)


if __name__ == "__main__":
    raise SystemExit(main())
