"""Blocks on the Triton kernels: fused operators, or calls of the modules."""

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

from ..support.oracle import BACKWARD_FACTOR, FORWARD_FACTOR, assert_within_budget
from ..support.transformers_reference import POSITIONS, TINY, randomize
from .cases import device

FUSED = ["beit_fast.residual_norm.default", "beit_fast.residual_add.default"]
LAYERS = 2
SMALL = TINY | {"num_hidden_layers": LAYERS, "num_attention_heads": 2, "image_size": 16, "drop_path_rate": 0.5}
TOKENS = 5


def build(**options: Any) -> beit_fast.BeitForImageClassification:
    """Build a model of two blocks; the second drops half of its paths."""
    values = SMALL | POSITIONS["per layer"] | options
    model = beit_fast.BeitForImageClassification(beit_fast.BeitConfig(**values))
    randomize(model)
    return model.to(device()).train()


def images() -> Tensor:
    return torch.randn(3, 3, 16, 16).to(device())


@pytest.fixture
def same_dropped_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw the fp32 numbers of drop path on the CPU.

    Every dtype and device then drops the same paths.
    """
    draw = BeitDropPath._draw

    def draw_on_cpu(self: BeitDropPath, branch: Tensor, dtype: torch.dtype | None = None) -> Tensor | None:
        factors = draw(self, torch.empty(branch.shape[0]), dtype)
        return None if factors is None else factors.to(branch.device, dtype or branch.dtype)

    monkeypatch.setattr(BeitDropPath, "_draw", draw_on_cpu)


def train_step(
    model: nn.Module, pixels: Tensor, implementation: str, seed: int = 3
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return logits and gradients of a model with the attention `implementation`."""
    getattr(model, "_orig_mod", model).set_attn_implementation(implementation)
    model.zero_grad()
    torch.manual_seed(seed)
    output = model(pixels, labels=torch.arange(3, device=pixels.device))
    output.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return output.logits.detach(), gradients


