"""`torch.compile` of the models: one graph, few compilations, and the numbers of eager mode.

Graphs are counted under `aot_eager`, which traces and differentiates as every backend does. On a CPU Inductor adds
guards of its own to graphs with a backward (sums of more than 4096 elements take another code): training may compile
once more.
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
SEGMENTATION = "BeitForSemanticSegmentation"

needs_compiler = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None, reason="Inductor needs a C++ compiler"
)


QUICK_CLASSES = [
    name if name in ("BeitForImageClassification", SEGMENTATION) else pytest.param(name, marks=pytest.mark.slow)
    for name in CLASSES
]


@pytest.fixture(autouse=True)
def _nothing_compiled_before() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def _random_numbers_of_eager_mode() -> Iterator[None]:
    """Inductor draws numbers of its own unless it is asked for torch's."""
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
    """Pixels in fp32, with labels and masks where the class takes them."""
    inputs = random_inputs(name, model, size, batch)
    return inputs | {"pixel_values": inputs["pixel_values"].float()}


def counted(model: nn.Module, backend: str = "aot_eager") -> tuple[Callable[..., Any], CompileCounterWithBackend]:
    """The model compiled as one graph, and what counts its compilations."""
    counter = CompileCounterWithBackend(backend)
    return torch.compile(model, fullgraph=True, backend=counter), counter


