"""`accelerate` on timm's BEiT: outputs, gradients, operator calls, reports and `restore`."""

import copy
import importlib
import re
import sys

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..support import timm_reference
from ..support.devices import DEFAULT_ATTENTION
from ..support.oracle import assert_within_budget, relative_error
from ..support.timm_reference import timm

# Import by name, after timm_reference, which imports timm even if torchvision is not installed.
integration = importlib.import_module("beit_fast.integrations.timm")
timm_accelerate = importlib.import_module("beit_fast.integrations.timm.accelerate")
accelerate, restore = integration.accelerate, integration.restore
timm_beit = timm.models.beit

PER_LAYER, SHARED = {"use_rel_pos_bias": True}, {"use_shared_rel_pos_bias": True}
NETWORKS = {
    "per layer": PER_LAYER,
    "shared": SHARED,
    "both": PER_LAYER | SHARED,
    "absolute": {"use_abs_pos_emb": True},
    "rectangular": PER_LAYER | SHARED | {"img_size": (24, 40)},
    "without qkv bias": PER_LAYER | {"qkv_bias": False},
    "head dimension 88": PER_LAYER | {"embed_dim": 176, "num_heads": 2, "depth": 1},
    "swiglu, no layer scale, cls pooling": PER_LAYER
    | {"swiglu_mlp": True, "scale_mlp": True, "init_values": None, "global_pool": "token"},
}


def pair(name="per layer", **options):
    """Build timm's model, and an accelerated copy that calls the operator."""
    reference = timm_reference.build(**(NETWORKS[name] | options))
    fast = copy.deepcopy(reference)
    accelerate(fast, attn_implementation="triton")
    return reference, fast


def pixels_for(model, batch=2):
    return torch.randn(batch, 3, *model.patch_embed.img_size, dtype=model.cls_token.dtype)


def gradients(model, pixels):
    """Return logits and gradients of pixels and parameters.

    The loss depends on every logit.
    """
    pixels = pixels.clone().requires_grad_()
    model.zero_grad(set_to_none=True)
    logits = model(pixels)
    (logits * torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).view_as(logits)).sum().backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {"logits": logits.detach(), "pixels": pixels.grad} | found


def assert_equal_results(fast, reference, pixels, tolerance=1e-5):
    mine, wanted = gradients(fast, pixels), gradients(reference, pixels)
    assert mine.keys() == wanted.keys()
    for name, value in wanted.items():
        assert relative_error(mine[name], value) < tolerance, name


