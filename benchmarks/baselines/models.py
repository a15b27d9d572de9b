"""Baselines of whole models, all with the same weights.

`ModelBaseline.missing_reason` returns the reason why a baseline cannot run a case.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import beit_fast
from beit_fast.checkpoint.key_mapping import to_hub_names
from beit_fast.ops.dispatch import attention

from ..harness.model_cases import (
    DTYPES,
    INFERENCE,
    LAYER_NORM_EPS,
    PATCH,
    TRAINING,
    ModelCase,
    by_kind,
    our_model,
    parameters,
    pixels_and_labels,
    weight_bytes,
)
from .attention import not_installed
from .exported import open_onnxruntime, open_openvino
from .timm_import import import_timm
from .transformers_model import fill, transformers_model


@dataclass(frozen=True)
class Network:
    """A model that is ready for its case.

    Attributes:
        forward: Computes logits `[B, labels]` from bound pixels.
        kernel: Name of the kernel that runs.
        module: Holds the trained parameters; None in inference.
    """

    forward: Callable[[], Tensor]
    kernel: str
    module: nn.Module | None = None


@dataclass(frozen=True)
class ModelBaseline:
    """One implementation of BEiT.

    Attributes:
        name: Unique name.
        what: Description in one line.
        build: Builds a network from a case, a number of threads and an exported file.
        packages: Packages that it needs.
        modes: Modes that it supports.
        dtypes: Dtypes that it supports.
        devices: Devices that it supports.
        unsupported: The reason for other modes, dtypes and devices.
        exports: Whether it reads the exported file.
        slow: Devices on which it is slow to prepare or to run, so that only runs with all baselines include it.
        copies: Approximate copies of the weights in its process.
        scores: Approximate fp32 matrices `[B, H, N, N]` in its process.
        tolerance: Relative error allowed in fp32, in place of the budgets.
    """

    name: str
    what: str
    build: Callable[[ModelCase, int, str], Network]
    packages: tuple[str, ...] = ()
    modes: tuple[str, ...] = (INFERENCE, TRAINING)
    dtypes: tuple[str, ...] = ("fp32", "bf16", "fp16")
    devices: tuple[str, ...] = ("cpu", "cuda")
    unsupported: str = ""
    exports: bool = False
    slow: tuple[str, ...] = ()
    copies: int = 1
    scores: int = 2
    tolerance: float | None = None

    def __str__(self) -> str:
        return self.name

    def missing_reason(self, case: ModelCase, all_baselines: bool) -> str | None:
        """Return the reason why the baseline cannot run a case, or None."""
        if case.mode not in self.modes or case.dtype not in self.dtypes or case.device not in self.devices:
            return self.unsupported
        if absent := not_installed(self.packages):
            return f"not installed: {', '.join(absent)} (pip install 'beit-fast[bench]', timm with --no-deps)"
        if case.device in self.slow and not all_baselines:
            return "slow to prepare or to run: measured with --require-baselines or --full"
        return None

    def bytes_needed(self, case: ModelCase) -> int:
        """Estimate the bytes of the baseline's process. They decide which baselines fit into memory together."""
        size = case.size
        tokens = case.batch * case.tokens * size.width * DTYPES[case.dtype].itemsize
        scores = self.scores * case.batch * size.heads * case.tokens**2 * 4
        held = size.layers * (16 * tokens + scores) if case.trains else 16 * tokens + scores
        if self.exports:  # the dense bias of each layer
            held += size.layers * size.heads * case.tokens**2 * 4
        return _PROCESS_BYTES + (self.copies + case.trains) * weight_bytes(case) + held


_PROCESS_BYTES = 450 << 20  # libraries


def logits_and_gradients(case: ModelCase, network: Network) -> dict[str, Tensor]:
    """Return logits and, in training, gradients by kind of parameter.

    Raises:
        ValueError: If a parameter does not get a gradient.
    """
    if network.module is None:
        with torch.no_grad():
            return {"logits": network.forward().float().cpu()}
    logits = network.forward()
    _loss(case, logits).backward()
    gradients = {}
    for name, parameter in network.module.named_parameters():
        if parameter.grad is None:
            raise ValueError(f"wrong and not timed. {name} does not get a gradient")
        gradients[name] = parameter.grad
    kinds = by_kind(to_hub_names(gradients)[0])
    network.module.zero_grad(set_to_none=True)
    return {"logits": logits.detach().float().cpu(), **{kind: gradient.cpu() for kind, gradient in kinds.items()}}


