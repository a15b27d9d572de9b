"""`optimize_for_inference`: outputs of folded weights, and errors of unsupported calls."""

import copy
import inspect
import pickle
import threading

import pytest
import torch
from torch import nn

import beit_fast
from beit_fast import optimize_for_inference
from beit_fast.inference.cuda_graphs import GraphCache
from beit_fast.inference.linear import InferenceLinear, PackedLinear, SplitBf16Linear
from beit_fast.ops.cpu_linear import onednn, split_bf16

from ..support.devices import DEFAULT_ATTENTION
from ..support.models import MEAN, STD, build, byte_images, images
from ..support.oracle import relative_error
from ..support.transformers_reference import CLASSES, POSITIONS, randomize

FP32_LIMIT = 1e-5


def tensors_of(output):
    """Return every tensor of a model's output, in order."""
    flat = torch.utils._pytree.tree_leaves(output)
    return [tensor for tensor in flat if isinstance(tensor, torch.Tensor)]


def assert_same_outputs(optimized, model, *args, **kwargs):
    """Compare every output tensor with the fp64 eager model."""
    exact = copy.deepcopy(model).double()
    exact.set_attn_implementation("eager")
    wide = [x.double() if torch.is_tensor(x) and x.is_floating_point() else x for x in args]
    with torch.no_grad():
        expected = tensors_of(exact(*wide, **kwargs))
    actual = tensors_of(optimized(*args, **kwargs))
    assert len(actual) == len(expected) > 0
    for number, (ours, theirs) in enumerate(zip(actual, expected, strict=True)):
        assert ours.shape == theirs.shape
        assert ours.dtype == torch.float32
        assert relative_error(ours, theirs) <= FP32_LIMIT, f"tensor {number}"


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("name", CLASSES)
def test_optimize_every_class_equals_model(name, position):
    model = build(name, position)
    optimized = optimize_for_inference(model)
    assert_same_outputs(optimized, model, images(), output_hidden_states=True, output_attentions=True)
    assert_same_outputs(optimized, model, images(3, 3, 40, 24))
    assert isinstance(optimized, type(model))
    assert inspect.signature(optimized.forward) == inspect.signature(model.forward)


@pytest.mark.parametrize(
    "options",
    [
        {"layer_scale_init_value": 0.0},
        {"hidden_act": "relu"},
        {"hidden_act": "gelu_new"},
        {"use_mean_pooling": False},
        {"layer_norm_eps": 1e-5},
        {"image_size": (32, 48)},
        {"hidden_dropout_prob": 0.5, "attention_probs_dropout_prob": 0.5, "drop_path_rate": 0.5},
    ],
)
def test_optimize_every_configuration_equals_model(options):
    model = build(**options).train()
    optimized = optimize_for_inference(model)
    assert model.training, "the original model keeps its mode"
    assert_same_outputs(optimized, model.eval(), images())


@pytest.mark.parametrize("implementation", [None, "eager", "sdpa", "triton"])
def test_optimize_every_attn_implementation_equals_model(implementation):
    model = build(attn_implementation=implementation)
    optimized = optimize_for_inference(model)
    assert_same_outputs(optimized, model, images())
    assert optimized.attention_report().layers == (optimized.attention_report().would_run,) * 3
    optimized.set_attn_implementation("eager")
    assert_same_outputs(optimized, model, images())
    assert optimized.attention_report().kernel == "eager"


def test_optimize_masks_and_byte_images_equals_model():
    model = build("BeitForMaskedImageModeling")
    model.set_pixel_normalization(MEAN, STD)
    optimized = optimize_for_inference(model)
    masked = torch.rand(2, 16) < 0.5
    attended = torch.rand(2, 17) < 0.7
    attended[1] = False
    assert_same_outputs(optimized, model, images(), bool_masked_pos=masked, attention_mask=attended)
    assert_same_outputs(optimized, model, byte_images())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CLASSES)