def operators_in(function: Callable[[], Any]) -> list[str]:
    """Return the fused operators that `function` calls in forward passes."""
    seen = []

    class Spy(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Spy():
        function()
    return [name for name in seen if name in FUSED]


def block_context(hidden_states: Tensor) -> BlockContext:
    """Build the context of `build()` with `"triton"`, for 2 x 2 patches."""
    kernels = choose_kernels("triton", hidden_states.device, hidden_states.dtype, 16)
    return BlockContext((2, 2), None, None, None, kernels)


def is_fused(model: nn.Module, *arguments: Any, **options: Any) -> bool:
    """Return whether all blocks run fused; a mix fails the test."""
    model.set_attn_implementation("triton")
    seen = operators_in(lambda: model(images(), *arguments, **options))
    assert seen in ([], FUSED * LAYERS)
    return bool(seen)


@pytest.mark.usefixtures("same_dropped_paths")
@pytest.mark.parametrize("options", [{}, {"layer_scale_init_value": 0.0}, {"drop_path_rate": 0.0}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_block_training_step_matches_fp64(options: dict[str, float], dtype: torch.dtype) -> None:
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


@pytest.mark.usefixtures("same_dropped_paths")
def test_block_autocast_matches_fp64() -> None:
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


def test_drop_path_scale_same_seed_drops_same_paths() -> None:
    """The scale and the module draw the same numbers, without `same_dropped_paths`."""
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


def test_block_dropping_every_path_returns_residual() -> None:
    model = build()
    for layer in model.beit.encoder.layer:
        layer.drop_path = BeitDropPath(1.0).train()
    hidden_states = model(images(), output_hidden_states=True).hidden_states
    assert is_fused(model)
    assert all(torch.equal(state, hidden_states[0]) for state in hidden_states)


def test_block_evaluation_runs_fused_and_drops_nothing() -> None:
    model = build().eval()
    assert is_fused(model)
    pixels = images()
    with torch.no_grad():
        fused, eager = (model.set_attn_implementation(name) or model(pixels).logits for name in ("triton", "eager"))
        exact = model.double()(pixels.double()).logits
    assert_within_budget("logits", fused, exact, eager, FORWARD_FACTOR)


def _hook(module: nn.Module, *arguments: Any) -> None:
    """Return nothing, so that the module is not changed."""


class _OwnNorm(nn.LayerNorm):
    """A subclass, which may compute a different result."""


UNSUPPORTED_MODULES = {
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
    """Return the hidden states."""

    def forward(self, hidden_states: Tensor, *others: Any) -> tuple[Tensor, None]:
        return hidden_states, None


@pytest.mark.parametrize("change", UNSUPPORTED_MODULES)
def test_block_unsupported_module_calls_modules(change: str) -> None:
    layer = build().beit.encoder.layer[1]
    hidden_states = torch.randn(2, TOKENS, 32, device=device())
    context = block_context(hidden_states)
    assert operators_in(lambda: layer(hidden_states, context)) == FUSED
    UNSUPPORTED_MODULES[change](layer)
    if change == "a weight in fp64":
        layer.intermediate.double(), layer.output.double(), layer.layernorm_after.double()
    assert operators_in(lambda: layer(hidden_states, context)) == []


def test_block_norm_with_hook_calls_hook() -> None:
    model, seen = build(), []
    model.beit.encoder.layer[0].layernorm_after.register_forward_hook(lambda *arguments: seen.append(arguments[2]))
    model.set_attn_implementation("triton")
    model(images())
    assert len(seen) == 1
    assert seen[0].shape == (3, TOKENS, 32)


def test_block_long_rows_call_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(availability, "LARGEST_ROW_SIZE", 31)
    assert not is_fused(build())


def test_block_output_attentions_calls_modules() -> None:
    assert not is_fused(build(), output_attentions=True)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_block_reference_attention_calls_modules(implementation: str) -> None:
    model = build()
    model.set_attn_implementation(implementation)
    assert operators_in(lambda: model(images())) == []


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_block_gradient_checkpointing_drops_same_paths(use_reentrant: bool) -> None:
    """The recomputed forward pass drops the same paths."""
    model, pixels = build(), images()
    expected = train_step(model, pixels, "triton")
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    logits, gradients = train_step(model, pixels, "triton")
    assert torch.equal(logits, expected[0])
    assert all(torch.equal(gradient, expected[1][name]) for name, gradient in gradients.items())


@pytest.fixture
def reset_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("reset_compiler")
@pytest.mark.parametrize("training", [True, False])
def test_block_compile_fullgraph_matches_eager(training: bool) -> None:
    """Compile one graph that calls the operators.

    Drop path is off, since a compiled program draws its own numbers.
    """
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


@pytest.mark.usefixtures("reset_compiler")
def test_block_compile_fullgraph_with_drop_path() -> None:
    model, pixels = build(), images()
    model.set_attn_implementation("triton")
    torch.compile(model, fullgraph=True, backend="aot_eager")(
        pixels, labels=torch.zeros(3, dtype=torch.long, device=device())
    ).loss.backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "lambda" in name)


@pytest.mark.skipif(device().type == "cuda", reason="runs on the CPU, in one process without NCCL")
def test_block_dtensor_calls_modules() -> None:
    """Modules accept DTensor; the operators have no sharding rules for it."""
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


def test_block_func_grad_calls_modules() -> None:
    """`torch.func` does not support operators with registered autograd, so modules are called."""
    model, pixels = build(drop_path_rate=0.0), images()
    _, expected = train_step(model, pixels, "triton")
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(values: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, values, (pixels,), {"labels": torch.arange(3, device=device())}).loss

    for name, gradient in torch.func.grad(loss)(parameters).items():
        if name in expected:
            torch.testing.assert_close(gradient, expected[name])