def call_of(case: ModelCase, network: Network) -> Callable[[], Tensor]:
    """Return the timed function: logits without a graph, or a training step that frees its gradients."""

    def infer() -> Tensor:
        with torch.no_grad():
            return network.forward()

    def train() -> Tensor:
        loss = _loss(case, network.forward())
        loss.backward()
        assert network.module is not None
        network.module.zero_grad(set_to_none=True)
        return loss.detach()

    return infer if network.module is None else train


def _loss(case: ModelCase, logits: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), pixels_and_labels(case)[1])


def _network(case: ModelCase, module: nn.Module, kernel: str, compiles: bool = False) -> Network:
    pixels, _ = pixels_and_labels(case)
    run = _compiled(case, module) if compiles else module

    def forward() -> Tensor:
        output = run(pixels)
        return output if isinstance(output, Tensor) else output.logits

    return Network(forward, kernel, module if case.trains else None)


def _compiled(case: ModelCase, module: nn.Module) -> Callable[[Tensor], object]:
    """Compile a module; in inference with frozen weights on a CPU, with CUDA graphs on CUDA."""
    if case.trains:
        return torch.compile(module, dynamic=False)
    if case.device == "cuda":
        return torch.compile(module, dynamic=False, mode="reduce-overhead")
    return torch.compile(module, dynamic=False, options={"freezing": True})


def _ours(implementation: str, compiles: bool = False) -> Callable[[ModelCase, int, str], Network]:
    def build(case: ModelCase, threads: int, exported: str) -> Network:
        dtype = DTYPES[case.dtype]
        model = our_model(case, implementation, dtype)
        head_dim = case.size.width // case.size.heads
        kernel = attention.kernel_name(implementation, case.device, dtype, head_dim)
        return _network(case, model, kernel + (", compiled" if compiles else ""), compiles)

    return build


def _optimized_high(case: ModelCase, threads: int, exported: str) -> Network:
    torch.set_float32_matmul_precision("high")
    return _optimized(case, threads, exported)