def test_optimize_half_precision_error_within_budget(name, dtype):
    """Allow 1.1 times the error of eager attention in the same dtype.

    The weights are folded in fp32 and rounded once. The rounded weights of a model are the same for all its images. The
    ratio of one model's errors is 0.6 to 1.4 by chance. So the test averages over 16 models.
    """
    errors, allowed = [], []
    for seed in range(16):
        model = build(name)
        randomize(model, seed)
        eager = copy.deepcopy(model).to(dtype)
        eager.set_attn_implementation("eager")
        pixels = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(seed)).to(dtype)
        with torch.no_grad():
            expected, budget = tensors_of(copy.deepcopy(model).double()(pixels.double())), tensors_of(eager(pixels))
        optimized = optimize_for_inference(model, dtype)
        for ours, theirs, reference in zip(tensors_of(optimized(pixels)), budget, expected, strict=True):
            assert ours.dtype == dtype
            errors.append(relative_error(ours, reference) ** 2)
            allowed.append(relative_error(theirs, reference) ** 2)
    assert (sum(errors) / sum(allowed)) ** 0.5 <= 1.1


def test_optimize_half_precision_weights_folds_in_fp32():
    model = build().bfloat16()
    optimized = optimize_for_inference(model)
    assert optimized.dtype == torch.bfloat16
    wide, pixels = optimize_for_inference(model, torch.float32), images()
    expected = copy.deepcopy(model).double()(pixels.double()).logits
    assert relative_error(wide(pixels).logits, expected) <= FP32_LIMIT


def test_optimize_float64_equals_model():
    model = build().double()
    pixels = images().double()
    optimized = optimize_for_inference(model)
    assert relative_error(optimized(pixels).logits, model(pixels).logits) < 1e-12


LIBRARIES = {"torch": InferenceLinear, "onednn": PackedLinear, "cpp": SplitBf16Linear}


@pytest.mark.parametrize("library", LIBRARIES)
def test_optimize_every_linear_library_equals_model(monkeypatch, library):
    """Select one library by disabling the others; check outputs and report."""
    checks = {"onednn": (onednn, "unsupported_reason"), "cpp": (split_bf16, "unsupported_reason")}
    for name, (module, function) in checks.items():
        if name == library:
            reason = getattr(module, function)(*(("cpu", torch.float32) if name == "onednn" else ()))
            if reason is not None:
                pytest.skip(reason)
        else:
            monkeypatch.setattr(module, function, lambda *arguments: "disabled by the test")
    for options in ({}, {"hidden_act": "relu"}):
        model = build(**options)
        optimized = optimize_for_inference(model, example=images())
        assert {type(linear) for linear in optimized._folded_encoder.linears()} == {LIBRARIES[library]}
        assert_same_outputs(optimized, model, images())
    report = optimized.inference_report()
    assert report.linears == library
    assert report.windows == 1, "the example fills the bias cache"
    largest = 2.5 if library == "cpp" else 1.1  # three bf16 terms, and rows padded to 32
    assert 0.9 * report.original_bytes < report.optimized_bytes <= largest * report.original_bytes
    assert f"{library} linear layers" in str(report)


@pytest.mark.skipif(split_bf16.unsupported_reason() is not None, reason=f"{split_bf16.unsupported_reason()}")
def test_optimize_high_matmul_precision_uses_two_bf16_terms():
    model, pixels = build(), images()
    exact = copy.deepcopy(model).double()(pixels.double()).logits
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        optimized = optimize_for_inference(model)
    finally:
        torch.set_float32_matmul_precision(before)
    assert {linear.terms for linear in optimized._folded_encoder.linears()} == {2}
    smaller = optimized.inference_report().optimized_bytes
    assert smaller < optimize_for_inference(model).inference_report().optimized_bytes
    assert relative_error(optimized(pixels).logits, exact) <= FP32_LIMIT


def test_optimize_keeps_original_weights(tmp_path):
    model = build()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimized = optimize_for_inference(model, torch.bfloat16)
    state = optimized.state_dict()
    assert state.keys() == before.keys()
    assert all(torch.equal(state[name], before[name]) for name in before)
    assert all(parameter.requires_grad for parameter in model.parameters())
    optimized.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in loaded.state_dict().items())
    assert optimized.num_parameters() == model.num_parameters()


