"""Sharding rules for DTensor: forward and backward equal one process."""

import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed

import beit_fast

from ..support.cases import attention_case

WORLD = 4
WINDOW = (2, 3)
SAMPLES = {"tokens": [0], "table": [None], "mask": [0]}
HEADS = {"tokens": [2], "table": [1], "mask": [None]}
REPLICATED = {"tokens": [None], "table": [None], "mask": [None]}


@dataclass
class Run:
    """One attention call: placements of its tensors, and expected placements of its results."""

    sharded: dict[str, list[Any]]
    out: str
    table_gradient: str = ""
    batch: int = 4
    heads: int = 4
    masked: bool = True
    biased: bool = True
    trained: tuple[int, ...] = (0, 1, 2, 3)  # of q, k, v, table
    dropout_p: float = 0.0
    mesh: tuple[int, ...] = (WORLD,)
    compiled: bool = False
    inputs: list[Any] = field(init=False)

    def __post_init__(self):
        case = attention_case(WINDOW, torch.float64, batch=self.batch, heads=self.heads, head_dim=8, biased=self.biased)
        mask = torch.rand(self.batch, 7, generator=torch.Generator().manual_seed(1)) > 0.3 if self.masked else None
        tensors = (x if x is None else x.detach() for x in (case.query, case.key, case.value, case.table))
        self.inputs = [*tensors, WINDOW, mask]
        self.grad_out = case.grad_out
        self.kwargs = {"dropout_p": self.dropout_p, "seed": 5}

    def order(self):
        tokens, table, mask = self.sharded["tokens"], self.sharded["table"], self.sharded["mask"]
        placements = [tokens, tokens, tokens, table if self.biased else None, None, mask if self.masked else None]
        return {
            "op": "rel_pos_attention",
            "args": self.inputs,
            "kwargs": self.kwargs,
            "placements": placements,
            "trained": self.trained,
            "mesh": self.mesh,
            "grad_out": self.grad_out,
            "compiled": self.compiled,
        }

    def in_one_process(self):
        inputs = list(self.inputs)
        for number in self.trained:
            inputs[number] = inputs[number].clone().requires_grad_()
        out = beit_fast.rel_pos_attention(*inputs, **self.kwargs)
        return out.detach(), torch.autograd.grad(out, [inputs[number] for number in self.trained], self.grad_out)


BOTH = {"tokens": [0, 2], "table": [None, 1], "mask": [0, None]}
RUNS = {
    "samples": Run(SAMPLES, "(Shard(dim=0),)", "(Partial(sum),)"),
    "heads": Run(HEADS, "(Shard(dim=2),)", "(Shard(dim=1),)"),
    "replicated": Run(REPLICATED, "(Replicate(),)", "(Replicate(),)"),
    "samples and heads": Run(BOTH, "(Shard(dim=0), Shard(dim=2))", "(Partial(sum), Shard(dim=1))", mesh=(2, 2)),
    # Four processes have 2, 2, 2 and 0 of six samples.
    "samples, unevenly": Run(SAMPLES, "(Shard(dim=0),)", "(Partial(sum),)", batch=6),
    "heads, unevenly": Run(HEADS, "(Shard(dim=2),)", "(Shard(dim=1),)", heads=6),
    "fewer samples than processes": Run(SAMPLES, "(Replicate(),)", "(Replicate(),)", batch=2),
    "samples, no mask": Run(SAMPLES, "(Shard(dim=0),)", "(Partial(sum),)", masked=False),
    "samples, no table": Run(SAMPLES, "(Shard(dim=0),)", biased=False, trained=(0, 1, 2)),
    "heads, no table": Run(HEADS, "(Shard(dim=2),)", biased=False, trained=(0, 1, 2)),
    "samples, neither": Run(SAMPLES, "(Shard(dim=0),)", biased=False, masked=False, trained=(0, 1, 2)),
    "samples, frozen table": Run(SAMPLES, "(Shard(dim=0),)", trained=(0, 1, 2)),
    "heads, frozen table": Run(HEADS, "(Shard(dim=2),)", trained=(0, 1, 2)),
    "samples, only the table": Run(SAMPLES, "(Shard(dim=0),)", "(Partial(sum),)", trained=(3,)),
    "heads, only the table": Run(HEADS, "(Shard(dim=2),)", "(Shard(dim=1),)", trained=(3,)),
    # Rules do not support sharded tokens, so DTensor redistributes them to samples.
    "tokens": Run(SAMPLES | {"tokens": [1]}, "(Shard(dim=0),)", "(Partial(sum),)"),
    # These follow calls of the same shapes without dropout, whose cached rules must not be reused.
    "samples, dropout": Run(SAMPLES, "(Replicate(),)", "(Replicate(),)", dropout_p=0.3),
    "heads, dropout": Run(HEADS, "(Replicate(),)", "(Replicate(),)", dropout_p=0.3),
    "samples, compiled": Run(SAMPLES, "(Shard(dim=0),)", "(Partial(sum),)", compiled=True),
    "heads, compiled": Run(HEADS, "(Shard(dim=2),)", "(Shard(dim=1),)", compiled=True),
}


