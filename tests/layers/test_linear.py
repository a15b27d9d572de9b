"""Linear layers on CPU with oneDNN and split-bf16 GEMMs."""

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from beit_fast.layers import linear
from beit_fast.ops.cpu_linear import choice, onednn, split_bf16

from ..support.devices import CPU_ATTENTION
from ..support.models import build, images
from ..support.oracle import assert_within_budget
from ..support.transformers_reference import CLASSES, main_output, random_inputs, scalar_of

SHAPES = [((1,), 768, 768), ((197,), 768, 96), ((4, 197), 64, 192), ((5,), 7, 3), ((2, 3), 1, 1), ((2, 2, 31), 33, 65)]


@pytest.fixture(params=["onednn", "split_bf16"])
def products(monkeypatch, request):
    """Operand shapes of the named GEMM, used on any CPU and for any rows."""
    reasons = {
        "onednn": onednn.unsupported_reason("cpu", torch.float32),
        "split_bf16": split_bf16.unsupported_reason(),
    }
    functions = {"onednn": choice.gemm_onednn, "split_bf16": choice.gemm_split_bf16}
    if reasons[request.param] is not None:
        pytest.skip(reasons[request.param])
    products = []

    def multiply(left, right, bias):
        products.append((tuple(left.shape), tuple(right.shape)))
        return functions[request.param](left, right, bias)

    preferred = choice.GemmChoice(request.param, "requested by a test", multiply)
    monkeypatch.setattr(choice, "_preferred", lambda requested: preferred)
    return products


def gemm_for(x, kernel):
    """Choose the GEMM of a forward pass whose queries are like `x`."""
    return linear.choose_linear_gemm(kernel, x.device, x.dtype)


def applied(module, x):
    """Call `module(x)` like a layer with `attn_implementation="triton"`."""
    return linear.apply_linear(module, x, gemm_for(x, CPU_ATTENTION))


def gradients_of(out, leaves, grad):
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("rows", "inner", "columns"), SHAPES)
def test_apply_linear_outputs_and_gradients_are_as_exact_as_eager(products, rows, inner, columns, bias):
    module = nn.Linear(inner, columns, bias=bias)
    x, grad = torch.randn(*rows, inner, requires_grad=True), torch.randn(*rows, columns)
    actual = gradients_of(applied(module, x), [x, *module.parameters()], grad)
    eager = gradients_of(module(x), [x, *module.parameters()], grad)
    exact_module, exact_x = copy.deepcopy(module).double(), x.detach().double().requires_grad_()
    exact = gradients_of(exact_module(exact_x), [exact_x, *exact_module.parameters()], grad.double())
    assert len(products) == 3
    for name, factor, *tensors in zip(("out", "x", "weight", "bias"), (2, 3, 3, 3), actual, exact, eager, strict=False):
        assert_within_budget(name, *tensors, factor)


@pytest.mark.parametrize("kind", ["transposed", "sliced", "expanded"])
def test_apply_linear_strided_tensors_are_within_budget(products, kind):
    module = nn.Linear(24, 40)
    x = {"transposed": torch.randn(24, 9).t(), "sliced": torch.randn(2, 5, 2, 24)[:, :, 1]}.get(kind)
    x = torch.randn(1, 24).expand(6, 24) if x is None else x
    x.requires_grad_()
    grads = [torch.ones(()).expand(*x.shape[:-1], 40), torch.randn(40, *x.shape[:-1]).movedim(0, -1)]
    for grad in grads:
        actual = gradients_of(applied(module, x), [x, module.weight, module.bias], grad)
        exact = gradients_of(
            F.linear(x.double(), module.weight.double(), module.bias.double()),
            [x, module.weight, module.bias],
            grad.double(),
        )
        eager = gradients_of(module(x), [x, module.weight, module.bias], grad)
        for tensors in zip(actual, exact, eager, strict=True):
            assert_within_budget(kind, *tensors, 3)
    assert len(products) == 6


@pytest.mark.parametrize("shape", [(0, 24), (2, 0, 24)])
def test_apply_linear_empty_rows_return_empty(products, shape):
    module, x = nn.Linear(24, 8), torch.randn(shape, requires_grad=True)
    out = applied(module, x)
    assert out.shape == (*shape[:-1], 8)
    out.sum().backward()
    assert x.grad.shape == shape
    assert not module.weight.grad.any()
    assert not module.bias.grad.any()