def test_optimize_later_weight_changes_have_no_effect():
    model = build()
    optimized = optimize_for_inference(model)
    pixels = images()
    expected = optimized(pixels).logits
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(optimized(pixels).logits, expected)


def test_optimize_keep_original_false_frees_weights(tmp_path):
    model, pixels = build(), images()
    expected = model(pixels).logits
    optimized = optimize_for_inference(model, keep_original=False)
    assert relative_error(optimized(pixels).logits, expected) <= FP32_LIMIT
    assert all(parameter.is_meta for parameter in model.parameters())
    assert optimized.inference_report().original_bytes == 0
    with pytest.raises(RuntimeError, match="state_dict needs the original weights, which keep_original=False freed"):
        optimized.state_dict()
    with pytest.raises(RuntimeError, match="save_pretrained needs the original weights"):
        optimized.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="needs the original weights"):
        pickle.dumps(optimized)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model: model.train(), "cannot be trained: train the model that it was made from"),
        (lambda model: nn.Sequential(model).train(), "cannot be trained"),
        (lambda model: model.load_state_dict({}), "cannot load weights: load them into the model"),
        (lambda model: nn.ModuleDict({"beit": model}).load_state_dict({}, strict=False), "cannot load weights"),
        (lambda model: model.half(), "cannot be moved from torch.float32 on cpu to torch.float16 on cpu"),
        (lambda model: model.to("meta"), "cannot be moved from torch.float32 on cpu to torch.float32 on meta"),
        (lambda model: nn.Sequential(model).double(), "cannot be moved"),
        (lambda model: model.to_empty(device="cpu"), "cannot be emptied"),
        (lambda model: model.share_memory(), "cannot be shared"),
        (lambda model: model.gradient_checkpointing_enable(), "cannot be trained"),
        (lambda model: model.init_weights(), "cannot be initialized"),
    ],
)
def test_optimized_model_unsupported_call_raises(call, message):
    optimized = optimize_for_inference(build())
    pixels = images()
    expected = optimized(pixels).logits
    with pytest.raises(RuntimeError, match=message) as raised:
        call(optimized)
    assert "call beit_fast.optimize_for_inference again" in str(raised.value)
    assert torch.equal(optimized(pixels).logits, expected), "an error leaves the model unchanged"


def test_optimized_model_same_device_and_dtype_returns_self():
    optimized = optimize_for_inference(build())
    assert optimized.to("cpu") is optimized
    assert optimized.float() is optimized
    assert optimized.eval() is optimized
    assert nn.Sequential(optimized).eval().to(torch.float32)[0] is optimized


def test_state_dict_nested_optimized_model_keeps_names():
    """Save a backbone's weights in its parent's state dict, under the original names."""
    backbone = build("BeitBackbone")
    whole = nn.ModuleDict({"backbone": optimize_for_inference(backbone), "head": nn.Linear(2, 2)})
    expected = {f"backbone.{name}" for name in backbone.state_dict()} | {"head.weight", "head.bias"}
    assert set(whole.state_dict()) == expected


def test_optimized_model_disables_gradients():
    optimized = optimize_for_inference(build())
    pixels = images().requires_grad_()
    assert not optimized(pixels).logits.requires_grad
    assert not any(parameter.requires_grad for parameter in optimized.parameters())


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_optimized_model_copy_equals_original(duplicate):
    model, pixels = build(), images()
    optimized = optimize_for_inference(model, torch.bfloat16)
    again = duplicate(optimized)
    assert type(again) is type(optimized)
    assert torch.equal(again(pixels).logits, optimized(pixels).logits)


def test_optimized_model_autocast_has_no_effect():
    optimized, pixels = optimize_for_inference(build()), images()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = optimized(pixels).logits
    assert torch.equal(actual, optimized(pixels).logits)