class Spy(TorchDispatchMode):
    """Record calls of the operator and tensors of shape `[..., N, N]`."""

    def __init__(self, tokens):
        super().__init__()
        self.tokens, self.calls, self.square = tokens, [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function is torch.ops.beit_fast.rel_pos_attention.default:
            self.calls.append(args)
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.shape[-2:] == (self.tokens, self.tokens):
                self.square.append((function, tensor.shape))
        return out


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("name", NETWORKS)
def test_accelerate_outputs_and_gradients_equal_timm(name, mode):
    reference, fast = (model.train(mode == "train") for model in pair(name))
    assert_equal_results(fast, reference, pixels_for(reference))
    assert_equal_results(fast.double(), reference.double(), pixels_for(reference), tolerance=1e-11)


@pytest.mark.parametrize("attribute", ["fused_attn", "qkv_bias_separate"])
def test_accelerate_attention_settings_equal_timm(attribute):
    """Switch timm to explicit attention and to a separate projection bias."""
    reference, fast = pair("both")
    for module in [*reference.modules(), *fast.modules()]:
        if isinstance(module, timm_beit.Attention):
            setattr(module, attribute, not getattr(module, attribute))
    assert_equal_results(fast, reference, pixels_for(reference))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_accelerate_half_precision_error_within_budget(dtype):
    reference, fast = pair("both")
    pixels = pixels_for(reference)
    with torch.no_grad():
        exact = copy.deepcopy(reference).to(dtype).double()(pixels.to(dtype).double())
        plain, mine = reference.to(dtype)(pixels.to(dtype)), fast.to(dtype)(pixels.to(dtype))
    assert mine.dtype == dtype
    assert_within_budget("logits", mine, exact, plain, 2.0)


def test_accelerate_autocast_error_within_budget():
    reference, fast = pair("both")
    pixels = pixels_for(reference)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        plain, mine = reference(pixels), fast(pixels)
    assert_within_budget("logits", mine, reference(pixels).detach(), plain, 2.0, torch.bfloat16)


@pytest.mark.parametrize("name", ["per layer", "shared", "both", "absolute"])
def test_accelerate_calls_operator_without_dense_bias(name):
    reference, fast = pair(name)
    tokens, depth = 17, len(fast.blocks)
    with Spy(tokens) as spy:
        gradients(fast, pixels_for(fast))
    assert len(spy.calls) == depth
    assert not spy.square
    packed = spy.calls[0][0]
    assert packed.stride() == (tokens * 3 * 32, 3 * 32, 8, 1), "q is a view of the packed projection"
    with Spy(tokens) as spy:
        gradients(reference, pixels_for(reference))
    assert not spy.calls
    assert bool(spy.square) == (name != "absolute"), "the spy records timm's dense bias"


@pytest.mark.parametrize("name", ["per layer", "shared"])
def test_accelerate_lost_bias_is_detected(name, monkeypatch):
    reference, fast = pair(name)
    pixels = pixels_for(reference)
    monkeypatch.setattr(timm_accelerate.FusedAttention, "_table", lambda self, shared: (None, None))
    with torch.no_grad():
        assert relative_error(fast(pixels), reference(pixels)) > 1e-2
    with pytest.raises(AssertionError):
        assert_equal_results(fast, reference, pixels)


def test_attention_dropout_training_only():
    _, fast = pair(attn_drop_rate=0.25)
    pixels = pixels_for(fast)
    with torch.no_grad(), Spy(17) as spy:
        first, again = fast(pixels), fast(pixels)
    assert torch.equal(first, again)
    assert {call[7] for call in spy.calls if len(call) > 7} <= {0.0}
    fast.train()
    with torch.no_grad(), Spy(17) as spy:
        first, again = fast(pixels), fast(pixels)
        torch.manual_seed(0)
        seeded = fast(pixels)
        torch.manual_seed(0)
        assert torch.equal(fast(pixels), seeded)
    assert not torch.allclose(first, again)
    assert {call[7] for call in spy.calls} == {0.25}
    assert len({call[8] for call in spy.calls}) == 3 * 3, "each layer and each call draws a seed"


def test_accelerate_drop_path_and_dropout_equal_timm():
    """Draw the same random numbers for drop path and projection dropout."""
    reference, fast = (m.train() for m in pair(drop_path_rate=0.5, proj_drop_rate=0.2, pos_drop_rate=0.1))
    pixels = pixels_for(reference)
    results = []
    for model in (reference, fast):
        torch.manual_seed(7)
        results.append(model(pixels))
    assert relative_error(results[1], results[0]) < 1e-5


def test_accelerate_report_lists_replaced_and_already_fast():
    model = timm_reference.build(**NETWORKS["both"])
    report = accelerate(model)
    assert report.replaced == ["rel_pos_bias", *(f"blocks.{index}.attn" for index in range(3))]
    assert not report.left_alone
    text = str(report)
    assert "3 Attention (blocks.*.attn)" in text
    assert f"attention on cpu in torch.float32, head dimension 8: {DEFAULT_ATTENTION}" in text
    with torch.no_grad(), Spy(17) as spy:
        model(pixels_for(model))
    assert len(spy.calls) == (3 if DEFAULT_ATTENTION == "cpp" else 0)
    again = accelerate(model, attn_implementation="triton")
    assert not again.replaced
    assert len(again.already_fast) == 4
    assert {block.attn.attn_implementation for block in model.blocks} == {"triton"}


def test_restore_returns_original_model_bitwise():
    reference = timm_reference.build(**NETWORKS["both"])
    model = copy.deepcopy(reference)
    parameters = dict(model.named_parameters())
    accelerate(model)
    assert len(restore(model).restored) == 4
    assert not restore(model).restored
    for mine, theirs in zip(model.modules(), reference.modules(), strict=True):
        assert type(mine) is type(theirs)
        assert vars(mine).keys() == vars(theirs).keys()
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    pixels = pixels_for(model)
    wanted = gradients(reference, pixels)
    assert all(torch.equal(value, wanted[name]) for name, value in gradients(model, pixels).items())


def test_accelerate_keeps_parameters_names_and_hooks():
    model = timm_reference.build(**NETWORKS["both"])
    before, keys = {id(p) for p in model.parameters()}, list(model.state_dict())
    seen = []
    model.blocks[1].attn.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    accelerate(model)
    assert {id(p) for p in model.parameters()} == before
    assert list(model.state_dict()) == keys
    assert model.no_weight_decay() == timm_reference.build(**NETWORKS["both"]).no_weight_decay()
    model(pixels_for(model))
    assert seen == [(2, 17, 32)]


class OwnAttention(timm_beit.Attention):
    pass


class OwnBeit(timm_beit.Beit):
    pass


def _own_forward(model):
    attn = model.blocks[1].attn
    attn.forward = lambda x, shared_rel_pos_bias=None: x


def _own_bias_forward(model):
    model.rel_pos_bias.forward = lambda: torch.zeros(1, 4, 17, 17)


def _own_class(model):
    model.blocks[1].attn.__class__ = OwnAttention


UNSUPPORTED = {
    "has a forward of its own": _own_forward,
    "OwnAttention, which may compute something else": _own_class,
}


@pytest.mark.parametrize("reason", UNSUPPORTED)
def test_accelerate_unlike_attention_is_left_alone(reason):
    model = timm_reference.build(**PER_LAYER)
    UNSUPPORTED[reason](model)
    expected = model(pixels_for(model).fill_(0.5))
    kind = type(model.blocks[1].attn)
    report = accelerate(model)
    assert report.replaced == ["blocks.0.attn", "blocks.2.attn"]
    assert list(report.left_alone) == ["blocks.1.attn"]
    assert re.search(reason, report.left_alone["blocks.1.attn"])
    assert re.search(reason, str(report))
    assert type(model.blocks[1].attn) is kind
    assert relative_error(model(pixels_for(model).fill_(0.5)), expected) < 1e-5


SHARED_UNSUPPORTED = {
    "shares a bias with blocks.1.attn, which has a forward of its own": _own_forward,
    "rel_pos_bias, which has a forward of its own": _own_bias_forward,
    "OwnBeit, which may read the dense bias": lambda model: setattr(model, "__class__", OwnBeit),
}


@pytest.mark.parametrize("reason", SHARED_UNSUPPORTED)
def test_accelerate_shared_bias_is_replaced_together_or_left_alone(reason):
    model = timm_reference.build(**NETWORKS["both"])
    SHARED_UNSUPPORTED[reason](model)
    classes = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=f"cannot replace any BEiT layer of .*Beit:(.|\\n)*{reason}"):
        accelerate(model)
    assert [type(module) for module in model.modules()] == classes
    two = nn.ModuleList([model, timm_reference.build(**SHARED)])
    report = accelerate(two)
    assert list(report.left_alone) == ["0.rel_pos_bias", "0.blocks.0.attn", "0.blocks.1.attn", "0.blocks.2.attn"]
    assert report.replaced[0] == "1.rel_pos_bias"
    assert len(report.replaced) == 4


