"""Tiny random Transformers models with BEiT or Data2VecVision layers, for 4.57 and 5.x."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from beit_fast.integrations.transformers import accelerate

from .transformers_reference import CLASSES, POSITIONS, TINY, options_for, random_inputs, randomize

FP32_PARITY = 1e-5
FP64_PARITY = 1e-9  # two orders of summation in fp64

IS_4 = transformers.__version__.startswith("4.")

DENSE = ("UperNetForSemanticSegmentation", "DPTForDepthEstimation", "ZoeDepthForDepthEstimation")
DATA2VEC = (
    "Data2VecVisionModel",
    "Data2VecVisionForImageClassification",
    "Data2VecVisionForSemanticSegmentation",
)
ALL = (*CLASSES, *DATA2VEC, *DENSE)

STAGES = {"num_hidden_layers": 4, "out_features": ["stage1", "stage2", "stage3", "stage4"]}
NECK = {"neck_hidden_sizes": [8, 8, 8, 8], "fusion_hidden_size": 8}
DENSE_OPTIONS = {
    "UperNetForSemanticSegmentation": {"hidden_size": 8, "pool_scales": [1, 2], "use_auxiliary_head": False},
    "DPTForDepthEstimation": NECK,
    "ZoeDepthForDepthEstimation": NECK
    | {"bottleneck_features": 8, "num_attractors": [2, 2, 2, 1], "bin_embedding_dim": 8, "num_relative_features": 8}
    | {"bin_configurations": [{"n_bins": 4, "min_depth": 0.001, "max_depth": 10.0}]},
}


def build(name: str, position: str = "per layer", attn_implementation: str = "sdpa", **options: object) -> nn.Module:
    """Build an fp32 model in evaluation mode; `options` go to the BEiT configuration."""
    values = TINY | POSITIONS[position]
    if name in DENSE:
        values |= STAGES | {"reshape_hidden_states": name.startswith("UperNet")}
        trunk = transformers.BeitConfig(**(values | options))
        trunk._attn_implementation = attn_implementation
        config_class = getattr(transformers, name.split("For")[0] + "Config")
        model = getattr(transformers, name)(config_class(backbone_config=trunk, num_labels=5, **DENSE_OPTIONS[name]))
    else:
        values |= options_for(name.replace("Data2VecVision", "Beit"))
        family = "Data2VecVision" if name in DATA2VEC else "Beit"
        config = getattr(transformers, f"{family}Config")(**(values | options))
        model = getattr(transformers, name)._from_config(config, attn_implementation=attn_implementation)
    randomize(model)
    return model.eval()


def pair(
    name: str = "BeitForImageClassification",
    position: str = "per layer",
    dtype: torch.dtype = torch.float64,
    implementation: str | None = "triton",
    **options: Any,
) -> tuple[Any, Any]:
    """Build a model and its accelerated copy with the same weights."""
    theirs = build(name, position, **options).to(dtype)
    ours = copy.deepcopy(theirs)
    accelerate(ours, implementation)
    return theirs, ours


def biases(model: nn.Module) -> list[Any]:
    return [x for x in model.modules() if hasattr(x, "relative_position_bias_table")]


def attentions(model: nn.Module) -> list[Any]:
    """List the accelerated attention modules."""
    return [x for x in model.modules() if hasattr(type(x), "attn_implementation")]


def layer_of(model: Any, index: int) -> Any:
    """Return a layer of a `BeitModel`."""
    return (model.encoder.layer if IS_4 else model.layers)[index]


def inputs_for(name: str, model: nn.Module, size: tuple[int, int] = (32, 32), batch: int = 2) -> dict[str, Tensor]:
    """Return pixels in the model's dtype, and labels and masks; dense models get only pixels."""
    own = name.replace("Data2VecVision", "Beit") if name not in DENSE else "BeitBackbone"
    trunk = model if name not in DENSE else model.backbone
    inputs = random_inputs(own, trunk, size, batch)
    dtype = next(model.parameters()).dtype
    return inputs | {"pixel_values": inputs["pixel_values"].to(dtype)}


def sizes_for(name: str) -> list[tuple[int, int]]:
    """Image sizes that the class supports in this version of Transformers."""
    native_alone = name == "Data2VecVisionForSemanticSegmentation" or (IS_4 and name == "BeitForSemanticSegmentation")
    return [(32, 32)] if native_alone else [(32, 32), (48, 40)]


def layer_count(model: nn.Module) -> int:
    config = getattr(model.config, "backbone_config", None) or model.config
    return config.num_hidden_layers


def tensors_of(outputs: Any) -> list[Tensor]:
    """List every floating-point tensor of a model's output, in order."""
    return list(_flatten(outputs.to_tuple()))


def _flatten(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _flatten(item)


def run(model: nn.Module, inputs: dict[str, Any], differentiate: bool = True) -> dict[str, Tensor]:
    """Return outputs by number and gradients by parameter name, for one seed."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(0)
    with torch.set_grad_enabled(differentiate):
        outputs = tensors_of(model(**inputs))
        if differentiate:
            differentiable = [x for x in outputs if x.requires_grad]
            weights = [torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view_as(x) for x in differentiable]
            sum((x * weight).sum() for x, weight in zip(differentiable, weights, strict=True)).backward()
    results = {f"output {index}": x.detach() for index, x in enumerate(outputs)}
    return results | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = FP64_PARITY) -> None:
    """Compare outputs and gradients by their relative errors.

    The scale of a gradient is at least 1e-3 of the norm of all gradients, because some are zero except for rounding.
    With a tolerance of 0, outputs must be bit-exact and gradients equal within 64 eps. The gradients of a convolution
    depend on its memory address, in Transformers' own models too.
    """
    assert actual.keys() == expected.keys()
    gradients = [x for name, x in expected.items() if not name.startswith("output")]
    whole = torch.stack([x.double().norm() for x in gradients]).norm() if gradients else torch.zeros(())
    for name, value in actual.items():
        assert value.shape == expected[name].shape, name
        assert value.isfinite().all(), name
        size, accepted = expected[name].double().norm(), tolerance
        if not name.startswith("output"):
            size = torch.maximum(size, 1e-3 * whole)
            accepted = max(tolerance, 64 * torch.finfo(value.dtype).eps)
        assert (value.double() - expected[name].double()).norm() <= accepted * size, name


class Spy(TorchDispatchMode):
    """Count calls of the fused operator, and record every dense `[..., H, N, N]` tensor."""

    def __init__(self, heads: int, tokens: int) -> None:
        super().__init__()
        self.dense_shape = (heads, tokens, tokens)
        self.forward_calls = 0
        self.backward_calls = 0
        self.dense: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.forward_calls += func is torch.ops.beit_fast.rel_pos_attention.default
        self.backward_calls += func is torch.ops.beit_fast.rel_pos_attention_backward.default
        if any(tuple(x.shape[-3:]) == self.dense_shape for x in _flatten([result])):
            self.dense.append(str(func))
        return result