def patch_embed_order():
    """Describe a `patch_embed` call of a masked batch, sharded by samples."""
    generator = torch.Generator().manual_seed(2)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    args = [normal(4, 3, 8, 12), normal(8, 3, 4, 4), normal(8), normal(8)]
    args += [torch.rand(4, 6, generator=generator) > 0.5, normal(8), normal(1, 7, 8)]
    return {
        "op": "patch_embed",
        "args": args,
        "kwargs": {},
        "placements": [[0], [None], [None], [None], [0], [None], [None]],
        "trained": (0, 1, 2, 3, 5, 6),
        "mesh": (WORLD,),
        "grad_out": normal(4, 7, 8),
        "compiled": False,
    }


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Results of all runs by name, from the same four processes."""
    if not torch.distributed.is_gloo_available():
        pytest.skip("this PyTorch build has no gloo")
    folder = tmp_path_factory.mktemp("sharded")
    orders = {name: run.order() for name, run in RUNS.items()} | {"patch_embed": patch_embed_order()}
    torch.save(list(orders.values()), folder / "runs.pt")
    script = Path(__file__).parents[1] / "support" / "sharded_run.py"
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(WORLD), str(folder)], stderr=subprocess.PIPE, text=True
        )
        for rank in range(WORLD)
    ]
    try:
        messages = [rank.communicate(timeout=240)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0] * WORLD, "\n".join(messages)
    return dict(zip(orders, torch.load(folder / "results.pt"), strict=True))


@pytest.mark.parametrize("name", RUNS)
def test_attention_equals_one_process(results, name):
    run, result = RUNS[name], results[name]
    out, grads = run.in_one_process()
    assert result["out_placements"] == run.out
    torch.testing.assert_close(result["out"], out, rtol=0, atol=0)
    for number, grad, placements, expected in zip(
        run.trained, result["grads"], result["grad_placements"], grads, strict=True
    ):
        is_table = number == 3
        assert placements == (run.table_gradient if is_table else run.out)
        exact = {} if is_table else {"rtol": 0, "atol": 0}  # samples are summed in another order
        torch.testing.assert_close(grad, expected, **exact)


def test_attention_table_gradient_is_sum_over_processes(results):
    """A local gradient is only a part of the sum."""
    local, full = results["samples"]["local_grads"][3], results["samples"]["grads"][3]
    assert local.shape == full.shape
    assert (local - full).abs().max() > 0.1 * full.abs().max()


def test_patch_embed_equals_one_process(results):
    order, result = patch_embed_order(), results["patch_embed"]
    args = [x.clone().requires_grad_(number in order["trained"]) for number, x in enumerate(order["args"])]
    out = beit_fast.patch_embed(*args)
    grads = torch.autograd.grad(out, [args[number] for number in order["trained"]], order["grad_out"])
    assert result["out_placements"] == "(Shard(dim=0),)"
    torch.testing.assert_close(result["out"], out.detach())
    assert result["grad_placements"] == ["(Shard(dim=0),)"] + ["(Partial(sum),)"] * 5
    for grad, expected in zip(result["grads"], grads, strict=True):
        torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize(
    "imports",
    [
        "beit_fast, torch.distributed.tensor",
        "torch.distributed.tensor, beit_fast",
        "beit_fast, torch.distributed.tensor.experimental",
        "beit_fast, importlib.util; importlib.util.find_spec('torch.distributed.tensor')",
    ],
)
def test_rules_in_any_import_order_are_registered(imports):
    code = f"""
import {imports}
from torch.distributed.tensor import DTensor
rules = DTensor._op_dispatcher.sharding_propagator.op_strategy_funcs
assert {{beit_fast.ops.attention_op, beit_fast.ops.attention_backward_op, beit_fast.ops.patch_embed_op}} <= rules.keys()
"""
    subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", code], check=True)