def test_accelerate_blocks_alone_run_timm_attention_with_dense_bias():
    reference = timm_reference.build(**SHARED)
    fast = copy.deepcopy(reference)
    accelerate(fast.blocks, "triton")
    with torch.no_grad(), Spy(17) as spy:
        fast(pixels_for(fast))
    assert not spy.calls
    assert_equal_results(fast, reference, pixels_for(fast))
    assert accelerate(fast, "triton").replaced == ["rel_pos_bias"]
    with torch.no_grad(), Spy(17) as spy:
        fast(pixels_for(fast))
    assert len(spy.calls) == 3


def test_accelerate_and_restore_unsupported_input_raises():
    vit = timm.models.vision_transformer.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=4
    )
    for function in (accelerate, restore):
        with pytest.raises(ValueError, match=r"(?s)no attention of timm's BEiT.*timm\.models\.beit\.Attention.*Block"):
            function(vit)
        with pytest.raises(TypeError, match=r"takes a torch\.nn\.Module, not a dict"):
            function({})
    with pytest.raises(ValueError, match=r"attn_implementation='sdpa' is not supported \(expected 'triton' or None\)"):
        accelerate(timm_reference.build(**PER_LAYER), attn_implementation="sdpa")


def test_accelerate_changed_timm_signature_raises(monkeypatch):
    model = timm_reference.build(**PER_LAYER)
    monkeypatch.setattr(timm_beit.Attention, "forward", lambda self, x, rope=None, attn_mask=None: x)
    with pytest.raises(ValueError, match=r"takes \(x, rope, attn_mask\); expected \(x, shared_rel_pos_bias\)"):
        accelerate(model)
    assert type(model.blocks[0].attn) is timm_beit.Attention


def test_restore_changed_forward_raises():
    _, fast = pair()
    fast.blocks[1].attn.forward = fast.blocks[1].attn.forward
    with pytest.raises(ValueError, match=r"blocks\.1\.attn has a forward of its own"):
        restore(fast)
    assert type(fast.blocks[0].attn) is timm_accelerate.FusedAttention


def test_restore_parametrized_attention_raises():
    _, fast = pair()
    nn.utils.parametrize.register_parametrization(fast.blocks[1].attn.proj, "weight", nn.Identity())
    nn.utils.parametrize.register_parametrization(fast.blocks[1].attn, "relative_position_bias_table", nn.Identity())
    with pytest.raises(ValueError, match=r"blocks\.1\.attn is a ParametrizedFusedAttention now"):
        restore(fast)
    assert type(fast.blocks[0].attn) is timm_accelerate.FusedAttention


def forget(monkeypatch, package):
    for name in [name for name in sys.modules if f"{name}.".startswith(f"{package}.")]:
        monkeypatch.delitem(sys.modules, name)


def test_import_without_torchvision_names_it(monkeypatch):
    """timm depends on torchvision, and `pip install --no-deps timm` leaves it out."""
    for package in ("beit_fast.integrations.timm", "timm", "torchvision"):
        forget(monkeypatch, package)
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(
        ImportError, match=r"needs torchvision, because the installed timm imports it: install"
    ) as error:
        importlib.import_module("beit_fast.integrations.timm")
    assert "1.0.31" not in str(error.value)


def test_import_without_timm_raises(monkeypatch):
    forget(monkeypatch, "beit_fast.integrations.timm")
    for name in ("timm", "timm.models", "timm.layers"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"needs timm .*pip install 'timm"):
        importlib.import_module("beit_fast.integrations.timm")
