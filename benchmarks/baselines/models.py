"""Who runs the whole model: every peer declared once, all with the same weights, and why one cannot take part."""

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


@dataclass(frozen=True)
class Network:
    """A model that is ready for its case.

    forward: pixels, bound when it was built, to logits `[B, labels]`. kernel: what runs.
    module: holds the parameters that are trained; None where nothing is trained.
    """

    forward: Callable[[], Tensor]
    kernel: str
    module: nn.Module | None = None


@dataclass(frozen=True)
class ModelPeer:
    """One way to run BEiT.

    name: unique. what: one line for the reader. build: a case, threads and an exported file to a network.
    packages: what it needs installed. exports: whether it reads that file.
    modes, dtypes, devices: what it takes part in; `refusal` says why not in others.
    slow: devices where it takes long to prepare or to run, so that only runs with every peer have it.
    tolerance: the relative error that is accepted of it in fp32, where that is not the house's rule.
    copies, scores: about how many copies of the weights, and of `[B, H, N, N]` in fp32, its process holds.
    """

    name: str
    what: str
    build: Callable[[ModelCase, int, str], Network]
    packages: tuple[str, ...] = ()
    modes: tuple[str, ...] = (INFERENCE, TRAINING)
    dtypes: tuple[str, ...] = ("fp32", "bf16", "fp16")
    devices: tuple[str, ...] = ("cpu", "cuda")
    refusal: str = ""
    exports: bool = False
    slow: tuple[str, ...] = ()
    copies: int = 1
    scores: int = 2
    tolerance: float | None = None

    def __str__(self) -> str:
        return self.name

    def why_missing(self, case: ModelCase, every_peer: bool) -> str | None:
        """The reason why it takes no part in `case`, or None."""
        if case.mode not in self.modes or case.dtype not in self.dtypes or case.device not in self.devices:
            return self.refusal
        if absent := not_installed(self.packages):
            return f"not installed: {', '.join(absent)} (pip install 'beit-fast[bench]', timm with --no-deps)"
        if case.device in self.slow and not every_peer:
            return "takes long to prepare or to run: measured with --require-peers or --full"
        return None

    def bytes_needed(self, case: ModelCase) -> int:
        """About what its process needs once it is prepared: to decide who can be in memory at the same time."""
        size = case.size
        tokens = case.batch * case.tokens * size.width * DTYPES[case.dtype].itemsize
        scores = self.scores * case.batch * size.heads * case.tokens**2 * 4
        held = size.layers * (16 * tokens + scores) if case.trains else 16 * tokens + scores
        if self.exports:  # the dense bias of each layer
            held += size.layers * size.heads * case.tokens**2 * 4
        return _PROCESS_BYTES + (self.copies + case.trains) * weight_bytes(case) + held


_PROCESS_BYTES = 450 << 20  # libraries


def logits_and_gradients(case: ModelCase, network: Network) -> dict[str, Tensor]:
    """What is compared with the reference: logits and, in training, the gradients by kind of parameter."""
    if network.module is None:
        with torch.no_grad():
            return {"logits": network.forward().float().cpu()}
    logits = network.forward()
    _loss(case, logits).backward()
    gradients = {}
    for name, parameter in network.module.named_parameters():
        if parameter.grad is None:
            raise ValueError(f"wrong and not timed. {name} got no gradient")
        gradients[name] = parameter.grad
    kinds = by_kind(to_hub_names(gradients)[0])
    network.module.zero_grad(set_to_none=True)
    return {"logits": logits.detach().float().cpu(), **{kind: gradient.cpu() for kind, gradient in kinds.items()}}


def call_of(case: ModelCase, network: Network) -> Callable[[], Tensor]:
    """What is timed: logits without a graph; or a training step, whose gradients are let go at its end."""

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
    """torch.compile, in inference as the best that it does: frozen weights on a CPU, CUDA graphs on CUDA."""
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


def transformers_model(case: ModelCase, implementation: str, dtype: torch.dtype) -> nn.Module:
    """Transformers' classifier with the weights of the case."""
    from transformers import BeitConfig, BeitForImageClassification

    model = BeitForImageClassification(BeitConfig(**case.options, attn_implementation=implementation))
    fill(model, parameters(case))
    return model.to(case.device, dtype).train(case.trains)


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


