"""`torch.compile` of the models: one graph, few compilations, and the outputs of eager mode.

Graphs are counted under `aot_eager`, which traces and differentiates as every backend does. On a CPU, Inductor adds
guards to graphs with a backward (sums of more than 4096 elements use other code). Training may then compile once more.
"""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from beit_fast.models.outputs import ModelOutput

from ..support.models import MEAN, STD, build, byte_images, images
from ..support.transformers_reference import CLASSES, main_output, random_inputs, scalar_of

BACKENDS = ("eager", "sdpa", "triton")
RANDOM = {"drop_path_rate": 0.3, "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
MASKED, SEGMENTATION = "BeitForMaskedImageModeling", "BeitForSemanticSegmentation"

needs_compiler = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None, reason="Inductor needs a C++ compiler"
)


QUICK_CLASSES = [
    name if name in ("BeitForImageClassification", SEGMENTATION) else pytest.param(name, marks=pytest.mark.slow)
    for name in CLASSES
]


@pytest.fixture(autouse=True)
def _reset_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def _eager_random_numbers() -> Iterator[None]:
    """Make Inductor draw the random numbers of eager mode."""
    from torch._inductor import config

    with config.patch(fallback_random=True):
        yield


def small(name: str = "BeitForImageClassification", **options: object) -> Any:
    """A model of two blocks (segmentation: three) in evaluation mode."""
    sizes: dict[str, object] = {"num_hidden_layers": 2, "attn_implementation": "triton"}
    if name == SEGMENTATION:
        sizes |= {"num_hidden_layers": 3, "out_indices": [0, 1, 2, 3], "pool_scales": (2,)}
    elif name == "BeitBackbone":
        sizes |= {"out_features": ["stem", "stage2"]}
    return build(name, **(sizes | options))


def inputs_of(name: str, model: nn.Module, batch: int = 2, size: tuple[int, int] = (32, 32)) -> dict[str, Tensor]:
    """Return fp32 pixels, and the labels and masks that the class accepts."""
    inputs = random_inputs(name, model, size, batch)
    return inputs | {"pixel_values": inputs["pixel_values"].float()}


def compile_and_count(
    model: nn.Module, backend: str = "aot_eager"
) -> tuple[Callable[..., Any], CompileCounterWithBackend]:
    """Compile the model as one graph, and count its compilations."""
    counter = CompileCounterWithBackend(backend)
    return torch.compile(model, fullgraph=True, backend=counter), counter


