"""ONNX Runtime and OpenVINO on an exported model of Transformers."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from beit_fast.position_bias import gather_bias

from ..harness.model_cases import PATCH, ModelCase, parameters, pixels_and_labels
from ..harness.processes import Prepared, Unavailable
from .transformers_model import transformers_model

_PIXELS, _LOGITS = "pixels", "logits"
OPENVINO_PRECISIONS = {"fp32": "f32", "bf16": "bf16", "fp16": "f16"}


class _Constant(nn.Module):
    """Returns its value for any arguments."""

    value: Tensor | None = None

    def forward(self, *arguments: object, **options: object) -> Tensor | None:
        return self.value


class _Logits(nn.Module):
    """Computes logits from pixels and the dense bias of each layer."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        names = [name for name, module in model.named_modules() if type(module).__name__ == "BeitRelativePositionBias"]
        self.biases = [_Constant() for _ in names]
        for name, constant in zip(names, self.biases, strict=True):
            model.set_submodule(name, constant)
        self.model = model

    def forward(self, pixels: Tensor, *biases: Tensor) -> Tensor:
        for constant, bias in zip(self.biases, biases, strict=True):
            constant.value = bias
        return self.model(pixels).logits


def dense_biases(case: ModelCase) -> list[Tensor]:
    """Gather the bias of each layer, `[1, H, N, N]` in fp32."""
    side = case.image // PATCH
    tables = [table for name, table in parameters(case).items() if name.endswith("bias_table")]
    return [gather_bias(table, (side, side))[None].contiguous() for table in tables]


def export(path: str, **fields: Any) -> Prepared:
    """Export Transformers' fp32 model for a case's batch and image size.

    The dense bias of each layer is an input. Otherwise ONNX Runtime folds the gathers when it opens the file, which
    takes more than 22 GiB for a base model at 640 pixels. The exporter traces, because capturing a graph fails on the
    strides of SDPA.

    Args:
        path: File to write.
        fields: Fields of the ModelCase.

    Returns:
        A step that does nothing.
    """
    case = ModelCase(**fields)
    model = _Logits(transformers_model(case, "sdpa", torch.float32))
    inputs = (pixels_and_labels(case)[0].float(), *dense_biases(case))
    names = [_PIXELS, *(f"bias_{layer}" for layer in range(len(inputs) - 1))]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about constants in the trace, and the deprecated exporter
        torch.onnx.export(
            model, inputs, path, dynamo=False, opset_version=18, input_names=names, output_names=[_LOGITS]
        )
    return Prepared(lambda: None)


def open_onnxruntime(case: ModelCase, threads: int, exported: str) -> tuple[Callable[[], Tensor], str]:
    """Open the file in ONNX Runtime, with inputs that are bound once.

    Returns:
        The forward, and the name of its kernel.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(exported, options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    for argument, value in zip(session.get_inputs(), [pixels_and_labels(case)[0], *dense_biases(case)], strict=True):
        binding.bind_ortvalue_input(argument.name, onnxruntime.OrtValue.ortvalue_from_numpy(value.numpy()))
    binding.bind_output(_LOGITS)

    def forward() -> Tensor:
        session.run_with_iobinding(binding)
        return torch.from_numpy(binding.copy_outputs_to_cpu()[0])

    return forward, f"onnxruntime {onnxruntime.__version__}"


def open_openvino(case: ModelCase, threads: int, exported: str) -> tuple[Callable[[], Tensor], str]:
    """Open the file in OpenVINO, with the biases as constants.

    Returns:
        The forward, and the name of its kernel with its precision.

    Raises:
        Unavailable: If OpenVINO does not run in the precision of the case on this CPU.
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
        raise Unavailable(f"runs in {precision} on this CPU, not in {wanted}")
    request = compiled.create_infer_request()
    pixels = pixels_and_labels(case)[0].float().numpy()
    version = openvino.__version__.partition("-")[0]
    return lambda: torch.from_numpy(request.infer([pixels])[compiled.output(0)]), f"openvino {version}, {precision}"