@pytest.mark.parametrize("frozen", [{"weight", "bias"}, {"x", "bias"}, {"x", "weight"}, {"x"}])
def test_apply_linear_frozen_tensors_skip_products(products, frozen):
    module, x = nn.Linear(24, 8), torch.randn(6, 24)
    tensors = {"x": x, "weight": module.weight, "bias": module.bias}
    for name, tensor in tensors.items():
        tensor.requires_grad_(name not in frozen)
    applied(module, x).sum().backward()
    assert {name for name, tensor in tensors.items() if tensor.grad is None} == frozen
    assert len(products) == 1 + ("x" not in frozen) + ("weight" not in frozen)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_apply_linear_without_gradients_returns_the_same_bits(products, mode):
    module, x = nn.Linear(24, 8), torch.randn(6, 24)
    expected = applied(module, x)
    if mode is torch.enable_grad:
        module.requires_grad_(False)
    with mode():
        out = applied(module, x)
    assert not out.requires_grad
    assert torch.equal(out, expected)
    assert len(products) == 2


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_apply_linear_follows_writes_through_data(products, mode):
    module, x = nn.Linear(24, 8), torch.randn(6, 24)
    with mode():
        before = applied(module, x)
        module.weight.data.mul_(2)
        module.bias.data.zero_()
        after = applied(module, x)
        assert_within_budget("out", after, F.linear(x.double(), module.weight.double()), F.linear(x, module.weight), 2)
    assert not torch.equal(before, after)
    assert len(products) == 2


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_evaluation_without_gradients_runs_the_products_of_training(products, mode):
    model = build("BeitForImageClassification").eval()
    model.set_attn_implementation("triton")
    pixels = images()
    expected = model(pixels).logits
    with_gradients = len(products)
    with mode():
        assert torch.equal(model(pixels).logits, expected)
    assert len(products) == 2 * with_gradients == 2 * 6 * model.config.num_hidden_layers


def test_apply_linear_retain_graph_returns_same_bits(products):
    module, x = nn.Linear(24, 8), torch.randn(6, 24, requires_grad=True)
    out = applied(module, x).square().sum()
    first = torch.autograd.grad(out, [x, module.weight, module.bias], retain_graph=True)
    second = torch.autograd.grad(out, [x, module.weight, module.bias])
    assert all(map(torch.equal, first, second))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(out, [x])


@pytest.mark.parametrize("changed", ["weight", "x"])
def test_apply_linear_inplace_change_before_backward_raises(products, changed):
    module, x = nn.Linear(24, 8), torch.randn(6, 24)
    out = applied(module, x)
    with torch.no_grad():
        (module.weight if changed == "weight" else x).mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
    assert len(products) == 1


def test_apply_linear_double_backward_matches_autograd(products):
    module, x = nn.Linear(6, 5), torch.randn(4, 6, requires_grad=True)

    def penalty(call):
        (gradient,) = torch.autograd.grad(call(x).pow(3).sum(), [x], create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), [x, module.weight, module.bias])

    for actual, expected in zip(penalty(lambda x: applied(module, x)), penalty(module), strict=True):
        torch.testing.assert_close(actual, expected)
    assert products[0] == ((4, 6), (5, 6))


@pytest.mark.parametrize("reentrant", [False, True])
def test_apply_linear_gradient_checkpointing_matches_module(products, reentrant):
    module, x = nn.Linear(24, 8), torch.randn(6, 24, requires_grad=True)
    checkpoint(lambda x: applied(module, x).square(), x, use_reentrant=reentrant).sum().backward()
    actual = [t.grad.clone() for t in (x, module.weight, module.bias)]
    expected = torch.autograd.grad(module(x).square().sum(), [x, module.weight, module.bias])
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other)
    assert len(products) >= 4 - reentrant


def test_apply_linear_tensor_hooks_are_called(products):
    module, x, seen = nn.Linear(24, 8), torch.randn(6, 24), []
    module.weight.register_post_accumulate_grad_hook(lambda p: seen.append("accumulated"))
    module.weight.register_hook(lambda grad: seen.append("gradient"))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append("packed") or t, lambda t: t):
        out = applied(module, x)
    out.sum().backward()
    assert sorted(seen) == ["accumulated", "gradient", "packed", "packed"]
    assert len(products) == 2


class Adapted(nn.Linear):
    """A subclass of `nn.Linear`, as adapters and quantization use."""

    def forward(self, x):
        return super().forward(x) + 1


class Holder(nn.Module):
    """A module that calls its linear layer like the layers of the model."""

    def __init__(self, dense):
        super().__init__()
        self.dense = dense

    def forward(self, x):
        return applied(self.dense, x)


