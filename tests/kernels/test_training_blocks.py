"""Blocks on Triton's kernels: residual, layer scale, drop path and LayerNorm fused, or the modules called."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import beit_fast
from beit_fast.layers import BeitDropPath
from beit_fast.layers.context import BlockContext, choose_kernels
from beit_fast.ops.dispatch import availability

from ..support.oracle import assert_within_budget
from ..support.transformers_reference import POSITIONS, TINY, randomize
from .cases import BACKWARD_FACTOR, FORWARD_FACTOR, device

FUSED = ["beit_fast.residual_norm.default", "beit_fast.residual_add.default"]
LAYERS = 2
SMALL = TINY | {"num_hidden_layers": LAYERS, "num_attention_heads": 2, "image_size": 16, "drop_path_rate": 0.5}
TOKENS = 5


def build(**options: Any) -> beit_fast.BeitForImageClassification:
    """Two blocks, the second of which drops half of its paths."""
    values = SMALL | POSITIONS["per layer"] | options
    model = beit_fast.BeitForImageClassification(beit_fast.BeitConfig(**values))
    randomize(model)
    return model.to(device()).train()


def images() -> Tensor:
    return torch.randn(3, 3, 16, 16).to(device())


@pytest.fixture
def same_paths_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drop path draws fp32 numbers on the CPU, so that every dtype and device drops the same paths."""
    draw = BeitDropPath._draw

    def on_the_cpu(self: BeitDropPath, branch: Tensor, dtype: torch.dtype | None = None) -> Tensor | None:
        factors = draw(self, torch.empty(branch.shape[0]), dtype)
        return None if factors is None else factors.to(branch.device, dtype or branch.dtype)

    monkeypatch.setattr(BeitDropPath, "_draw", on_the_cpu)