def test_optimized_model_bias_cache_is_limited():
    model = build()
    optimized = optimize_for_inference(model)
    for columns in range(1, 13):
        optimized(images(1, 3, 32, 8 * columns))
    assert optimized.inference_report().windows == 8
    assert str(optimized.inference_report()).endswith("cached biases of 8 windows")
    assert_same_outputs(optimized, model, images(1, 3, 32, 8))


def test_optimized_model_threads_return_equal_outputs():
    model = build()
    optimized = optimize_for_inference(model)
    sizes = [(2, 3, 32, 8 * columns) for columns in range(1, 11)]
    pixels = [images(*size) for size in sizes]
    expected = [optimize_for_inference(model)(x).logits for x in pixels]
    wrong = []

    def run():
        for x, logits in zip(pixels, expected, strict=True):
            if not torch.equal(optimized(x).logits, logits):
                wrong.append(x.shape)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


class Adapter(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base = base

    def forward(self, x):
        return self.base(x)


def test_optimize_unsupported_layers_lists_every_reason():
    model = build()
    layers = model.beit.encoder.layer
    layers[0].attention.attention.query = Adapter(layers[0].attention.attention.query)
    layers[1].output.dense.register_forward_hook(lambda *arguments: None)
    layers[2].layernorm_before = nn.RMSNorm(32)
    pixels = images()
    before = model(pixels).logits
    with pytest.raises(ValueError, match="cannot be optimized") as raised:
        optimize_for_inference(model, keep_original=False)
    for reason in (
        "beit.encoder.layer.0.attention.attention.query is a tests.inference.test_inference.Adapter, not a torch.nn.",
        "encoder.layer.1.output.dense has hooks",
        "layer.2.layernorm_before is a torch.nn.modules.normalization.RMSNorm, not a torch.nn.modules.normalization.La",
        "Merge adapters",
    ):
        assert reason in str(raised.value)
    assert torch.equal(model(pixels).logits, before)


def test_optimize_bad_arguments_raises():
    model = build()
    with pytest.raises(TypeError, match="Linear is not supported"):
        optimize_for_inference(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"dtype=torch\.int8 is not supported \(expected a floating-point"):
        optimize_for_inference(model, torch.int8)
    with pytest.raises(ValueError, match=r"example must be pixels .*, not \[3, 32, 32\]"):
        optimize_for_inference(model, example=images(3, 32, 32))
    with pytest.raises(ValueError, match="already optimized"):
        optimize_for_inference(optimize_for_inference(model))
    with pytest.raises(ValueError, match="meta device"):
        optimize_for_inference(copy.deepcopy(model).to("meta"))
    with pytest.raises(ValueError, match="pixel_values must be"):
        optimize_for_inference(model, example=images(1, 1, 32, 32), keep_original=False)
    assert not any(parameter.is_meta for parameter in model.parameters())


def test_optimized_model_graphs_capture_pixel_calls(graphs):
    """Capture calls with pixels only; calls with labels run without a graph.

    A graph keeps the biases that were dropped from the cache.
    """
    model = build()
    optimized = optimize_for_inference(model)
    assert optimized.graph_report() is None, "a CPU model has no graphs"
    biases = optimized._folded_encoder.biases
    optimized._graphs = GraphCache(optimized._function, held=biases.held)
    for _ in range(3):
        assert_same_outputs(optimized, model, images())
    assert_same_outputs(optimized, model, images(), output_hidden_states=True)
    report = optimized.graph_report()
    assert (report.captured, report.replayed, report.plain) == (2, 4, {})
    assert optimized(images(), labels=torch.tensor([0, 1])).loss is not None
    assert optimized.graph_report() == report
    held = [graph.held for graph in optimized._graphs._graphs.values()]
    assert held[0][0] is biases((4, 4), DEFAULT_ATTENTION), "a graph keeps the biases of its window"
    optimized.set_attn_implementation("eager")
    assert optimized.graph_report().graphs == ()
    assert_same_outputs(optimized, model, images())


def test_optimize_for_inference_is_public():
    assert "optimize_for_inference" in beit_fast.__all__