def _optimized(case: ModelCase, threads: int, exported: str) -> Network:
    dtype = DTYPES[case.dtype]
    model = our_model(case, "triton", torch.float32)
    kernel = attention.kernel_name("triton", case.device, dtype, case.size.width // case.size.heads)
    example, _ = pixels_and_labels(case)
    fast = beit_fast.optimize_for_inference(model, dtype=dtype, example=example, keep_original=False)
    return _network(case, fast, f"{kernel}, optimized")


def _transformers(implementation: str, compiles: bool = False) -> Callable[[ModelCase, int, str], Network]:
    def build(case: ModelCase, threads: int, exported: str) -> Network:
        model = transformers_model(case, implementation, DTYPES[case.dtype])
        return _network(case, model, implementation + (", compiled" if compiles else ""), compiles)

    return build


def _accelerated(case: ModelCase, threads: int, exported: str) -> Network:
    from beit_fast.integrations.transformers import accelerate

    dtype = DTYPES[case.dtype]
    model = transformers_model(case, "sdpa", dtype)
    accelerate(model, attn_implementation="triton")
    kernel = attention.kernel_name("triton", case.device, dtype, case.size.width // case.size.heads)
    return _network(case, model, f"{kernel}, accelerated")


def _timm(compiles: bool = False) -> Callable[[ModelCase, int, str], Network]:
    def build(case: ModelCase, threads: int, exported: str) -> Network:
        timm, size = import_timm(), case.size
        timm.layers.set_fused_attn(True)
        model = timm.models.beit.Beit(
            img_size=case.image,
            patch_size=PATCH,
            embed_dim=size.width,
            depth=size.layers,
            num_heads=size.heads,
            mlp_ratio=size.mlp / size.width,
            num_classes=size.labels,
            init_values=0.1,
            use_abs_pos_emb=False,
            use_rel_pos_bias=True,
            norm_layer=functools.partial(timm.layers.LayerNorm, eps=LAYER_NORM_EPS),
        )
        assert all(block.attn.fused_attn for block in model.blocks)
        fill(model, parameters(case))
        model = model.to(case.device, DTYPES[case.dtype]).train(case.trains)
        kernel = f"timm {timm.__version__}, sdpa" + (", compiled" if compiles else "")
        return _network(case, model, kernel, compiles)

    return build


def _runtime(open_file: Callable[[ModelCase, int, str], tuple[Callable[[], Tensor], str]]) -> Callable[..., Network]:
    return lambda case, threads, exported: Network(*open_file(case, threads, exported))


_FP32_TOLERANCE = 1e-5  # for reduced precision, and for Inductor, which sums the gradient of a bias row by row
_ON_CPU, _ANYWHERE = ("cpu",), ("cpu", "cuda")
_HF = ("transformers",)
OPTIMIZED, OURS = "beit_fast optimized", "beit_fast triton"
OPTIMIZED_HIGH = f"{OPTIMIZED} high"
ACCELERATED = "transformers accelerated"

MODEL_BASELINES = (
    ModelBaseline(
        OPTIMIZED,
        "optimize_for_inference",
        _optimized,
        modes=(INFERENCE,),
        unsupported="supports inference only",
        copies=2,
        scores=0,
    ),
    ModelBaseline(
        OPTIMIZED_HIGH,
        'the same after torch.set_float32_matmul_precision("high")',
        _optimized_high,
        modes=(INFERENCE,),
        dtypes=("fp32",),
        unsupported="supports inference in fp32 only",
        copies=2,
        scores=0,
        tolerance=_FP32_TOLERANCE,
    ),
    ModelBaseline(OURS, "the model as it is built", _ours("triton"), scores=1),
    ModelBaseline(
        f"{OURS} compiled",
        "under torch.compile",
        _ours("triton", True),
        slow=_ANYWHERE,
        copies=2,
        scores=1,
        tolerance=_FP32_TOLERANCE,
    ),
    ModelBaseline("beit_fast sdpa", "SDPA with a gathered bias", _ours("sdpa"), slow=_ON_CPU),
    ModelBaseline(
        "beit_fast eager", "gathered bias, matrix products and softmax", _ours("eager"), slow=_ON_CPU, scores=3
    ),
    ModelBaseline(ACCELERATED, "Transformers' model after accelerate(model)", _accelerated, _HF, scores=1),
    ModelBaseline("transformers sdpa", "Transformers' model", _transformers("sdpa"), _HF),
    ModelBaseline(
        "transformers sdpa compiled",
        "under torch.compile",
        _transformers("sdpa", True),
        _HF,
        slow=_ON_CPU,
        copies=2,
        tolerance=_FP32_TOLERANCE,
    ),
    ModelBaseline("transformers eager", "Transformers' model", _transformers("eager"), _HF, slow=_ON_CPU, scores=3),
    ModelBaseline("timm", "timm's model with fused attention", _timm(), ("timm",)),
    ModelBaseline(
        "timm compiled",
        "under torch.compile",
        _timm(True),
        ("timm",),
        slow=_ANYWHERE,
        copies=2,
        tolerance=_FP32_TOLERANCE,
    ),
    ModelBaseline(
        "onnxruntime",
        "ONNX Runtime on Transformers' model, exported",
        _runtime(open_onnxruntime),
        ("transformers", "onnx", "onnxruntime"),
        modes=(INFERENCE,),
        dtypes=("fp32",),
        devices=("cpu",),
        unsupported="supports inference in fp32 on a CPU only; its CUDA build is another package",
        exports=True,
    ),
    ModelBaseline(
        "openvino",
        "OpenVINO on Transformers' model, exported",
        _runtime(open_openvino),
        ("transformers", "onnx", "openvino"),
        modes=(INFERENCE,),
        devices=("cpu",),
        unsupported="supports inference on a CPU only",
        exports=True,
        copies=2,
    ),
)