def train_step(
    model: nn.Module, pixels: Tensor, implementation: str, seed: int = 3
) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits, and the gradient of every parameter, of a model that is told which attention to run."""
    getattr(model, "_orig_mod", model).set_attn_implementation(implementation)
    model.zero_grad()
    torch.manual_seed(seed)
    output = model(pixels, labels=torch.arange(3, device=pixels.device))
    output.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return output.logits.detach(), gradients


def operators_in(function: Callable[[], Any]) -> list[str]:
    """Which of the fused operators ran, forward."""
    seen = []

    class Spy(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Spy():
        function()
    return [name for name in seen if name in FUSED]


def block_context(hidden_states: Tensor) -> BlockContext:
    """The context of a forward pass of `build()` with `"triton"`, for images of 2 x 2 patches."""
    kernels = choose_kernels("triton", hidden_states.device, hidden_states.dtype, 16)
    return BlockContext((2, 2), None, None, None, kernels)


def runs_fused(model: nn.Module, *arguments: Any, **options: Any) -> bool:
    """Whether all blocks run fused; that some do and some do not is a failure."""
    model.set_attn_implementation("triton")
    seen = operators_in(lambda: model(images(), *arguments, **options))
    assert seen in ([], FUSED * LAYERS)
    return bool(seen)


@pytest.mark.usefixtures("same_paths_everywhere")
@pytest.mark.parametrize("options", [{}, {"layer_scale_init_value": 0.0}, {"drop_path_rate": 0.0}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_training_step(options: dict[str, float], dtype: torch.dtype) -> None:
    model, pixels = build(**options).to(dtype), images().to(dtype)
    results = []
    assert operators_in(lambda: results.extend(train_step(model, pixels, "triton"))) == FUSED * LAYERS
    fused, fused_gradients = results
    eager, eager_gradients = train_step(model, pixels, "eager")
    exact, exact_gradients = train_step(model.double(), pixels.double(), "eager")
    assert_within_budget("logits", fused, exact, eager, FORWARD_FACTOR)
    assert fused_gradients.keys() == eager_gradients.keys() == exact_gradients.keys()
    for name, gradient in fused_gradients.items():
        assert_within_budget(name, gradient, exact_gradients[name], eager_gradients[name], BACKWARD_FACTOR)


@pytest.mark.usefixtures("same_paths_everywhere")
def test_autocast() -> None:
    dtype = torch.bfloat16
    model, pixels = build(), images()
    with torch.autocast(device().type, dtype=dtype):
        fused, fused_gradients = train_step(model, pixels, "triton")
        eager, eager_gradients = train_step(model, pixels, "eager")
    exact, exact_gradients = train_step(model.double(), pixels.double(), "eager")
    assert_within_budget("logits", fused, exact, eager, FORWARD_FACTOR, dtype)
    for name, gradient in fused_gradients.items():
        assert gradient.dtype == torch.float32
        assert_within_budget(name, gradient, exact_gradients[name], eager_gradients[name], BACKWARD_FACTOR, dtype)


def test_the_same_seed_drops_the_same_paths() -> None:
    """Without `same_paths_everywhere`: the numbers are those that calling the module draws."""
    drop_path = BeitDropPath(0.5).train()
    branch = torch.ones(64, 2, 3, device=device())
    torch.manual_seed(5)
    called = drop_path(branch)
    torch.manual_seed(5)
    factors = drop_path.drop_path_scale(branch)
    assert factors is not None
    assert set(factors.tolist()) == {0.0, 2.0}
    assert torch.equal(called, branch * factors[:, None, None])
    assert drop_path.eval().drop_path_scale(branch) is None


def test_dropping_every_path_leaves_the_residual() -> None:
    model = build()
    for layer in model.beit.encoder.layer:
        layer.drop_path = BeitDropPath(1.0).train()
    hidden_states = model(images(), output_hidden_states=True).hidden_states
    assert runs_fused(model)
    assert all(torch.equal(state, hidden_states[0]) for state in hidden_states)


def test_evaluation_is_fused_too_and_drops_nothing() -> None:
    model = build().eval()
    assert runs_fused(model)
    pixels = images()
    with torch.no_grad():
        fused, eager = (model.set_attn_implementation(name) or model(pixels).logits for name in ("triton", "eager"))
        exact = model.double()(pixels.double()).logits
    assert_within_budget("logits", fused, exact, eager, FORWARD_FACTOR)


def _hook(module: nn.Module, *arguments: Any) -> None:
    """Watches and changes nothing."""


class _OwnNorm(nn.LayerNorm):
    """Of another type, so it may compute something else."""


OBSTACLES = {
    "a hook before the norm": lambda layer: layer.layernorm_after.register_forward_pre_hook(_hook),
    "a hook after the norm": lambda layer: layer.layernorm_after.register_forward_hook(_hook),
    "a hook in the backward": lambda layer: layer.layernorm_after.register_full_backward_hook(_hook),
    "a hook on drop path": lambda layer: layer.drop_path.register_forward_hook(_hook),
    "another norm": lambda layer: setattr(layer, "layernorm_after", _OwnNorm(32, device=device())),
    "another drop path": lambda layer: setattr(layer, "drop_path", nn.Dropout()),
    "a parametrized norm": lambda layer: nn.utils.parametrizations.weight_norm(layer.layernorm_after, dim=None),
    "a forward of its own": lambda layer: setattr(layer.drop_path, "forward", lambda branch: branch),
    "another attention": lambda layer: setattr(layer, "attention", _OtherAttention()),
    "a weight in fp64": lambda layer: setattr(layer, "lambda_1", nn.Parameter(layer.lambda_1.double())),
}


class _OtherAttention(nn.Module):
    """No attention at all."""

    def forward(self, hidden_states: Tensor, *others: Any) -> tuple[Tensor, None]:
        return hidden_states, None


@pytest.mark.parametrize("obstacle", OBSTACLES)
def test_modules_are_called_where_an_operator_cannot_take_their_place(obstacle: str) -> None:
    layer = build().beit.encoder.layer[1]
    hidden_states = torch.randn(2, TOKENS, 32, device=device())
    context = block_context(hidden_states)
    assert operators_in(lambda: layer(hidden_states, context)) == FUSED
    OBSTACLES[obstacle](layer)
    if obstacle == "a weight in fp64":
        layer.intermediate.double(), layer.output.double(), layer.layernorm_after.double()
    assert operators_in(lambda: layer(hidden_states, context)) == []


def test_the_norm_is_watched_by_its_hook() -> None:
    model, seen = build(), []
    model.beit.encoder.layer[0].layernorm_after.register_forward_hook(lambda *arguments: seen.append(arguments[2]))
    model.set_attn_implementation("triton")
    model(images())
    assert len(seen) == 1
    assert seen[0].shape == (3, TOKENS, 32)


def test_long_rows_keep_the_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(availability, "LARGEST_ROW_SIZE", 31)
    assert not runs_fused(build())


def test_attention_weights_are_for_the_modules() -> None:
    assert not runs_fused(build(), output_attentions=True)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_the_references_call_the_modules(implementation: str) -> None:
    model = build()
    model.set_attn_implementation(implementation)
    assert operators_in(lambda: model(images())) == []


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(use_reentrant: bool) -> None:
    """What is computed again drops the same paths."""
    model, pixels = build(), images()
    expected = train_step(model, pixels, "triton")
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    logits, gradients = train_step(model, pixels, "triton")
    assert torch.equal(logits, expected[0])
    assert all(torch.equal(gradient, expected[1][name]) for name, gradient in gradients.items())


@pytest.fixture
def nothing_compiled_before() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("nothing_compiled_before")
@pytest.mark.parametrize("training", [True, False])
def test_compiled_whole(training: bool) -> None:
    """One graph with the operators in it; every path kept or none, since a compiled program draws its own numbers."""
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return graph

    model, pixels = build(drop_path_rate=0.0).train(training), images()
    expected = train_step(model, pixels, "triton")
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend=backend)
    logits, gradients = train_step(compiled, pixels, "triton")
    (targets,) = graphs
    assert [name for name in targets if name in FUSED] == FUSED * LAYERS
    torch.testing.assert_close(logits, expected[0])
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[1][name.removeprefix("_orig_mod.")])


@pytest.mark.usefixtures("nothing_compiled_before")
def test_drop_path_is_compiled_whole() -> None:
    model, pixels = build(), images()
    model.set_attn_implementation("triton")
    torch.compile(model, fullgraph=True, backend="aot_eager")(
        pixels, labels=torch.zeros(3, dtype=torch.long, device=device())
    ).loss.backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "lambda" in name)


@pytest.mark.skipif(device().type == "cuda", reason="the CPU has it: it needs one process, and no NCCL")
def test_distributed_tensors_call_the_modules() -> None:
    """The operators have no rules for DTensor, which modules take."""
    from torch.distributed.tensor import Shard, distribute_module, distribute_tensor, init_device_mesh

    layer, hidden_states = build(drop_path_rate=0.0).beit.encoder.layer[1], torch.randn(3, TOKENS, 32)
    context = block_context(hidden_states)
    expected, _ = layer(hidden_states, context)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        distribute_module(layer, mesh)
        actual, _ = layer(distribute_tensor(hidden_states, mesh, [Shard(0)]), context)
        torch.testing.assert_close(actual.full_tensor(), expected)
    finally:
        torch.distributed.destroy_process_group()


def test_transforms_call_the_modules() -> None:
    """`torch.func` refuses operators with a registered autograd, so a gradient by it goes through the modules."""
    model, pixels = build(drop_path_rate=0.0), images()
    _, expected = train_step(model, pixels, "triton")
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(values: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, values, (pixels,), {"labels": torch.arange(3, device=device())}).loss

    for name, gradient in torch.func.grad(loss)(parameters).items():
        if name in expected:
            torch.testing.assert_close(gradient, expected[name])