@torch.no_grad()
def fill(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Give a model of Transformers or timm weights that have the names of the hub.

    Raises:
        ValueError: the model has other parameters than there are weights.
    """
    own = dict(model.named_parameters())
    packed = {name: own.pop(name) for name in [name for name in own if name.endswith(".attn.qkv.weight")]}
    targets, _ = to_hub_names(own)
    known = set(targets)
    for name, target in packed.items():
        projection = f"beit.encoder.layer.{name.split('.')[1]}.attention.attention"
        parts = [f"{projection}.{part}.weight" for part in ("query", "key", "value")]
        target.copy_(torch.cat([weights[part] for part in parts]))
        known.update(parts)
    if known != weights.keys():
        raise ValueError(f"parameters and weights differ in {sorted(known ^ weights.keys())}")
    for name, target in targets.items():
        target.copy_(weights[name])


def _runtime(open_file: Callable[[ModelCase, int, str], tuple[Callable[[], Tensor], str]]) -> Callable[..., Network]:
    return lambda case, threads, exported: Network(*open_file(case, threads, exported))


_FP32_TOLERANCE = 1e-5  # of fp32 by choice less exact, and of Inductor, which adds up a bias's gradient row by row
_ON_CPU, _ANYWHERE = ("cpu",), ("cpu", "cuda")
_HF = ("transformers",)
OPTIMIZED, OURS = "beit_fast optimized", "beit_fast triton"
OPTIMIZED_HIGH = f"{OPTIMIZED} high"
ACCELERATED = "transformers accelerated"

MODEL_PEERS = (
    ModelPeer(
        OPTIMIZED,
        "optimize_for_inference",
        _optimized,
        modes=(INFERENCE,),
        refusal="is for inference",
        copies=2,
        scores=0,
    ),
    ModelPeer(
        OPTIMIZED_HIGH,
        'the same after torch.set_float32_matmul_precision("high")',
        _optimized_high,
        modes=(INFERENCE,),
        dtypes=("fp32",),
        refusal="is for inference in fp32",
        copies=2,
        scores=0,
        tolerance=_FP32_TOLERANCE,
    ),
    ModelPeer(OURS, "as it is built", _ours("triton"), scores=1),
    ModelPeer(
        f"{OURS} compiled",
        "under torch.compile",
        _ours("triton", True),
        slow=_ANYWHERE,
        copies=2,
        scores=1,
        tolerance=_FP32_TOLERANCE,
    ),
    ModelPeer("beit_fast sdpa", "gathered bias given to SDPA", _ours("sdpa"), slow=_ON_CPU),
    ModelPeer("beit_fast eager", "matrix products and softmax", _ours("eager"), slow=_ON_CPU, scores=3),
    ModelPeer(ACCELERATED, "Transformers' model after accelerate(model)", _accelerated, _HF, scores=1),
    ModelPeer("transformers sdpa", "Transformers' model", _transformers("sdpa"), _HF),
    ModelPeer(
        "transformers sdpa compiled",
        "under torch.compile",
        _transformers("sdpa", True),
        _HF,
        slow=_ON_CPU,
        copies=2,
        tolerance=_FP32_TOLERANCE,
    ),
    ModelPeer("transformers eager", "Transformers' model", _transformers("eager"), _HF, slow=_ON_CPU, scores=3),
    ModelPeer("timm", "timm's model, fused attention", _timm(), ("timm",)),
    ModelPeer(
        "timm compiled",
        "under torch.compile",
        _timm(True),
        ("timm",),
        slow=_ANYWHERE,
        copies=2,
        tolerance=_FP32_TOLERANCE,
    ),
    ModelPeer(
        "onnxruntime",
        "ONNX Runtime on Transformers' model, exported",
        _runtime(open_onnxruntime),
        ("transformers", "onnx", "onnxruntime"),
        modes=(INFERENCE,),
        dtypes=("fp32",),
        devices=("cpu",),
        refusal="is for inference; on a CPU it computes in fp32, and its CUDA build is another package",
        exports=True,
    ),
    ModelPeer(
        "openvino",
        "OpenVINO on Transformers' model, exported",
        _runtime(open_openvino),
        ("transformers", "onnx", "openvino"),
        modes=(INFERENCE,),
        devices=("cpu",),
        refusal="is for inference on a CPU",
        exports=True,
        copies=2,
    ),
)
