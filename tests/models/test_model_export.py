"""Models under `torch.export`, AOTInductor, ONNX and `torch.jit.trace`, run at several sizes."""

from __future__ import annotations

import copy
import io
import os
import shutil
import subprocess
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

import beit_fast
from beit_fast.models.segmentation import BeitAdaptivePool

from ..support.models import build, images
from ..support.oracle import relative_error
from ..support.transformers_reference import CLASSES

ATTENTION = torch.ops.beit_fast.rel_pos_attention.default
PATCH_EMBED = torch.ops.beit_fast.patch_embed.default
ANY_SIZE = {0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC}
OTHER_SIZES = [(3, 3, 64, 40), (5, 3, 32, 32), (2, 3, 61, 70), (1, 3, 48, 80)]

QUICK_CLASSES = [
    name if name == "BeitForImageClassification" else pytest.param(name, marks=pytest.mark.slow) for name in CLASSES
]
ONNX_OPSET = 20
ONNX_LIMIT = 1e-5

needs_compiler = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None, reason="AOTInductor needs a C++ compiler"
)


def export(model: nn.Module, *pixels: Tensor, **inputs: Any) -> ExportedProgram:
    """Export a model for any batch, height and width."""
    return torch.export.export(model, pixels or (images(2, 3, 32, 48),), dynamic_shapes=(ANY_SIZE,), **inputs)


def operator_counts(program: ExportedProgram) -> Counter[object]:
    """Count the calls of each operator in a program."""
    return Counter(node.target for node in program.graph.nodes if node.op == "call_function")


def tensors_of(output: object) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


def assert_same(actual: object, expected: object) -> None:
    assert pytree.tree_structure(actual) == pytree.tree_structure(expected)
    for mine, plain in zip(tensors_of(actual), tensors_of(expected), strict=True):
        torch.testing.assert_close(mine, plain)


