"""Exact folds for inference: what a BEiT block multiplies and adds around its linear layers, moved into them.

With `norm(x) = g * n(x) + b` and a linear layer after it, `W norm(x) + c = (W diag(g)) n(x) + (W b + c)`; a layer scale
after a linear layer scales its rows; query, key and value are one projection; and the factor of `q k^T` goes into the
query's rows. All is done in fp32 (fp64 for fp64 parameters) and rounded once, to the dtype asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..layers.attention import BeitAttention, BeitSelfAttention, BeitSelfOutput
from ..layers.block import BeitEncoder, BeitLayer
from ..layers.mlp import BeitIntermediate, BeitOutput
from ..layers.module_hooks import hook_obstacles


@dataclass(frozen=True)
class Affine:
    """A linear layer as plain tensors: weight `[out, in]`, bias `[out]`."""

    weight: Tensor
    bias: Tensor

    def to(self, dtype: torch.dtype) -> Affine:
        return Affine(self.weight.to(dtype).contiguous(), self.bias.to(dtype))

    def after_norm(self, norm: nn.LayerNorm) -> Affine:
        """The layer that takes the normalised rows before their gain and shift."""
        gain, shift = (_wide(parameter) for parameter in (norm.weight, norm.bias))
        return Affine(self.weight * gain, self.bias + self.weight @ shift)

    def scaled(self, factors: Tensor | None) -> Affine:
        """The layer with each output multiplied by its factor."""
        if factors is None:
            return self
        return Affine(self.weight * _wide(factors)[:, None], self.bias * _wide(factors))


@dataclass(frozen=True)
class FoldedLayer:
    """What is left of a block: four linear layers, the activation between the last two, and the bias table.

    qkv: `[3 * H * D, E]`, query rows multiplied by the softmax scale. out, down: multiplied by the layer scales.
    table: `[rows, H]` of the native window in fp32 (fp64), or None.
    """

    qkv: Affine
    out: Affine
    up: Affine
    down: Affine
    activation: nn.Module
    eps: tuple[float, float]
    table: Tensor | None


@torch.no_grad()
def fold_layer(layer: BeitLayer, dtype: torch.dtype) -> FoldedLayer:
    """The folded block in `dtype`; it shares nothing with `layer`."""
    attention = layer.attention.attention
    projections = [_affine(linear) for linear in (attention.query, attention.key, attention.value)]
    projections[0] = projections[0].scaled(projections[0].bias.new_full((1,), attention.head_dim**-0.5))
    qkv = Affine(torch.cat([part.weight for part in projections]), torch.cat([part.bias for part in projections]))
    bias = attention.relative_position_bias
    return FoldedLayer(
        qkv.after_norm(layer.layernorm_before).to(dtype),
        _affine(layer.attention.output.dense).scaled(layer.lambda_1).to(dtype),
        _affine(layer.intermediate.dense).after_norm(layer.layernorm_after).to(dtype),
        _affine(layer.output.dense).scaled(layer.lambda_2).to(dtype),
        layer.intermediate.activation,
        (layer.layernorm_before.eps, layer.layernorm_after.eps),
        None if bias is None else _wide(bias.relative_position_bias_table).clone(),
    )


def _affine(linear: nn.Linear) -> Affine:
    weight = _wide(linear.weight)
    return Affine(weight, weight.new_zeros(weight.shape[0]) if linear.bias is None else _wide(linear.bias))


def _wide(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))


def obstacles_to_folding(encoder: nn.Module) -> list[str]:
    """Why the blocks of `encoder` cannot be folded, all reasons; empty where they can."""
    if type(encoder) is not BeitEncoder:
        return [f"encoder is a {type(encoder).__name__}, not a BeitEncoder"]
    reasons = hook_obstacles({f"encoder.{name}": module for name, module in encoder.named_modules()})
    for name, module, expected in _expected_modules(encoder):
        if type(module) is not expected:
            reasons.append(f"{name} is a {type(module).__name__}, not a {expected.__name__}")
    places = {parameter.device for parameter in encoder.parameters()}
    if len(places) > 1:
        reasons.append(f"its parameters lie on {', '.join(sorted(map(str, places)))}")
    if any(place.type == "meta" for place in places):
        reasons.append("its parameters lie on the meta device and hold no numbers")
    return reasons


def _expected_modules(encoder: BeitEncoder) -> Iterator[tuple[str, nn.Module, type[nn.Module]]]:
    """Every module whose parameters are read or whose call is left out, by name, with the type it must have."""
    paths: dict[str, type[nn.Module]] = {
        "attention": BeitAttention,
        "attention.attention": BeitSelfAttention,
        "attention.attention.query": nn.Linear,
        "attention.attention.key": nn.Linear,
        "attention.attention.value": nn.Linear,
        "attention.output": BeitSelfOutput,
        "attention.output.dense": nn.Linear,
        "intermediate": BeitIntermediate,
        "intermediate.dense": nn.Linear,
        "output": BeitOutput,
        "output.dense": nn.Linear,
        "layernorm_before": nn.LayerNorm,
        "layernorm_after": nn.LayerNorm,
    }
    for index, layer in enumerate(encoder.layer):
        name = f"encoder.layer.{index}"
        yield name, layer, BeitLayer
        if type(layer) is BeitLayer:
            found = dict(layer.named_modules())
            for path, expected in paths.items():
                if path in found:  # where it is not, a module above it was replaced, which is told
                    yield f"{name}.{path}", found[path], expected