def results_of(function: Callable[..., Any], model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Outputs of a call and, in training, gradients by the parameter's name; random numbers from one seed."""
    torch.manual_seed(0)
    model.zero_grad(set_to_none=True)
    with torch.set_grad_enabled(model.training):
        outputs = function(**inputs)
        results = {f"output {index}": x.detach() for index, x in enumerate(main_output(outputs))}
        if model.training:
            scalar_of(outputs).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return results | gradients


def in_double(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """What eager mode computes in fp64."""
    model = copy.deepcopy(model).double()
    return results_of(model, model, {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()})


def assert_as_in_eager_mode(compiled: Callable[..., Any], model: nn.Module, inputs: dict[str, Tensor]) -> None:
    """Held to fp64: twice eager mode's error for an output, three times for a gradient, and four eps of its scale.

    The scale of a gradient is that of all of them, since some vanish but for rounding: those before a batch norm.
    """
    exact, plain = in_double(model, inputs), results_of(model, model, inputs)
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
    """Everything but the channels."""
    for name, tensor in inputs.items():
        dimensions = (0, 2, 3) if name == "pixel_values" else tuple(range(tensor.ndim))
        torch._dynamo.mark_dynamic(tensor, dimensions)


@pytest.mark.parametrize("name", CLASSES)
def test_one_graph_serves_every_batch_and_one_a_single_image(name: str) -> None:
    model = small(name)
    compiled, counter = counted(model)
    counts = []
    for batch in (2, 5, 3, 1):
        pixels = {"pixel_values": inputs_of(name, model, batch)["pixel_values"]}
        mark_batch_dynamic(pixels)
        assert_as_in_eager_mode(compiled, model, pixels)
        counts.append(counter.frame_count)
    assert counts == [1, 1, 1, 2]


@pytest.mark.parametrize("name", QUICK_CLASSES)
def test_one_graph_trains_every_batch(name: str) -> None:
    model = small(name, **RANDOM).train()
    compiled, counter = counted(model)
    for batch in (2, 5, 3):
        inputs = inputs_of(name, model, batch)
        mark_batch_dynamic(inputs)
        assert_as_in_eager_mode(compiled, model, inputs)
    assert counter.frame_count == 1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("training", [False, True])
def test_without_marks_two_batches_are_two_graphs_and_a_single_image_is_a_third(backend: str, training: bool) -> None:
    name = "BeitForImageClassification"
    model = small(name, attn_implementation=backend).train(training)
    compiled, counter = counted(model)
    counts = []
    for batch in (2, 2, 5, 3, 1, 7):
        inputs = inputs_of(name, model, batch)
        if not training:
            del inputs["labels"]
        assert_as_in_eager_mode(compiled, model, inputs)
        counts.append(counter.frame_count)
    assert counts == [1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize("name", QUICK_CLASSES)
def test_checkpointed_blocks_compile_whole(name: str) -> None:
    model = small(name, **RANDOM).train()
    model.gradient_checkpointing_enable()
    compiled, counter = counted(model)
    assert_as_in_eager_mode(compiled, model, inputs_of(name, model))
    assert counter.frame_count == 1
    targets = [str(node.target) for graph in counter.graphs for node in graph.graph.nodes]
    assert sum("checkpoint" in target for target in targets) == len(model.base_model.encoder.layer)


@pytest.mark.parametrize("position", ["both", "absolute"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_one_graph_serves_every_image_size_and_one_the_native(backend: str, position: str) -> None:
    """Rectangles, and pixels beyond the last whole patch; at the native size nothing is resized."""
    model = small(position=position, attn_implementation=backend, num_hidden_layers=1)
    compiled, counter = counted(model)
    counts = []
    for size in ((32, 48), (64, 40), (32, 32), (29, 70)):
        pixels = images(2, 3, *size)
        torch._dynamo.mark_dynamic(pixels, (2, 3))
        assert_as_in_eager_mode(compiled, model, {"pixel_values": pixels})
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
def test_one_graph_serves_every_batch_and_image_size(name: str, training: bool) -> None:
    """At once, with the fused operator once a block. A single image is one more graph and, in training, a size that
    whole patches do not fill is one: the weight's gradient crops it.
    """
    blocks = {} if name == SEGMENTATION else {"num_hidden_layers": 1}
    blocks |= {"out_features": ["stem", "stage1"]} if name == "BeitBackbone" else {}
    model = small(name, **blocks, **(RANDOM if training else {})).train(training)
    compiled, counter = counted(model)
    counts = []
    for batch, size in ((2, (32, 48)), (5, (64, 40)), (3, (61, 70)), (1, (48, 32))):
        inputs = inputs_of(name, model, batch, size)
        if not training:
            inputs = {"pixel_values": inputs["pixel_values"]}
        mark_all_dynamic(inputs)
        assert_as_in_eager_mode(compiled, model, inputs)
        counts.append(counter.frame_count)
    assert counts == ([1, 1, 2, 3] if training else [1, 1, 1, 2])
    for graph in counter.graphs:
        targets = [node.target for node in graph.graph.nodes]
        assert targets.count(torch.ops.beit_fast.rel_pos_attention.default) == len(model.base_model.encoder.layer)


def test_without_marks_a_second_image_size_is_a_second_graph() -> None:
    model = small()
    compiled, counter = counted(model)
    for size in ((32, 32), (40, 48), (64, 24), (32, 32)):
        assert_as_in_eager_mode(compiled, model, {"pixel_values": images(2, 3, *size)})
    assert counter.frame_count == 2


CALLS = {
    "bytes": {},
    "hidden states": {"output_hidden_states": True},
    "a tuple": {"return_dict": False},
    "attentions": {"output_attentions": True},
    "masked tokens": {"attention_mask": torch.arange(2 * 17).view(2, 17) % 5 != 1},
    "all of it": {"output_hidden_states": True, "output_attentions": True, "return_dict": False},
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", QUICK_CLASSES)
def test_every_way_to_call_compiles(name: str, call: str) -> None:
    """The compiled call gives all that the plain one gives, in the same places."""
    model, options = small(name).double(), CALLS[call]
    model.set_pixel_normalization(MEAN, STD)
    pixels = byte_images() if call in ("bytes", "all of it") else images().double()
    compiled, counter = counted(model)
    with torch.no_grad():
        mine, plain = compiled(pixels, **options), model(pixels, **options)
    assert counter.frame_count == 1
    assert type(mine) is type(plain)
    if isinstance(plain, ModelOutput):
        assert list(mine) == list(plain)
        mine, plain = mine.to_tuple(), plain.to_tuple()
    torch.testing.assert_close(mine, plain)


def test_what_is_set_later_is_compiled_anew() -> None:
    model, pixels = small(), images()
    compiled, counter = counted(model)
    with torch.no_grad():
        for backend in BACKENDS:
            model.set_attn_implementation(backend)
            torch.testing.assert_close(compiled(pixels).logits, model(pixels).logits)
    assert counter.frame_count == len(BACKENDS)
    called = [{str(node.target) for node in graph.graph.nodes} for graph in counter.graphs]
    assert [any("rel_pos_attention" in target for target in targets) for targets in called] == [False, False, True]


@needs_compiler
@pytest.mark.usefixtures("_random_numbers_of_eager_mode")
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "name",
    [name if name == "BeitForImageClassification" else pytest.param(name, marks=pytest.mark.slow) for name in CLASSES],
)
def test_inductor_computes_what_eager_mode_does(name: str, training: bool) -> None:
    model = small(name, **RANDOM).train(training)
    compiled, counter = counted(model, "inductor")
    for batch in (2, 3) if name != SEGMENTATION else (2,):
        inputs = inputs_of(name, model, batch)
        mark_batch_dynamic(inputs)
        assert_as_in_eager_mode(compiled, model, inputs)
    assert counter.frame_count == 1


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_max_autotune(dtype: torch.dtype) -> None:
    model = small().to(dtype)
    compiled = torch.compile(model, mode="max-autotune", fullgraph=True)
    assert_as_in_eager_mode(compiled, model, {"pixel_values": images().to(dtype)})


@needs_compiler
@pytest.mark.slow
@pytest.mark.usefixtures("_random_numbers_of_eager_mode")
@pytest.mark.parametrize("name", [name for name in CLASSES if name != SEGMENTATION])
def test_max_autotune_trains(name: str) -> None:
    """The convolutions of a segmentation head, and their gradients, would compile for minutes."""
    model = small(name, **RANDOM).train()
    compiled = torch.compile(model, mode="max-autotune", fullgraph=True)
    assert_as_in_eager_mode(compiled, model, inputs_of(name, model))