def test_apply_linear_replaced_or_hooked_module_is_called(products):
    x = torch.randn(6, 24, requires_grad=True)
    calls = []

    def count(*args):
        calls.append(args[0])

    own = nn.Linear(24, 8)
    own.forward = lambda x: calls.append(own) or F.linear(x, own.weight)
    for module, register in (
        (nn.Linear(24, 8), "register_forward_hook"),
        (nn.Linear(24, 8), "register_forward_pre_hook"),
        (nn.Linear(24, 8), "register_full_backward_hook"),
        (nn.Linear(24, 8), "register_full_backward_pre_hook"),
    ):
        getattr(module, register)(count)
        applied(module, x).sum().backward()
        assert calls.pop() is module
    applied(own, x)
    assert calls.pop() is own
    handle = nn.modules.module.register_module_forward_hook(count)
    try:
        plain = nn.Linear(24, 8)
        applied(plain, x)
    finally:
        handle.remove()
    assert calls.pop() is plain
    adapted = Adapted(24, 8)
    assert torch.equal(applied(adapted, x), adapted(x))
    tied = parametrize.register_parametrization(nn.Linear(24, 8), "weight", nn.Identity())
    assert torch.equal(applied(tied, x), tied(x))
    assert products == []


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.jit")
def test_apply_linear_unlike_eager_fp32_calls_module(products):
    module, x = nn.Linear(24, 8), torch.randn(6, 24, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert applied(module, x).dtype == torch.bfloat16
    applied(copy.deepcopy(module).double(), x.double())
    applied(copy.deepcopy(module).bfloat16(), x.bfloat16())
    applied(copy.deepcopy(module).to("meta"), x.to("meta"))
    applied(module, nn.Parameter(x))
    for implementation in ("eager", "sdpa"):
        assert gemm_for(x, implementation) is None
    torch.func.vmap(lambda x: applied(module, x))(x)
    torch.func.grad(lambda x: applied(module, x).sum())(x.detach())
    torch.func.jvp(lambda x: applied(module, x), (x.detach(),), (x.detach(),))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x.detach(), torch.ones_like(x))
        out = torch.autograd.forward_ad.unpack_dual(applied(module, dual))
        assert torch.allclose(out.tangent, module.weight.sum(1).expand(6, 8))
    torch.jit.trace(Holder(module), x, check_trace=False)  # the check calls the module without tracing it
    with FlopCounterMode(display=False) as counter:
        applied(module, x)
    assert counter.get_total_flops() == 2 * 6 * 24 * 8
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        applied(module, torch.randn(6, 23))
    assert products == []


def test_apply_linear_compiled_calls_module(products):
    module, x = nn.Linear(24, 8), torch.randn(6, 24, requires_grad=True)
    compiled = torch.compile(lambda x: applied(module, x), backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), module(x))
    assert products == []


def test_apply_linear_few_rows_calls_module(products, monkeypatch):
    preferred = dataclasses.replace(choice.choose_gemm(), min_rows=5)
    monkeypatch.setattr(choice, "_preferred", lambda requested: preferred)
    module = nn.Linear(24, 8)
    applied(module, torch.randn(4, 24))
    assert products == []
    applied(module, torch.randn(5, 24))
    assert products == [((5, 24), (8, 24))]


def train(model, inputs):
    model.zero_grad()
    outputs = model(**inputs)
    scalar_of(outputs).backward()
    return [
        torch.cat([x.detach().flatten() for x in main_output(outputs)]),
        *(p.grad for p in model.parameters() if p.grad is not None),
    ]


@pytest.mark.parametrize("name", CLASSES)
def test_training_step_is_within_budget(products, name):
    model = build(name, "per layer", drop_path_rate=0.0).train()
    if name == "BeitForSemanticSegmentation":
        model.eval()  # maps of one pixel have no variance for batch norm
    inputs = random_inputs(name, model)
    exact_model = copy.deepcopy(model).double()
    exact_model.set_attn_implementation("eager")
    exact = train(exact_model, inputs)
    inputs["pixel_values"] = inputs["pixel_values"].float()
    model.set_attn_implementation("eager")
    eager = train(model, inputs)
    assert products == []
    model.set_attn_implementation("triton")
    actual = train(model, inputs)
    assert len(products) > 3 * 6 * (
        model.config.num_hidden_layers - 1
    )  # a head may leave the last layer without gradient
    names = ["outputs", *(key for key, p in model.named_parameters() if p.grad is not None)]
    for key, *tensors in zip(names, actual, exact, eager, strict=True):
        assert_within_budget(key, *tensors, 3)


def test_training_step_with_checkpointing_and_hook_runs_products(products):
    model = build("BeitForImageClassification").train()
    model.set_attn_implementation("triton")
    model.gradient_checkpointing_enable()
    calls = []
    model.beit.encoder.layer[0].intermediate.dense.register_forward_hook(lambda *args: calls.append(1))
    model(images(), labels=torch.tensor([0, 1])).loss.backward()
    layers = model.config.num_hidden_layers
    assert len(calls) == 2  # once in forward and once in recomputation
    assert len(products) == 4 * (6 * layers - 1)
    assert all(p.grad is not None for name, p in model.named_parameters() if "mask_token" not in name)


def test_training_step_failed_check_calls_modules(products, monkeypatch):
    model = build("BeitForImageClassification").train()
    model.set_attn_implementation("triton")
    inputs = {"pixel_values": images(), "labels": torch.tensor([0, 1])}
    monkeypatch.setattr(onednn, "_check", lambda dtype: "the check failed")
    monkeypatch.setattr(split_bf16, "unsupported_reason", lambda: "the check failed")
    expected = train(model, inputs)
    assert products == []
    assert choice.choose_gemm() == choice.GemmChoice("blas", "the check failed")
    monkeypatch.undo()
    assert all(map(torch.equal, train(model, inputs), expected))