def run_python(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run `code` in a new process outside the checkout."""
    path = os.pathsep.join(filter(None, [str(Path(beit_fast.__file__).parents[1]), os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": path},
        cwd="/",
        capture_output=True,
        text=True,
    )


def small(name: str = "BeitForImageClassification", position: str = "per layer", **options: Any) -> Any:
    """A model of one block (segmentation: three) with the fused operator."""
    sizes: dict[str, Any] = {"num_hidden_layers": 1, "attn_implementation": "triton"}
    if name == "BeitForSemanticSegmentation":
        sizes |= {"num_hidden_layers": 3, "out_indices": [0, 1, 2, 3], "pool_scales": (1, 2, 3)}
    elif name == "BeitBackbone":
        sizes |= {"out_features": ["stage1"]}
    return build(name, position, **(sizes | options))


def without_bias(model: nn.Module) -> nn.Module:
    """Copy the model with its bias tables set to zero."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for key, tensor in model.named_parameters():
            if key.endswith("bias_table"):
                tensor.zero_()
    return model


def assert_bias_matters(actual: object, model: nn.Module, pixels: Tensor) -> None:
    """Check that without the bias the outputs differ by more than 100 times `ONNX_LIMIT`."""
    with torch.no_grad():
        for mine, other in zip(tensors_of(actual), tensors_of(without_bias(model)(pixels)), strict=True):
            assert (mine - other).norm() > 100 * ONNX_LIMIT * mine.norm()


@pytest.mark.parametrize("name", QUICK_CLASSES)
def test_export_dynamic_shapes_equals_model(name: str) -> None:
    """The program calls one patch operator and one attention operator a block, and has no dense bias."""
    model = small(name)
    program = export(model)
    counts = operator_counts(program)
    assert counts[PATCH_EMBED] == 1
    assert counts[ATTENTION] == len(model.base_model.encoder.layer)
    assert not any("softmax" in str(target) or "scaled_dot" in str(target) for target in counts)
    run = program.module()
    for size in OTHER_SIZES:
        pixels = images(*size)
        actual = run(pixels)
        assert_same(actual, model(pixels))
        assert_bias_matters(actual, model, pixels)


@pytest.mark.parametrize("cells", [2, 3, 6])
def test_export_adaptive_pool_equals_torch(cells: int) -> None:
    """Pooling is exported as matrix products.

    ONNX decomposes torch's pooling by the divisibility of the example's sizes.
    """
    dynamic = ({2: Dim.DYNAMIC, 3: Dim.DYNAMIC},)
    program = torch.export.export(BeitAdaptivePool(cells), (images(2, 3, 6, 12),), dynamic_shapes=dynamic)
    assert not any("pool" in str(target) for target in operator_counts(program))
    run = program.module()
    for height, width in ((6, 12), (7, 5), (13, 4), (20, 21)):
        maps = images(2, 3, height, width)
        torch.testing.assert_close(run(maps), torch.nn.functional.adaptive_avg_pool2d(maps, cells))


def test_export_named_dimensions_equals_model() -> None:
    """The size of the mask is derived from the image size."""
    model = small("BeitForMaskedImageModeling")
    batch, rows, columns = Dim("batch", min=1, max=64), Dim("rows", min=2, max=80), Dim("columns", min=2, max=80)
    shapes = {
        "pixel_values": {0: batch, 2: 8 * rows, 3: 8 * columns},
        "bool_masked_pos": {0: batch, 1: rows, 2: columns},
    }
    example = (images(2, 3, 32, 48), torch.rand(2, 4, 6) > 0.5)
    run = torch.export.export(model, example, dynamic_shapes=shapes).module()
    for count, height, width in ((3, 5, 4), (1, 2, 9), (7, 4, 4)):
        pixels, masked = images(count, 3, 8 * height, 8 * width), torch.rand(count, height, width) > 0.5
        assert_same(run(pixels, masked), model(pixels, masked))


# Compare a program and an AOTInductor package with the outputs of their model; `needed` has to be imported first.
RUN_SAVED = """
import importlib, sys, torch
torch.set_num_threads(1)
program, package, examples, needed = sys.argv[1:]
examples = torch.load(examples)
if needed != "torch":
    try:
        torch._inductor.aoti_load_package(package)(examples[0][0])
    except Exception as error:
        print("without the import:", error)
importlib.import_module(needed)
for run in (torch.export.load(program).module(), torch._inductor.aoti_load_package(package)):
    for pixels, expected in examples:
        for mine, plain in zip(run(pixels), expected, strict=True):
            torch.testing.assert_close(mine, plain)
assert needed == "beit_fast" or "beit_fast" not in sys.modules
"""


class Outputs(nn.Module):
    """Return the outputs as a tuple, so that a saved program needs no class of the package."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensors_of(self.model(pixels)))


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(("implementation", "needed"), [("triton", "beit_fast"), ("sdpa", "torch")])
def test_saved_programs_load_in_fresh_process(implementation: str, needed: str, tmp_path: Path) -> None:
    """An exported program and an AOTInductor package need `import beit_fast` if they call its operators."""
    model = Outputs(small(attn_implementation=implementation))
    program = export(model)
    torch.export.save(program, tmp_path / "program.pt2")
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "package.pt2"))
    pixels = [images(*size) for size in OTHER_SIZES]
    with torch.no_grad():
        torch.save([(x, model(x)) for x in pixels], tmp_path / "examples.pt")
    run = run_python(RUN_SAVED, tmp_path / "program.pt2", package, tmp_path / "examples.pt", needed)
    assert run.returncode == 0, run.stderr
    found = "without the import:" in run.stdout and "Could not find schema for beit_fast::" in run.stdout + run.stderr
    assert found is (needed == "beit_fast")


def to_onnx(model: nn.Module, pixels: Tensor, dynamic: dict[int, Any] | None = None) -> Any:
    """Export the model and open it in ONNX Runtime on one thread."""
    import onnxruntime

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # from torch's own pytrees
        exported = torch.onnx.export(
            model, (pixels,), dynamic_shapes=(dynamic or ANY_SIZE,), dynamo=True, verbose=False
        )
    assert exported.model.opset_imports == {"": ONNX_OPSET}
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(
        exported.model_proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def assert_onnx_agrees(session: Any, model: nn.Module, *sizes: tuple[int, ...]) -> None:
    for size in sizes:
        pixels = images(*size)
        actual = [torch.from_numpy(x) for x in session.run(None, {session.get_inputs()[0].name: pixels.numpy()})]
        with torch.no_grad():
            expected = tensors_of(model(pixels))
        for mine, plain in zip(actual, expected, strict=True):
            assert relative_error(mine, plain) < ONNX_LIMIT, size
        assert_bias_matters(actual, model, pixels)


@pytest.mark.parametrize(
    ("name", "implementation", "position"),
    [
        ("BeitForImageClassification", None, "per layer"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("BeitForImageClassification", "eager", "both"),
                ("BeitModel", "sdpa", "both"),
                ("BeitForMaskedImageModeling", "sdpa", "shared"),
                ("BeitForSemanticSegmentation", "sdpa", "per layer"),
                ("BeitBackbone", "sdpa", "per layer"),
            )
        ),
    ],
)
def test_onnx_runtime_equals_model_at_every_size(name: str, implementation: str | None, position: str) -> None:
    """ONNX does not have the operators, so None selects eager or sdpa attention."""
    model = small(name, position, attn_implementation=implementation)
    session = to_onnx(model, images(2, 3, 32, 48))
    assert_onnx_agrees(session, model, (2, 3, 32, 48), *OTHER_SIZES)


@pytest.mark.slow
def test_onnx_absolute_positions_equal_model() -> None:
    model = small(position="absolute", attn_implementation="sdpa")
    session = to_onnx(model, images(2, 3, 32, 48))
    for size in OTHER_SIZES:
        pixels = images(*size)
        (actual,) = session.run(None, {session.get_inputs()[0].name: pixels.numpy()})
        assert relative_error(torch.from_numpy(actual), model(pixels).logits) < ONNX_LIMIT


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"attn_implementation": "triton"},
            "attn_implementation='triton' cannot serve.*Use 'sdpa' or 'eager', or None",
        ),
        (
            {"attn_implementation": "sdpa", "patch_embed_implementation": "fused"},
            "patch_embed_implementation='fused' cannot serve this model.*Use 'conv', or None",
        ),
    ],
)
def test_onnx_of_custom_operator_raises(options: dict[str, str], message: str) -> None:
    model = small(**options)
    with pytest.raises(torch.onnx.OnnxExporterError, match=rf"(?s){message}") as raised:
        to_onnx(model, images())
    assert "exported to ONNX, which has none of beit_fast's operators" in str(raised.value)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.torch.jit:DeprecationWarning")
@pytest.mark.parametrize("implementation", ["eager", "sdpa", "triton"])
@pytest.mark.parametrize("name", QUICK_CLASSES)
def test_jit_trace_equals_model_for_every_batch(name: str, implementation: str) -> None:
    model = small(name, "both", attn_implementation=implementation, return_dict=False)
    traced = torch.jit.trace(model, images(2, 3, 32, 48))
    called = "beit_fast::rel_pos_attention" in str(traced.inlined_graph)
    assert called is (implementation == "triton")
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    loaded = torch.jit.load(file)
    for batch in (2, 5, 1):
        pixels = images(batch, 3, 32, 48)
        actual = tensors_of(loaded(pixels))
        for mine, plain in zip(actual, tensors_of(model(pixels)), strict=True):
            torch.testing.assert_close(mine, plain)
        assert_bias_matters(actual, model, pixels)