def results_of(function: Callable[..., Any], model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the outputs of a call and, in training, the gradients by parameter name.

    Random numbers come from one seed.
    """
    torch.manual_seed(0)
    model.zero_grad(set_to_none=True)
    with torch.set_grad_enabled(model.training):
        outputs = function(**inputs)
        results = {f"output {index}": x.detach() for index, x in enumerate(main_output(outputs))}
        if model.training:
            scalar_of(outputs).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return results | gradients


def fp64_results(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Compute the results of eager mode in fp64."""
    model = copy.deepcopy(model).double()
    return results_of(model, model, {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()})


def assert_equals_eager(compiled: Callable[..., Any], model: nn.Module, inputs: dict[str, Tensor]) -> None:
    """Compare compiled and eager results by their errors against fp64.

    An output may have twice the error of eager mode, and a gradient three times, each plus four eps of its scale.
    The scale of a gradient is the norm of all gradients: those before a batch norm are zero except for rounding.
    """
    exact, plain = fp64_results(model, inputs), results_of(model, model, inputs)
    mine = results_of(compiled, model, inputs)
    assert mine.keys() == plain.keys() == exact.keys()
    gradients = [x for name, x in exact.items() if not name.startswith("output")]
    whole = torch.stack([x.norm() for x in gradients]).norm() if gradients else torch.zeros(())
    for name, value in mine.items():
        is_output = name.startswith("output")
        floor = 4 * torch.finfo(value.dtype).eps * (exact[name].norm() if is_output else whole)
        error, accepted = (value - exact[name]).norm(), (plain[name] - exact[name]).norm()
        assert error <= (2 if is_output else 3) * accepted + floor, (name, error.item(), accepted.item())


def mark_batch_dynamic(inputs: dict[str, Tensor]) -> None:
    for tensor in inputs.values():
        torch._dynamo.mark_dynamic(tensor, 0)


def mark_all_dynamic(inputs: dict[str, Tensor]) -> None:
    """Mark every dimension except the channels."""
    for name, tensor in inputs.items():
        dimensions = (0, 2, 3) if name == "pixel_values" else tuple(range(tensor.ndim))
        torch._dynamo.mark_dynamic(tensor, dimensions)


@pytest.mark.parametrize("name", CLASSES)
def test_compile_dynamic_batch_needs_two_graphs(name: str) -> None:
    model = small(name)
    compiled, counter = compile_and_count(model)
    counts = []
    for batch in (2, 5, 3, 1):
        pixels = {"pixel_values": inputs_of(name, model, batch)["pixel_values"]}
        mark_batch_dynamic(pixels)
        assert_equals_eager(compiled, model, pixels)
        counts.append(counter.frame_count)
    assert counts == [1, 1, 1, 2]


@pytest.mark.parametrize("name", QUICK_CLASSES)
def test_compile_training_dynamic_batch_is_one_graph(name: str) -> None:
    model = small(name, **RANDOM).train()
    compiled, counter = compile_and_count(model)
    for batch in (2, 5, 3):
        inputs = inputs_of(name, model, batch)
        mark_batch_dynamic(inputs)
        assert_equals_eager(compiled, model, inputs)
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    ("backend", "training"), [("triton", False), ("triton", True), ("sdpa", True), ("eager", False)]
)
def test_compile_unmarked_batch_needs_three_graphs(backend: str, training: bool) -> None:
    name = "BeitForImageClassification"
    model = small(name, attn_implementation=backend).train(training)
    compiled, counter = compile_and_count(model)
    counts = []
    for batch in (2, 2, 5, 3, 1, 7):
        inputs = inputs_of(name, model, batch)
        if not training:
            del inputs["labels"]
        assert_equals_eager(compiled, model, inputs)
        counts.append(counter.frame_count)
    assert counts == [1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize("name", QUICK_CLASSES)
def test_compile_gradient_checkpointing_is_one_graph(name: str) -> None:
    model = small(name, **RANDOM).train()
    model.gradient_checkpointing_enable()
    compiled, counter = compile_and_count(model)
    assert_equals_eager(compiled, model, inputs_of(name, model))
    assert counter.frame_count == 1
    targets = [str(node.target) for graph in counter.graphs for node in graph.graph.nodes]
    assert sum("checkpoint" in target for target in targets) == len(model.base_model.encoder.layer)


@pytest.mark.parametrize("position", ["both", "absolute"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_compile_dynamic_image_size_needs_two_graphs(backend: str, position: str) -> None:
    """The native size needs its own graph, because it skips interpolation.

    The sizes include rectangles and incomplete patches.
    """
    model = small(position=position, attn_implementation=backend, num_hidden_layers=1)
    compiled, counter = compile_and_count(model)
    counts = []
    for size in ((32, 48), (64, 40), (32, 32), (29, 70)):
        pixels = images(2, 3, *size)
        torch._dynamo.mark_dynamic(pixels, (2, 3))
        assert_equals_eager(compiled, model, {"pixel_values": pixels})
        counts.append(counter.frame_count)
    assert counts == [1, 1, 2, 2]


@pytest.mark.parametrize(
    ("name", "training"),
    [
        ("BeitForImageClassification", False),
        *(
            pytest.param(name, training, marks=pytest.mark.slow)
            for name in CLASSES
            for training in (False, True)
            if training or name != "BeitForImageClassification"
        ),
    ],
)
def test_compile_dynamic_batch_and_image_size_share_a_graph(name: str, training: bool) -> None:
    """The graph calls the fused operator once in each block.

    A single image needs another graph. In training, a size with incomplete patches needs one too: the gradient of the
    weight crops the pixels. Both hold for the trunk, so one class checks them.
    """
    blocks = {} if name == SEGMENTATION else {"num_hidden_layers": 1}
    blocks |= {"out_features": ["stem", "stage1"]} if name == "BeitBackbone" else {}
    model = small(name, **blocks, **(RANDOM if training else {})).train(training)
    compiled, counter = compile_and_count(model)
    counts = []
    cases = [(2, (32, 48)), (5, (64, 40)), (3, (61, 70)), (1, (48, 32))]
    for batch, size in cases if name == "BeitForImageClassification" else cases[: 2 if training else 3]:
        inputs = inputs_of(name, model, batch, size)
        if not training:
            inputs = {"pixel_values": inputs["pixel_values"]}
        mark_all_dynamic(inputs)
        assert_equals_eager(compiled, model, inputs)
        counts.append(counter.frame_count)
    assert counts == ([1, 1, 2, 3] if training else [1, 1, 1, 2])[: len(counts)]
    for graph in counter.graphs:
        targets = [node.target for node in graph.graph.nodes]
        assert targets.count(torch.ops.beit_fast.rel_pos_attention.default) == len(model.base_model.encoder.layer)


def test_compile_unmarked_image_size_needs_two_graphs() -> None:
    model = small()
    compiled, counter = compile_and_count(model)
    for size in ((32, 32), (40, 48), (64, 24), (32, 32)):
        assert_equals_eager(compiled, model, {"pixel_values": images(2, 3, *size)})
    assert counter.frame_count == 2


CALLS = {
    "bytes": {},
    "hidden states": {"output_hidden_states": True},
    "tuple": {"return_dict": False},
    "attentions": {"output_attentions": True},
    "masked tokens": {"attention_mask": torch.arange(2 * 17).view(2, 17) % 5 != 1},
    "all": {"output_hidden_states": True, "output_attentions": True, "return_dict": False},
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", QUICK_CLASSES)
def test_compile_call_options_equal_eager(name: str, call: str) -> None:
    """Compiled and eager outputs have the same type, fields and values."""
    model, options = small(name).double(), CALLS[call]
    model.set_pixel_normalization(MEAN, STD)
    pixels = byte_images() if call in ("bytes", "all") else images().double()
    compiled, counter = compile_and_count(model)
    with torch.no_grad():
        mine, plain = compiled(pixels, **options), model(pixels, **options)
    assert counter.frame_count == 1
    assert type(mine) is type(plain)
    if isinstance(plain, ModelOutput):
        assert list(mine) == list(plain)
        mine, plain = mine.to_tuple(), plain.to_tuple()
    torch.testing.assert_close(mine, plain)


def test_compile_changed_attention_recompiles() -> None:
    model, pixels = small(), images()
    compiled, counter = compile_and_count(model)
    with torch.no_grad():
        for backend in BACKENDS:
            model.set_attn_implementation(backend)
            torch.testing.assert_close(compiled(pixels).logits, model(pixels).logits)
    assert counter.frame_count == len(BACKENDS)
    called = [{str(node.target) for node in graph.graph.nodes} for graph in counter.graphs]
    assert [any("rel_pos_attention" in target for target in targets) for targets in called] == [False, False, True]


@needs_compiler
@pytest.mark.usefixtures("_eager_random_numbers")
@pytest.mark.parametrize(
    "name",
    ["BeitForImageClassification", pytest.param(MASKED, marks=pytest.mark.slow)],
)
def test_compile_inductor_training_equals_eager(name: str) -> None:
    model = small(name, **RANDOM).train()
    compiled, counter = compile_and_count(model, "inductor")
    for batch in (2, 3):
        inputs = inputs_of(name, model, batch)
        mark_batch_dynamic(inputs)
        assert_equals_eager(compiled, model, inputs)
    assert counter.frame_count == 1


@needs_compiler
@pytest.mark.slow
@pytest.mark.usefixtures("_eager_random_numbers")
@pytest.mark.parametrize("training", [False, True])
def test_compile_inductor_segmentation_equals_eager(training: bool) -> None:
    model = small(SEGMENTATION, **RANDOM).train(training)
    compiled, counter = compile_and_count(model, "inductor")
    inputs = inputs_of(SEGMENTATION, model)
    mark_batch_dynamic(inputs)
    assert_equals_eager(compiled, model, inputs)
    assert counter.frame_count == 1


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compile_max_autotune_equals_eager(dtype: torch.dtype) -> None:
    model = small().to(dtype)
    compiled = torch.compile(model, mode="max-autotune", fullgraph=True)
    assert_equals_eager(compiled, model, {"pixel_values": images().to(dtype)})


@needs_compiler
@pytest.mark.slow
@pytest.mark.usefixtures("_eager_random_numbers")
def test_compile_max_autotune_training_equals_eager() -> None:
    model = small(MASKED, **RANDOM).train()
    compiled = torch.compile(model, mode="max-autotune", fullgraph=True)
    assert_equals_eager(compiled, model, inputs_of(MASKED, model))
