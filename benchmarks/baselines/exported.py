"""ONNX Runtime and OpenVINO: Transformers' model, exported once for both, each with as many threads as the others."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from beit_fast.position_bias import gather_bias

from ..harness.model_cases import PATCH, ModelCase, parameters, pixels_and_labels
from ..harness.processes import Absent, Prepared

_PIXELS, _LOGITS = "pixels", "logits"
OPENVINO_PRECISIONS = {"fp32": "f32", "bf16": "bf16", "fp16": "f16"}


class _Given(nn.Module):
    """Gives what it was handed, whatever it is called with."""

    value: Tensor | None = None

    def forward(self, *arguments: object, **options: object) -> Tensor | None:
        return self.value


class _Logits(nn.Module):
    """Pixels and the dense bias of each layer to logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        names = [name for name, module in model.named_modules() if type(module).__name__ == "BeitRelativePositionBias"]
        self.given = [_Given() for _ in names]
        for name, given in zip(names, self.given, strict=True):
            model.set_submodule(name, given)
        self.model = model

    def forward(self, pixels: Tensor, *biases: Tensor) -> Tensor:
        for given, bias in zip(self.given, biases, strict=True):
            given.value = bias
        return self.model(pixels).logits


def dense_biases(case: ModelCase) -> list[Tensor]:
    """The bias of each layer, `[1, H, N, N]` in fp32."""
    side = case.image // PATCH
    tables = [table for name, table in parameters(case).items() if name.endswith("bias_table")]
    return [gather_bias(table, (side, side))[None].contiguous() for table in tables]


def export(path: str, **fields: Any) -> Prepared:
    """Write Transformers' model in fp32 for its batch and image size; a step that does nothing.

    The dense bias of each layer is an input, so that runtimes get it ready: ONNX Runtime folds the gather of a base
    model at 640 pixels when it opens the file, and takes more than 22 GiB for it. The exporter is the one that traces:
    the one that captures a graph fails on the strides of SDPA.
    """
    from .models import transformers_model

    case = ModelCase(**fields)
    model = _Logits(transformers_model(case, "sdpa", torch.float32))
    inputs = (pixels_and_labels(case)[0].float(), *dense_biases(case))
    names = [_PIXELS, *(f"bias_{layer}" for layer in range(len(inputs) - 1))]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of constants in the trace, and of the exporter's age
        torch.onnx.export(
            model, inputs, path, dynamo=False, opset_version=18, input_names=names, output_names=[_LOGITS]
        )
    return Prepared(lambda: None)


def open_onnxruntime(case: ModelCase, threads: int, exported: str) -> tuple[Callable[[], Tensor], str]:
    """The forward, and what runs it. Inputs are bound once, so that no call copies them."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(exported, options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    for given, value in zip(session.get_inputs(), [pixels_and_labels(case)[0], *dense_biases(case)], strict=True):
        binding.bind_ortvalue_input(given.name, onnxruntime.OrtValue.ortvalue_from_numpy(value.numpy()))
    binding.bind_output(_LOGITS)

    def forward() -> Tensor:
        session.run_with_iobinding(binding)
        return torch.from_numpy(binding.copy_outputs_to_cpu()[0])

    return forward, f"onnxruntime {onnxruntime.__version__}"


def open_openvino(case: ModelCase, threads: int, exported: str) -> tuple[Callable[[], Tensor], str]:
    """The forward, and what runs it, with the precision that it runs in. Biases become constants of the model.

    Raises:
        Absent: this CPU does not get the precision of the case.
    """
    import openvino

    wanted = OPENVINO_PRECISIONS[case.dtype]
    options = {"INFERENCE_PRECISION_HINT": wanted, "INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    core = openvino.Core()
    model = core.read_model(exported)
    for parameter, bias in zip(model.get_parameters()[1:], dense_biases(case), strict=True):
        parameter.output(0).replace(openvino.opset13.constant(bias.numpy()).output(0))
        model.remove_parameter(parameter)
    compiled = core.compile_model(model, "CPU", options)
    del model
    precision = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
    if precision != wanted:
        raise Absent(f"runs in {precision} here where {wanted} is asked for")
    request = compiled.create_infer_request()
    pixels = pixels_and_labels(case)[0].float().numpy()
    version = openvino.__version__.partition("-")[0]
    return lambda: torch.from_numpy(request.infer([pixels])[compiled.output(0)]), f"openvino {version}, {precision}"
