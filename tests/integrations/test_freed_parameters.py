"""Models whose hooks free parameters after a forward: FSDP2 per module, and ZeRO-3."""

import subprocess
import sys

import pytest
import torch
from torch import nn

import beit_fast
from beit_fast.layers.module_hooks import clone_if_hooked

from ..support import models
from ..support.checkout import ROOT
from ..support.freed_parameters_run import CASES, ROUTES, table_owners


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Results of the models with and without hooks, by case."""
    if not torch.distributed.is_gloo_available():
        pytest.skip("this torch is built without gloo")
    folder = tmp_path_factory.mktemp("freed")
    command = [sys.executable, "-m", "tests.support.freed_parameters_run", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return torch.load(folder / "results.pt")


@pytest.mark.parametrize("name", CASES)
def test_step_parameters_freed_by_hooks_equals_unsharded_model(results, name):
    result = results[name]
    assert "error" not in result, result["error"]
    assert any(key.endswith("relative_position_bias_table") for key in result["expected"])
    torch.testing.assert_close(result["found"], result["expected"], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("route", ROUTES)
def test_bias_module_without_hooks_returns_its_parameter(route):
    with ROUTES[route]("shared") as model:
        owners = table_owners(model)
        assert len(owners) == (4 if route == "mmseg" else 1)
        for bias in owners:
            table = bias() if route == "timm" else bias((4, 4))
            assert getattr(table, "table", table) is bias.relative_position_bias_table


@pytest.mark.parametrize("name", ["BeitForImageClassification", "BeitBackbone"])
def test_optimized_model_outlives_freed_parameters(name):
    """It copies all that it reads, so that freeing the original changes nothing."""
    model = models.build(name, "both")
    optimized = beit_fast.optimize_for_inference(model)
    pixels = torch.randn(1, 3, 48, 40)

    def run():
        with torch.no_grad():
            output = optimized(pixels)
        return output.feature_maps[-1] if name == "BeitBackbone" else output.logits

    expected = run()
    for parameter in model.parameters():
        parameter.data.fill_(torch.nan)
        parameter.data = parameter.new_empty(0)
    assert torch.equal(run(), expected)
    assert expected.isfinite().all()


def _global_hook(module):
    return nn.modules.module.register_module_forward_hook(lambda *unused: None)


HOOKS = {
    "forward hook": lambda module: module.register_forward_hook(lambda *unused: None),
    "forward pre-hook": lambda module: module.register_forward_pre_hook(lambda *unused: None),
    "global hook": _global_hook,
}


@pytest.mark.parametrize("hook", HOOKS)
def test_clone_if_hooked_with_hook_returns_differentiable_copy(hook):
    module = nn.Linear(2, 3)
    view = module.weight.t()
    assert clone_if_hooked(module, view) is view
    handle = HOOKS[hook](module)
    try:
        copied = clone_if_hooked(module, view)
    finally:
        handle.remove()
    assert copied.untyped_storage().data_ptr() != view.untyped_storage().data_ptr()
    assert copied.stride() == view.stride()
    (gradient,) = torch.autograd.grad(copied.square().sum(), module.weight)
    torch.testing.assert_close(gradient, 2 * module.weight.detach())


@pytest.mark.parametrize("kind", ["meta", "compiled", "vmap", "grad"])
def test_clone_if_hooked_transformed_tensor_returns_copy(kind):
    module = nn.Linear(2, 3)
    module.register_forward_hook(lambda *unused: None)
    weight = module.weight.detach()

    def doubled(x):
        return 2 * clone_if_hooked(module, x)

    if kind == "meta":
        assert doubled(weight.to("meta")).shape == weight.shape
        return
    transformed = {
        "compiled": torch.compile(doubled, fullgraph=True, backend="aot_eager"),
        "vmap": torch.func.vmap(doubled),
        "grad": torch.func.grad(lambda x: doubled(x).square().sum() / 4),
    }[kind]
    torch.testing.assert_close(transformed(weight), 2 * weight)
