"""DDP, FSDP2, tensor parallelism and activation checkpointing in two processes against one process."""

import math
import os
import re
import runpy
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
from torch import Tensor

import beit_fast
from beit_fast.ops.cpu_linear import onednn, split_bf16

from ..support.checkout import ROOT
from ..support.examples import assert_has_the_digits_processor
from ..support.models import build
from ..support.scale_out_run import train_step
from ..support.transformers_reference import POSITIONS, TINY, options_for

WORLD = 2
MASKED, SEGMENTED = "BeitForMaskedImageModeling", "BeitForSemanticSegmentation"
FORWARD, BACKWARD = "beit_fast::rel_pos_attention", "beit_fast::rel_pos_attention_backward"
TABLE = "beit.encoder.layer.1.attention.attention.relative_position_bias.relative_position_bias_table"
SHARED_TABLE = "beit.encoder.relative_position_bias.relative_position_bias_table"
DROPPING = {"drop_path_rate": 0.5, "hidden_dropout_prob": 0.2}


@dataclass
class Run:
    """A training step of a model and its configuration in two processes."""

    engine: str
    position: str = "per layer"
    name: str = "BeitForImageClassification"
    size: tuple[int, int] = (32, 32)
    options: dict[str, Any] = field(default_factory=dict)
    attention: str = "triton"
    checkpointing: str | None = None
    mixed: bool = False
    on_meta: bool = False
    every_module: bool = False
    compiled: bool = False
    training: bool = True
    dtype: torch.dtype = torch.float64
    batch: int = 4

    def config(self) -> dict[str, Any]:
        mask_token = {"use_mask_token": self.name == MASKED}  # DDP requires every parameter to be used
        return TINY | POSITIONS[self.position] | options_for(self.name) | mask_token | self.options

    def model(self) -> Any:
        model = build(self.name, self.position, **self.config())
        model.set_attn_implementation(self.attention)
        return model.to(self.dtype).train(self.training)

    def inputs(self) -> dict[str, Tensor]:
        """A batch with equally many labels for every process, so that the mean of their losses is that of the batch."""
        generator = torch.Generator().manual_seed(2)

        def integers(end: int, *shape: int) -> Tensor:
            return torch.randint(0, end, shape, generator=generator)

        height, width = self.size
        patches, masked = (height // 8) * (width // 8), 6
        inputs = {"pixel_values": torch.randn(self.batch, 3, height, width, generator=generator, dtype=self.dtype)}
        if self.name == SEGMENTED:
            return inputs | {"labels": integers(5, self.batch, height, width)}
        inputs["attention_mask"] = (torch.rand(self.batch, patches + 1, generator=generator) > 0.2).long()
        if self.name != MASKED:
            return inputs | {"labels": integers(5, self.batch)}
        ranks = torch.stack([torch.randperm(patches, generator=generator) for _ in range(self.batch)])
        return inputs | {"bool_masked_pos": ranks < masked, "labels": integers(11, self.batch * masked)}

    def order(self, task: str = "train") -> dict[str, Any]:
        options = (
            "engine",
            "attention",
            "checkpointing",
            "mixed",
            "on_meta",
            "every_module",
            "compiled",
            "training",
            "dtype",
        )
        return {name: getattr(self, name) for name in options} | {
            "task": task,
            "class": self.name,
            "config": self.config(),
            "state": dict(self.model().state_dict()),
            "inputs": self.inputs(),
        }

    def one_process_result(self) -> dict[str, Any]:
        model = self.model()
        result = train_step(model, self.inputs())
        return result | {"gradients": {name: p.grad for name, p in model.named_parameters()}}


QUICK = {
    "DDP": Run("data", "both", checkpointing="own"),
    "FSDP2": Run("sharded", "both", size=(48, 32), checkpointing="wrapper", on_meta=True),
    "tensor parallel": Run("tensor", "both", size=(48, 32)),
}
SLOW = {
    "DDP, bias of each layer": Run("data"),
    "DDP, shared bias": Run("data", "shared", MASKED),
    "DDP, wrapped layers": Run("data", checkpointing="wrapper"),
    "DDP, segmentation": Run("data", name=SEGMENTED, training=False),
    "FSDP2, bias of each layer": Run("sharded"),
    "FSDP2, shared bias, checkpointed": Run("sharded", "shared", MASKED, checkpointing="own"),
    "FSDP2, every module alone": Run("sharded", "both", every_module=True),
    "FSDP2, segmentation": Run("sharded", name=SEGMENTED, training=False),
    "FSDP2, eager": Run("sharded", "both", attention="eager"),
    "tensor parallel, bias of each layer, checkpointed": Run("tensor", checkpointing="own"),
    "tensor parallel, shared bias": Run("tensor", "shared", MASKED),
    "tensor parallel, wrapped layers": Run("tensor", checkpointing="wrapper"),
    "tensor parallel, drop path and dropout": Run("tensor", options=DROPPING),
    "tensor parallel, segmentation": Run("tensor", name=SEGMENTED, training=False),
    "tensor parallel, compiled": Run("tensor", "both", compiled=True),
    "tensor parallel, sdpa": Run("tensor", "both", attention="sdpa"),
}
RUNS = QUICK | SLOW
NAMES = [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
MIXED = Run("sharded", "both", mixed=True, dtype=torch.float32)
UNEVEN = {"num_attention_heads": 1, "intermediate_size": 49}


def run_processes(orders: dict[str, dict[str, Any]], folder: Path, **environment: str) -> list[dict[str, Any]]:
    """Run the orders in two processes and return the results of each process by name."""
    if not torch.distributed.is_gloo_available():
        pytest.skip("this torch is built without gloo")
    torch.save(orders, folder / "orders.pt")
    script = Path(__file__).parents[1] / "support" / "scale_out_run.py"
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(WORLD), str(folder)],
            env=os.environ | environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(WORLD)
    ]
    try:
        messages = [rank.communicate(timeout=240)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0] * WORLD, "\n".join(messages)
    return [torch.load(folder / f"results-{rank}.pt") for rank in range(WORLD)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scale_out")


@pytest.fixture(scope="module")
def results(folder: Path) -> list[dict[str, Any]]:
    """The results of each process, by name; all orders share two processes."""
    orders = {name: run.order() for name, run in QUICK.items()}
    orders["save"] = QUICK["FSDP2"].order("save")
    orders["plan errors"] = QUICK["tensor parallel"].order("plan errors") | {"state": None, "uneven": UNEVEN}
    return run_processes(orders, folder)


@pytest.fixture(scope="module")
def slow_results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    orders = {name: run.order() for name, run in (SLOW | {"mixed precision": MIXED}).items()}
    return run_processes(orders, tmp_path_factory.mktemp("slow"))


@pytest.fixture
def result(request: pytest.FixtureRequest, name: str) -> list[dict[str, Any]]:
    """The results of each process for the run `name`."""
    processes = request.getfixturevalue("results" if name in QUICK else "slow_results")
    return [results[name] for results in processes]


def assert_equals_one_process(run: Run, results: list[dict[str, Any]], **tolerance: float) -> None:
    """Compare logits, loss, every gradient and the operator calls; a recomputed layer calls its operators twice."""
    expected = run.one_process_result()
    for operator, repeats in ((FORWARD, 2 if run.checkpointing else 1), (BACKWARD, 1)):
        calls = expected["calls"].get(operator, 0)
        assert (calls > 0) == (run.attention == "triton")
        assert [result["calls"].get(operator, 0) for result in results] == [repeats * calls] * WORLD
    loss = torch.stack([result["loss"] for result in results]).mean()
    torch.testing.assert_close(loss, expected["loss"], **tolerance)
    for rank, result in enumerate(results):
        logits = expected["logits"] if run.engine == "tensor" else expected["logits"].chunk(WORLD)[rank]
        torch.testing.assert_close(result["logits"], logits, **tolerance)
        for name, gradient in expected["gradients"].items():
            found = result["gradients"][name]
            if gradient is None:
                assert found.isnan().all(), name
            else:
                torch.testing.assert_close(found, gradient, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


@pytest.mark.parametrize("name", NAMES)
def test_train_step_equals_one_process(result: list[dict[str, Any]], name: str) -> None:
    assert_equals_one_process(RUNS[name], result)


@pytest.mark.parametrize("name", QUICK)
def test_train_step_without_bias_differs(result: list[dict[str, Any]], name: str) -> None:
    run = RUNS[name]
    model = run.model()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.mul_(0 if key.endswith("bias_table") else 1)
    without = train_step(model, run.inputs())["logits"].chunk(1 if run.engine == "tensor" else WORLD)
    for rank, found in enumerate(result):
        logits = found["logits"]
        assert (without[rank % len(without)] - logits).norm() > 0.01 * logits.norm()


@pytest.mark.parametrize("name", NAMES)
def test_full_state_has_hub_names(result: list[dict[str, Any]], name: str) -> None:
    for found in result:
        torch.testing.assert_close(found["state"], dict(RUNS[name].model().state_dict()), rtol=0, atol=0)


def test_parameters_are_split_among_processes(results: list[dict[str, Any]]) -> None:
    """FSDP2 splits the first dimension of every parameter; tensor parallelism splits heads and their bias columns."""
    total = QUICK["FSDP2"].model().num_parameters()
    held = [sum(math.prod(shape) for shape in result["FSDP2"]["local_shapes"].values()) for result in results]
    assert sum(held) == total
    assert min(held) > 0.4 * total
    for result in results:
        both = result["tensor parallel"]
        for table in (TABLE, SHARED_TABLE):
            assert both["placements"][table] == "(Shard(dim=1),)"
            assert both["local_shapes"][table] == [7 * 7 + 3, 2]
        layer = "beit.encoder.layer.1"
        halves = {
            f"{layer}.attention.attention.query.weight": [16, 32],
            f"{layer}.attention.attention.key.weight": [16, 32],
            f"{layer}.attention.attention.value.bias": [16],
            f"{layer}.attention.output.dense.weight": [32, 16],
            f"{layer}.intermediate.dense.weight": [24, 32],
            f"{layer}.output.dense.weight": [32, 24],
        }
        assert {name: both["local_shapes"][name] for name in halves} == halves


def test_tensor_parallel_block_needs_four_reductions(results: list[dict[str, Any]]) -> None:
    for result in results:
        calls = result["tensor parallel"]["calls"]
        collectives = {name: count for name, count in calls.items() if name.startswith("_c10d")}
        assert collectives["_c10d_functional::all_reduce"] == 4 * TINY["num_hidden_layers"], collectives


@pytest.mark.slow
def test_mixed_precision_equals_bf16_model(slow_results: list[dict[str, Any]]) -> None:
    """Forward and backward equal those of a bf16 model; gradients are averaged and stored in fp32."""
    gradients = []
    for rank, result in enumerate(slow_results):
        model = MIXED.model().bfloat16()
        part = {name: tensor.chunk(WORLD)[rank] for name, tensor in MIXED.inputs().items()}
        expected = train_step(model, part | {"pixel_values": part["pixel_values"].bfloat16()})
        for operator in (FORWARD, BACKWARD):
            assert result["mixed precision"]["calls"][operator] == expected["calls"][operator]
        torch.testing.assert_close(result["mixed precision"]["logits"], expected["logits"], rtol=0, atol=0)
        gradients.append({name: p.grad.float() for name, p in model.named_parameters()})
    mean = {name: (gradients[0][name] + gradients[1][name]) / 2 for name in gradients[0]}
    for result in slow_results:
        torch.testing.assert_close(result["mixed precision"]["gradients"], mean)


def test_sharded_model_on_meta_initializes(results: list[dict[str, Any]]) -> None:
    """`to_empty` and `init_weights` initialize every parameter; then rank 0 broadcasts its weights."""
    run = QUICK["FSDP2"]
    config = beit_fast.BeitConfig(**run.config())
    for result in results:
        report = result["FSDP2"]
        assert report["was_empty"]
        first = report["first_values"]
        constants = {
            name: p for name, p in beit_fast.BeitForImageClassification(config).named_parameters() if p.ndim < 2
        }
        constants |= {TABLE: torch.zeros(7 * 7 + 3, 4), SHARED_TABLE: torch.zeros(7 * 7 + 3, 4)}
        for name, value in constants.items():
            torch.testing.assert_close(first[name], value.detach().double())
        weights = torch.cat([x.flatten() for name, x in first.items() if x.ndim > 1 and name.endswith("weight")])
        assert abs(weights.std() / config.initializer_range - 1) < 0.05


def test_save_pretrained_sharded_needs_full_state(results: list[dict[str, Any]], folder: Path) -> None:
    for result in results:
        assert "ValueError" in result["save"]["error"]
        assert "get_model_state_dict" in result["save"]["error"]
        assert "beit.embeddings.cls_token" in result["save"]["error"]
        assert not result["save"]["wrote"]
    loaded = beit_fast.BeitForImageClassification.from_pretrained(folder / "sharded")
    torch.testing.assert_close(loaded.state_dict(), QUICK["FSDP2"].model().state_dict(), rtol=0, atol=0)


def test_tensor_parallel_plan_invalid_raises_without_changes(results: list[dict[str, Any]]) -> None:
    for result in results:
        messages = result["plan errors"]
        for reason in (
            r"beit\.encoder\.layer\.0: 1 attention heads cannot be split evenly among 2 processes",
            r"beit\.encoder\.layer\.0: 49 MLP features cannot be split evenly among 2 processes",
            r"beit\.encoder\.layer\.1: attention\.output\.dense is a torch\.nn\.modules\.linear\.Identity, not a ",
        ):
            assert re.search(reason, messages["uneven"])
        assert not messages["changed"]
        assert "2 dimensions; pass one of them, such as mesh['data'] or mesh['tensor']" in messages["grid"]
        assert "its parameters are DTensors" in messages["twice"]
        assert messages["foreign"] == (
            "TypeError: tensor_parallel_plan expects a model with a BeitLayer of beit_fast, not only Linear, Sequential"
        )


@pytest.mark.parametrize(
    ("message", "state"),
    [
        ("lacks parameters of the model: beit.embeddings.cls_token", {"beit.embeddings.cls_token": None}),
        ("has parameters that the model does not have: other", {"other": torch.zeros(1)}),
        (
            "has parameters of a different shape: classifier.bias [2] (expected [5])",
            {"classifier.bias": torch.zeros(2)},
        ),
    ],
)
def test_save_pretrained_foreign_state_dict_raises(tmp_path: Path, message: str, state: dict[str, Any]) -> None:
    model = build()
    given = {name: tensor for name, tensor in (model.state_dict() | state).items() if tensor is not None}
    with pytest.raises(ValueError, match=re.escape(message)):
        model.save_pretrained(tmp_path / "folder", state_dict=given)
    assert not (tmp_path / "folder").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("gemm", "operator"), [("onednn", "mkldnn::_linear_pointwise"), ("split_bf16", "beit_fast::_matmul_split_bf16")]
)
def test_cpu_linear_in_sharded_model_equals_one_process(tmp_path: Path, gemm: str, operator: str) -> None:
    """The GEMM saves weights for the backward; FSDP2 frees them after the forward and gathers them again."""
    unsupported_reasons = {
        "onednn": onednn.unsupported_reason("cpu", torch.float32),
        "split_bf16": split_bf16.unsupported_reason(),
    }
    if unsupported_reasons[gemm] is not None:
        pytest.skip(str(unsupported_reasons[gemm]))
    run = Run("sharded", "both", dtype=torch.float32, batch=40)  # enough rows to pack the weights
    runs = {"plain": run, "checkpointed": replace(run, checkpointing="own"), "DDP": replace(run, engine="data")}
    orders = {name: run.order() for name, run in runs.items()}
    results = run_processes(orders, tmp_path, BEIT_FAST_CPU_LINEAR=gemm)
    for name, run in runs.items():
        found = [result[name] for result in results]
        assert all(result["calls"][operator] > 0 for result in found)
        assert_equals_one_process(run, found, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_triton_kernels_in_sharded_model_equal_one_process(tmp_path: Path) -> None:
    """The Triton interpreter runs residual and norm with the parameters of a sharded layer."""
    small = {"num_hidden_layers": 2, "num_attention_heads": 2}
    run = Run("data", options=small, size=(16, 16), batch=2, dtype=torch.float32)
    runs = {engine: replace(run, engine=engine) for engine in ("data", "sharded", "tensor")}
    results = run_processes({name: run.order() for name, run in runs.items()}, tmp_path, TRITON_INTERPRET="1")
    for name, run in runs.items():
        found = [result[name] for result in results]
        assert all(result["calls"]["beit_fast::residual_norm"] > 0 for result in found)
        assert_equals_one_process(run, found, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_ddp_digits_in_two_processes_learns(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(ROOT / "examples" / "ddp_digits.py"), "--epochs", "6", "--out", str(tmp_path / "model")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    losses = [float(loss) for loss in re.findall(r"^epoch +\d+: loss ([\d.]+)$", done.stdout, re.MULTILINE)]
    assert losses[-1] < losses[0] / 2
    (accuracy,) = re.findall(r"^2 processes, .* held-out accuracy ([\d.]+)%$", done.stdout, re.MULTILINE)
    assert float(accuracy) > 60  # chance level: 10 %
    assert beit_fast.BeitForImageClassification.from_pretrained(tmp_path / "model").config.num_labels == 10
    assert_has_the_digits_processor(tmp_path / "model")


def test_ddp_digits_without_torchrun_prints_usage(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(ROOT / "examples")  # it imports its neighbour
    monkeypatch.delenv("RANK", raising=False)
    main = runpy.run_path(str(ROOT / "examples" / "ddp_digits.py"), run_name="ddp_digits")["main"]
    with pytest.raises(SystemExit) as raised:
        main([])
    assert raised.value.code == 2
    assert "torchrun --standalone --nproc-per-node 2" in capsys.readouterr().err
