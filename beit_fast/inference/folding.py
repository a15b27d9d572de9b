"""Exact folds for inference: scales and shifts of a BEiT block become part of its linear layers.

With `norm(x) = g * n(x) + b` and a linear layer after it, `W norm(x) + c = (W diag(g)) n(x) + (W b + c)`. A layer scale
after a linear layer scales its rows. Query, key and value become one projection. The factor of `q k^T` scales the rows
of the query. All folds are computed in fp32 (fp64 for fp64 parameters) and rounded once, to the requested dtype.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..layers.attention import BeitAttention, BeitRelativePositionBias, BeitSelfAttention, BeitSelfOutput
from ..layers.block import BeitEncoder, BeitLayer
from ..layers.drop_path import BeitDropPath
from ..layers.mlp import BeitIntermediate, BeitOutput
from ..layers.module_hooks import hook_reasons
from ..utils.messages import full_name, join_some

_PLAIN_TYPES = (Tensor, nn.Parameter)  # subclasses, such as quantized weights, may hold other numbers than they show
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_TYPES: dict[str, tuple[type[nn.Module], ...]] = {
    "attention": (BeitAttention,),
    "attention.attention": (BeitSelfAttention,),
    "attention.attention.query": (nn.Linear,),
    "attention.attention.key": (nn.Linear,),
    "attention.attention.value": (nn.Linear,),
    "attention.attention.relative_position_bias": (BeitRelativePositionBias,),
    "attention.output": (BeitSelfOutput,),
    "attention.output.dense": (nn.Linear,),
    "attention.output.dropout": (nn.Dropout, nn.Identity),
    "intermediate": (BeitIntermediate,),
    "intermediate.dense": (nn.Linear,),
    "output": (BeitOutput,),
    "output.dense": (nn.Linear,),
    "output.dropout": (nn.Dropout, nn.Identity),
    "layernorm_before": (nn.LayerNorm,),
    "layernorm_after": (nn.LayerNorm,),
    "drop_path": (BeitDropPath, nn.Identity),
}
"""Accepted types of the modules in a block, by path."""


@dataclass(frozen=True)
class Affine:
    """A linear layer as plain tensors: weight `[out, in]`, bias `[out]`."""

    weight: Tensor
    bias: Tensor

    def to(self, dtype: torch.dtype) -> Affine:
        return Affine(self.weight.to(dtype).contiguous(), self.bias.to(dtype))

    def after_norm(self, norm: nn.LayerNorm) -> Affine:
        """Fold in the gain and shift of the norm before this layer."""
        gain, shift = (_wide(parameter) for parameter in (norm.weight, norm.bias))
        return Affine(self.weight * gain, self.bias + self.weight @ shift)

    def scaled(self, factors: Tensor | None) -> Affine:
        """Multiply each output by its factor."""
        if factors is None:
            return self
        return Affine(self.weight * _wide(factors)[:, None], self.bias * _wide(factors))


@dataclass(frozen=True)
class FoldedLayer:
    """A folded block: four linear layers, an activation and the bias table.

    Attributes:
        qkv: `[3 * H * D, E]`, query rows multiplied by the softmax scale.
        out, down: output projections, multiplied by the layer scales.
        up: first half of the MLP, followed by `activation`.
        eps: of the two norms.
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
    """Fold a block and cast it to `dtype`; the result shares no memory with `layer`."""
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


def folding_errors(encoder: nn.Module, name: str = "encoder") -> list[str]:
    """Return every reason why the blocks of `encoder` cannot be folded.

    `name` is the path of the encoder in the model.
    """
    if type(encoder) is not BeitEncoder:
        return _wrong_types([(name, type(encoder), BeitEncoder)])
    errors = hook_reasons({f"{name}.{path}" if path else name: module for path, module in encoder.named_modules()})
    errors += _wrong_types(
        (path, type(module), types[0])
        for path, module, types in _expected_modules(encoder, name)
        if type(module) not in types
    )
    devices = {parameter.device for parameter in encoder.parameters()}
    if len(devices) > 1:
        errors.append(f"its parameters are on several devices: {', '.join(sorted(map(str, devices)))}")
    if any(device.type == "meta" for device in devices):
        errors.append("its parameters are on the meta device and have no values")
    return errors


def parameter_errors(model: nn.Module) -> list[str]:
    """Return every reason why parameters of `model` cannot be folded."""
    parameters = dict(model.named_parameters())
    foreign = [(path, type(x), nn.Parameter) for path, x in parameters.items() if type(x) not in _PLAIN_TYPES]
    dtypes = {x.dtype for x in parameters.values() if type(x) in _PLAIN_TYPES}
    unsupported = sorted(map(str, dtypes - set(_DTYPES)))
    accepted = f"{', '.join(map(str, _DTYPES[:-1]))} or {_DTYPES[-1]}"
    return _wrong_types(foreign) + [
        f"{join_some(path for path, x in parameters.items() if str(x.dtype) == dtype)}: {dtype} is not supported "
        f"(expected {accepted})"
        for dtype in unsupported
    ]


def packed_weight_errors(model: nn.Module, encoder: str) -> list[str]:
    """Return the modules outside `encoder` whose weights are not parameters.

    Quantized layers pack their weights, which no dtype or device reaches. `folding_errors` names those of the encoder.
    """
    packed: dict[type, dict[str, None]] = {}
    for key, value in model.state_dict(keep_vars=True).items():
        path = key.rpartition(".")[0]
        if path.startswith(f"{encoder}.") or not _is_packed(value):
            continue
        while path.rpartition(".")[2].startswith("_"):
            path = path.rpartition(".")[0]
        packed.setdefault(type(model.get_submodule(path)), {})[path] = None
    return [
        f"{join_some(paths)} {_is_a(len(paths))} {full_name(kind)}, whose weights are packed"
        for kind, paths in packed.items()
    ]


def _is_packed(value: object) -> bool:
    if isinstance(value, Tensor):
        return type(value) in _PLAIN_TYPES and value.is_quantized
    return any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value))


def _wrong_types(found: Iterable[tuple[str, type, type]]) -> list[str]:
    """Write one message for each pair of types.

    Each item of `found` is the path of a module or parameter, its type and the expected type.
    """
    paths: dict[tuple[type, type], list[str]] = {}
    for path, given, expected in found:
        paths.setdefault((given, expected), []).append(path)
    return [
        f"{join_some(names)} {_is_a(len(names))} {full_name(given)}, not a {full_name(expected)}"
        for (given, expected), names in paths.items()
    ]


def _is_a(count: int) -> str:
    return "is a" if count == 1 else "are each a"


def _expected_modules(encoder: BeitEncoder, name: str) -> Iterator[tuple[str, nn.Module, tuple[type[nn.Module], ...]]]:
    """Yield every module that folding reads or skips.

    Each item is the path, the module and its accepted types.
    """
    if encoder.relative_position_bias is not None:
        yield f"{name}.relative_position_bias", encoder.relative_position_bias, (BeitRelativePositionBias,)
    for index, layer in enumerate(encoder.layer):
        yield f"{name}.layer.{index}", layer, (BeitLayer,)
        if type(layer) is BeitLayer:
            found = dict(layer.named_modules())
            for path, types in _TYPES.items():
                if path in found:  # else a module above it was replaced, which is reported
                    yield f"{name}.layer.{index}.{path}", found[path], types
